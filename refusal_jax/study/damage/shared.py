"""Holds what the stages of damage share: the finished study, and the probes that read any edit of its model.

A stage that measures further partial ablations, such as a search, takes `probes(study)`, makes edits of `damage.partial.Partial`
with `edits_of`, and reads them with `damage.measures.measure_all`; `summaries` gives the intervals. A stage that measures
something else of the grid's settings takes these from GRID: its "rows" have "kernels", from which `Partial.of` makes the edit
again, and row m of each measure's values is row m of the tensor of its name in GRID_VALUES.
"""

from refusal_jax.damage.edited_rows import EditedRows
from refusal_jax.damage.measures import Measure, Probe, PromptProbe, TextProbe
from refusal_jax.study.damage.settings import DamageSettings
from refusal_jax.study.further import FurtherStudy
from refusal_jax.study.loss import loss_datasets, own_answers

HARMFUL, HARMLESS = "harmful", "harmless"
REFUSED, OVER_REFUSED, SCORE, KL, LOSS = "refused", "over_refused", "score", "kl", "loss"


class DamageStudy(FurtherStudy[DamageSettings]):
    """A finished study, of which is measured what removing its direction damages."""


def prompt_probe(study: DamageStudy, key: str, split: str = "test", most: int = 0) -> PromptProbe:
    """Returns what reads a set of prompts, at most so many; 0 is as many as for the grid. key: of the study's sets, such as
    "harmful"."""
    of, prompts = study.behaviour, study.edited_prompts(f"{key}_{split}", most or study.settings.grid.n_prompts)
    score = Measure(SCORE, of.score, "mean")
    if key == HARMFUL:
        return PromptProbe(key, prompts, Measure(REFUSED, f"{of.present} prompts {of.done}", "rate"), score=score)
    if key == HARMLESS:
        kl = Measure(KL, f"KL on {of.absent} prompts", "mean", "nats")
        return PromptProbe(key, prompts, Measure(OVER_REFUSED, f"{of.absent} prompts {of.done}", "rate"), kl=kl)
    return PromptProbe(key, prompts, Measure(f"{OVER_REFUSED}.{key}", f"{key} {of.done}", "rate"))


def text_probes(study: DamageStudy) -> list[TextProbe]:
    """Returns what reads the loss on the study's texts: the model's own answers to harmless prompts, and the files that its
    settings name."""
    answers = [row for name in own_answers(study) for row in study.run.read_json(name)]
    found = []
    for title, rows in loss_datasets(study.model, study.config.loss, answers).items():
        measure = Measure(f"{LOSS}.{title}", f"loss on {title}", "mean", "nats per token")
        usable = [row for row in rows if len(row.ids) > row.first][: study.settings.grid.n_texts]
        found.append(TextProbe(measure, EditedRows.build(study.model, usable, study.sizes.select)))
    return found


def probes(study: DamageStudy) -> list[Probe]:
    """Returns everything that is measured of an edit by single passes: of harmful prompts (the probe "harmful"), of harmless ones
    ("harmless"), of further harmless sets that look harmful, and of texts."""
    return [*(prompt_probe(study, key) for key in study.datasets), *text_probes(study)]

"""Tells how well the projection on the refusal direction detects harmful prompts and refusals, on a finished study's own replies.

The study's unedited model reads its own replies again. A judge of text says which refuse, and the projection is scored as a
detector of that: at the prompt's last token, on the reply's first tokens, and along the whole reply.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from refusal_jax.chat.model import load_model
from refusal_jax.chat.projection_monitor import ProjectionMonitor, Readings, disagreement
from refusal_jax.conditions import Baseline
from refusal_jax.errors import UserError
from refusal_jax.export.finished import FinishedStudy
from refusal_jax.harness.edited import model_of, one_each
from refusal_jax.judges.areas import Area
from refusal_jax.judges.judge import Judge, Outcome
from refusal_jax.judges.statistics import Rate
from refusal_jax.models.hf_config import load_config
from refusal_jax.study.projections import study_thresholds

EARLY = 8  # tokens of a reply that are its first


@dataclasses.dataclass(frozen=True)
class Row:
    """One detector. finds: what it should find; reads: which projection it is; area: how well."""

    finds: str
    reads: str
    area: Area


@dataclasses.dataclass(frozen=True)
class Detection:
    """Holds what was measured. layer: at whose input; harmful, harmless: numbers of prompts; refusals, compliant: of replies;
    rest: replies that do neither; apart: how often the projection and the reply disagree, None without a threshold."""

    layer: int
    harmful: int
    harmless: int
    refusals: int
    compliant: int
    rest: int
    rows: tuple[Row, ...]
    threshold: float | None
    apart: Rate | None


def detect(folder: pathlib.Path, judge: Judge, count: int) -> Detection:
    """Returns how well the projection detects, on at most `count` harmful and as many harmless prompts of a study.

    judge: says what the replies do. Raises UserError for a folder that is no finished study, and for one without replies of its
    unedited model to both kinds of prompts.
    """
    study = FinishedStudy.read(folder, 1)
    own = [one for one in study.conditions if one.intervention == Baseline.name and not one.over_refusal]
    sides = [
        [row for one in own if one.harmless == harmless for row in one.completions][:count]
        for harmless in (False, True)
    ]
    if not all(sides):
        raise UserError(
            f"The study in {folder} has no replies of the unedited model to both harmful and harmless prompts. Run it with the "
            "conditions harmful_baseline and harmless_baseline."
        )
    checkpoint = model_of([folder], [study])
    model = load_model(checkpoint, "auto", progress=True, **study.template)
    (direction,) = one_each([folder], None, None, load_config(checkpoint).n_layers)
    _, layer = direction.place
    rows = sides[0] + sides[1]
    verdicts = judge.judge([{"prompt": row["prompt"], "response": row["response"]} for row in rows])
    outcomes = [verdict.outcome if verdict else None for verdict in verdicts]
    monitor = ProjectionMonitor(model, direction.raw_d, layer)
    read = monitor.read([(row["prompt"], row["response"]) for row in rows], early=EARLY)
    harmful = np.arange(len(rows)) < len(sides[0])
    along = study_thresholds(folder)
    return _detection(layer, harmful, outcomes, read, None if along is None else float(along[layer]))


def _detection(
    layer: int,
    harmful: Bool[np.ndarray, " n"],
    outcomes: Sequence[Outcome | None],
    read: Readings,
    threshold: float | None,
) -> Detection:
    refuses = np.array([one == Outcome.REFUSES for one in outcomes])
    complies = np.array([one == Outcome.COMPLIES for one in outcomes])
    rows = [Row("harmful prompts", "the prompt's end", Area.of(read.prompt[harmful], read.prompt[~harmful]))]
    places = {
        "the prompt's end": read.prompt,
        f"the reply's first {EARLY} tokens": read.early,
        "the reply's mean": read.mean,
        "the reply's highest": read.highest,
    }
    for name, among in (("refusals", np.ones(len(harmful), bool)), ("refusals of harmful prompts", harmful)):
        for place, values in places.items():
            known = among & np.isfinite(values)
            rows.append(Row(name, place, Area.of(values[known & refuses], values[known & complies])))
    apart = None
    if threshold is not None:
        decided = np.flatnonzero(refuses | complies)
        apart = Rate.of(int(disagreement(read.prompt[i], threshold, bool(refuses[i])) is not None) for i in decided)
    counts = int(harmful.sum()), int((~harmful).sum()), int(refuses.sum()), int(complies.sum())
    return Detection(layer, *counts, len(outcomes) - counts[2] - counts[3], tuple(rows), threshold, apart)


def detection_text(found: Detection) -> str:
    """Returns what was measured, as a table and sentences."""
    lines = [
        f"Projections at the input of layer {found.layer}: {found.harmful} harmful and {found.harmless} harmless prompts; of the "
        f"replies {found.refusals} refuse, {found.compliant} comply, and {found.rest} do neither or are not decided.",
        "",
        f"{'finds':28} {'by the projection at':26} AUROC [95 % interval]",
    ]
    lines += [f"{row.finds:28} {row.reads:26} {row.area}" for row in found.rows]
    if found.apart is not None:
        low, high = found.apart.interval
        lines += [
            "",
            f"The prompt's end and the reply disagree in {found.apart.count} of {found.apart.n} decided replies ({low:.1%} to "
            f"{high:.1%}), with the threshold {found.threshold:+.2f}.",
        ]
    return "\n".join(lines) + "\n"

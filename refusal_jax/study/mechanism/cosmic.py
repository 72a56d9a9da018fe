"""Tells which direction COSMIC would select, which looks at activations and at no refusal token."""

import pathlib
import time

import numpy as np

from refusal_jax.judges.behaviours import REFUSAL, Behaviour
from refusal_jax.mechanism.cosmic import CosmicRule, cosine, cosmic_pick, cosmic_scores, distant_layers
from refusal_jax.mechanism.edited_prompts import planned_passes
from refusal_jax.plan.programs import Group, Program, Shapes
from refusal_jax.report.findings import Findings, Section
from refusal_jax.runs.artifacts import CANDIDATES, COSMIC, DIRECTION, FILTER, MEANS, METADATA, PROMPTS
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.stage import Stage
from refusal_jax.study.mechanism.shared import MechanismStudy
from refusal_jax.study.selection import PASS_INDUCE, PASS_KL


def compared_layers(study: MechanismStudy) -> tuple[int, ...]:
    """Returns the blocks whose outputs are compared, by the mean activations of the training prompts that the study has kept. The
    last block is left out: its output is no other block's input, and the study keeps these."""
    means = study.run.read_tensors(MEANS)
    return distant_layers(means["harmful"][-1, 1:], means["harmless"][-1, 1:], study.settings.cosmic.fraction)


def select(study: MechanismStudy, ledger: Ledger) -> None:
    """Writes the scores of the study's candidates, and the one that COSMIC selects."""
    begun, settings = time.monotonic(), study.config.select
    diffs_lpd = np.swapaxes(study.run.read_tensors(MEANS)["mean_diffs"], 0, 1)
    rule, layers = CosmicRule(settings.kl_threshold, settings.prune_fraction), compared_layers(study)
    known = {(row["position"], row["layer"]): row["kl_div_score"] for row in study.run.read_json(CANDIDATES)}
    rows = cosmic_scores(
        study.model,
        diffs_lpd,
        study.instructions("harmful_val"),
        study.instructions("harmless_val"),
        layers,
        rule=rule,
        rows=study.sizes.select,
        known_kl={place: kl for place, kl in known.items() if kl is not None},
        known=ledger.rows,
        save=ledger.append,
    )
    direction, pick = study.direction(), cosmic_pick(rows, rule)
    position, layer = direction.place
    found = {"layers": layers, "rows": rows, "pick": pick, "kl_threshold": rule.kl_threshold}
    found["selected"] = next((row for row in rows if (row["position"], row["layer"]) == (position, layer)), None)
    if pick is not None:
        found["cosine"] = float(cosine(diffs_lpd[pick["layer"], pick["position"]], direction.raw_d))
    study.run.write_json(COSMIC, found | {"seconds": time.monotonic() - begun})


def in_words(found: dict, of: Behaviour = REFUSAL) -> str:
    """Returns the selection in sentences."""
    blocks = ", ".join(map(str, sorted(found["layers"])))
    scored, pick = sum(row["score"] is not None for row in found["rows"]), found["pick"]
    if pick is None:
        most = found["kl_threshold"]
        return f"COSMIC selects nothing: every candidate changes {of.absent} prompts by a KL divergence above {most}."
    place = f"position {pick['position']}, layer {pick['layer']}"
    same = found["selected"] is not None and all(found["selected"][key] == pick[key] for key in ("position", "layer"))
    also = "the study's own direction" if same else f"at a cosine of {found['cosine']:.3f} with the study's direction"
    own = "" if same or not found["selected"] or found["selected"]["score"] is None else found["selected"]["score"]
    return (
        f"COSMIC selects {place}, {also}: score {pick['score']:.3f} of 2, from activations after block"
        f"{'s' if len(found['layers']) > 1 else ''} {blocks}, without {of.tokens} ({scored} candidates scored)."
        + (f" The study's direction has {own:.3f}." if own != "" else "")
    )


def lines(findings: Findings) -> list[str]:
    """Returns the selection for a terminal."""
    return ["", in_words(findings.run.read_json(COSMIC), findings.behaviour)]


def programs(shapes: Shapes, rows: int) -> list[Program]:
    """Returns the passes of validation prompts under one edit after another, for `plan`."""
    work = shapes.work
    layers = CosmicRule(prune_fraction=work.config.select.prune_fraction).layers(work.cfg.n_layers)
    candidates = layers * work.positions * (PASS_INDUCE + 2 * PASS_KL)
    return [planned_passes("edited prompts", shapes, rows, work.config.data.n_val, candidates, read=1)]


STAGE = Stage(
    "cosmic",
    select,
    reads=(PROMPTS, FILTER, MEANS, CANDIDATES, METADATA, DIRECTION),
    writes=(COSMIC,),
    given=lambda study: study.settings.cosmic.to_dict(),
    programs=Group("cosmic", "select", programs, assumed="as many candidates pass the KL threshold as in selection"),
    about="Selects a direction without refusal tokens, by the similarity of activations (COSMIC).",
    section=Section(
        pathlib.Path(__file__).with_name("cosmic.html.jinja"),
        {"cosmic": "Selection without tokens"},
        lambda findings: {"cosmic": findings.run.read_json(COSMIC), "words": lines(findings)[1]},
        lines=lines,
        of_direction=True,
        needs=(COSMIC,),
    ),
)

"""Projections of the validation prompts on the selected direction, at every layer."""

import pathlib
from collections.abc import Callable

import numpy as np

from refusal_jax.chat.batches import length_batches
from refusal_jax.chat.projection_monitor import midpoint
from refusal_jax.chat.replies import compiled
from refusal_jax.chat.residuals import project
from refusal_jax.edits import EPS
from refusal_jax.models.finite import check_finite
from refusal_jax.report.concerns import auc, weak_separation
from refusal_jax.report.findings import Findings, Section
from refusal_jax.report.page import plain
from refusal_jax.report.verdict import Concern
from refusal_jax.runs.artifacts import DIRECTION, MEANS, METADATA, PROJECTIONS, PROMPTS
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.run import MANIFEST, Run, read_manifest
from refusal_jax.runs.stage import Stage
from refusal_jax.study.shared import Study

SHOWN = ("harmful_val", "harmless_val")  # the splits that are projected


def project_prompts(study: Study, ledger: Ledger) -> None:
    """Writes every val prompt's residual at the last token along the direction, at each block's input."""
    direction = study.direction().raw_d.astype(np.float32)
    unit = np.asarray(direction / (np.linalg.norm(direction) + EPS), np.float32)
    along = {}
    for split in SHOWN:
        texts = study.instructions(split, kept_only=False)
        along[split] = np.zeros((len(texts), study.model.config.n_layers), np.float32)
        for index, batch in length_batches(study.model, texts, study.batches):
            values = project(study.model.decoder, *study.model.put(batch.tokens, batch.mask), unit[None, None])
            along[split][index] = np.asarray(values)[: len(index), :, 0, 0]
            finite = np.isfinite(along[split][index]).all(axis=1)
            check_finite(finite, study.model.decoder.dtype, f"The projections of {split} cannot be read")
    study.run.write_tensors(PROJECTIONS, along)


def compile_projections(study: Study) -> Callable[[], None]:
    """Returns what compiles the programs of the projections, whose shapes are the same for any direction."""
    model, stand_in = study.model, np.zeros((1, 1, study.model.config.d_model), np.float32)
    texts = (study.instructions(split, kept_only=False) for split in SHOWN)
    batches = [batch for part in texts for _, batch in length_batches(model, part, study.batches)]

    def work() -> None:
        for batch in {batch.tokens.shape: batch for batch in batches}.values():
            compiled(project, model.decoder, *model.put(batch.tokens, batch.mask), stand_in)

    return work


def study_thresholds(folder: pathlib.Path) -> np.ndarray | None:
    """Returns each layer's projection halfway between a finished study's harmful and harmless validation prompts, `[L]`; None if
    it has not measured them. Raises UserError for a damaged folder."""
    run = Run(folder, read_manifest(folder / MANIFEST))
    if not run.exists(PROJECTIONS):
        return None
    along = run.read_tensors(PROJECTIONS)
    return midpoint(along["harmful_val"], along["harmless_val"])


def values(findings: Findings) -> dict:
    """Returns what the report shows of the geometry."""
    pick, along = findings.direction, findings.run.read_tensors(PROJECTIONS)
    assert pick is not None
    layer = pick.place[1]
    return {"pick": pick, "auc": auc(along["harmful_val"][:, layer], along["harmless_val"][:, layer])}


def pictures(findings: Findings) -> list:
    """Returns the figures of the similarities of candidates, and of the projections."""
    from refusal_jax.report import figures  # imports matplotlib, which the other stages need not pay for

    pick, along = findings.direction, findings.run.read_tensors(PROJECTIONS)
    assert pick is not None
    tokens = [plain(token["text"]) for token in findings.setup["post_instruction_tokens"]]
    return [
        *figures.cosine_figures(findings.run.read_tensors(MEANS)["mean_diffs"], tokens, pick),
        figures.projection_figure(along["harmful_val"], along["harmless_val"], pick, findings.behaviour.sides),
    ]


def concerns(findings: Findings) -> list[Concern]:
    """Returns whether the direction hardly separates the validation prompts."""
    assert findings.direction is not None
    return weak_separation(findings.run.read_tensors(PROJECTIONS), findings.direction.place[1], findings.behaviour)


STAGE = Stage(
    "projections",
    project_prompts,
    reads=(PROMPTS, METADATA, DIRECTION),
    writes=(PROJECTIONS,),
    skipped=lambda study: study.without_direction,
    ahead=compile_projections,
    section=Section(
        pathlib.Path(__file__).with_name("projections.html.jinja"),
        {"geometry": "Geometry"},
        values,
        concerns=concerns,
        of_direction=True,
        pictures=pictures,
    ),
)

"""Tells where prompts lie in the residual stream at a few layers, as their first two principal components."""

import pathlib

import jax.numpy as jnp
import numpy as np

from refusal_jax.mechanism.activations import activations, residuals_at
from refusal_jax.mechanism.components import components_of
from refusal_jax.plan.programs import Group, Program, Shapes
from refusal_jax.report.concerns import auc
from refusal_jax.report.findings import Findings, Section
from refusal_jax.runs.artifacts import DIRECTION, METADATA, PROMPTS, SCATTER, SCATTER_POINTS, SETUP
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.stage import Stage
from refusal_jax.study.mechanism.shared import MechanismStudy
from refusal_jax.study.mechanism.suffixes import scores_of
from refusal_jax.taps import Taps

HARMFUL, HARMLESS = "harmful", "harmless"


def layers_shown(n_layers: int, panels: int, layer: int) -> list[int]:
    """Returns the numbers of at most so many layers, evenly spread to the last, of which the nearest is replaced by `layer`."""
    spread = np.unique(
        np.linspace(min(1, n_layers - 1), n_layers - 1, max(1, min(panels, n_layers))).round().astype(int)
    )
    spread[np.abs(spread - layer).argmin()] = layer
    return sorted({*spread.tolist()})


def scatter(study: MechanismStudy, ledger: Ledger) -> None:
    """Writes the principal components of the training and test prompts at the last token."""
    direction_d = study.direction().raw_d
    unit_d = direction_d / np.linalg.norm(direction_d)
    layers = layers_shown(study.model.config.n_layers, study.settings.scatter.panels, study.direction().place[1])
    splits = [f"{side}_{part}" for side in (HARMFUL, HARMLESS) for part in ("train", "test")]
    splits += [f"{name}_test" for name in study.over_refusal]
    texts = {split: study.instructions(split, kept_only=False) for split in splits}
    places = [(-1, layer) for layer in layers]
    points_nkd = np.concatenate([activations(study.model, of, places, study.sizes.forward) for of in texts.values()])
    found = [components_of(points_nkd[:, k]) for k in range(len(layers))]
    harmful_n = np.concatenate([np.full(len(of), split.startswith(f"{HARMFUL}_")) for split, of in texts.items()])
    rows = [
        {
            "layer": layer,
            "shares": one.shares_c.tolist(),
            "direction": float(((one.axes_cd @ unit_d) ** 2).sum()),
            "areas": [auc(values[harmful_n], values[~harmful_n]) for values in one.along_nc.T],
        }
        for layer, one in zip(layers, found, strict=True)
    ]
    known = bool(study.refusal_ids())
    counts = {split: len(of) for split, of in texts.items()}
    study.run.write_json(SCATTER, {"layers": rows, "splits": counts, "scores": known})
    tensors = {
        "components": np.stack([one.along_nc for one in found]),
        "axes": np.stack([one.axes_cd for one in found]),
        "scores": np.concatenate([scores_of(study, of, f"scatter: {split}") for split, of in texts.items()])
        if known
        else np.zeros(0),
    }
    study.run.write_tensors(SCATTER_POINTS, {name: values.astype(np.float32) for name, values in tensors.items()})


def lines(findings: Findings) -> list[str]:
    """Returns the shares of variance for a terminal."""
    out = ["", "Principal components of the last token's residual, training and test prompts:"]
    for row in findings.run.read_json(SCATTER)["layers"]:
        first, second = (100 * share for share in row["shares"])
        out.append(
            f"  layer {row['layer']}: {first:.0f} and {second:.0f} % of the variance; {100 * row['direction']:.0f} % of the "
            "direction lies in their plane"
        )
    return out


def pictures(findings: Findings) -> list:
    """Returns the panels of all layers."""
    from refusal_jax.report import scatter_figures  # imports matplotlib, which the other stages need not pay for

    found, arrays = findings.run.read_json(SCATTER), findings.run.read_tensors(SCATTER_POINTS)
    assert findings.direction is not None
    names = [split for split, count in found["splits"].items() for _ in range(count)]
    refused = arrays["scores"] > 0 if found["scores"] else None
    unit_d = findings.direction.raw_d / findings.direction.norm
    panels = [
        scatter_figures.Panel(row["layer"], tuple(row["shares"]), along_nc, axes_cd @ unit_d)
        for row, along_nc, axes_cd in zip(found["layers"], arrays["components"], arrays["axes"], strict=True)
    ]
    return [scatter_figures.scatter_figure(panels, names, refused, findings.behaviour)]


def programs(shapes: Shapes, rows: int) -> list[Program]:
    """Returns the pass over the training and test prompts, for `plan`."""
    work, shown = shapes.work, min(shapes.work.cfg.n_layers, 6)

    def lower():
        where = [shapes.array((shown,), jnp.int32) for _ in range(2)]
        return residuals_at.lower(
            shapes.decoder, *shapes.prompts(rows), shapes.edits(rows), *where, Taps(("resid_pre",), 1)
        )

    data = work.config.data
    runs = 2 * -(-data.n_train // rows) + (2 + len(data.over_refusal)) * -(-data.n_test // rows)
    return [Program("scatter", lower, runs, rows, work.length, work.cfg.n_layers)]


STAGE = Stage(
    "scatter",
    scatter,
    reads=(PROMPTS, SETUP, METADATA, DIRECTION),
    writes=(SCATTER, SCATTER_POINTS),
    given=lambda study: study.settings.scatter.to_dict(),
    programs=Group("scatter", "forward", programs),
    section=Section(
        pathlib.Path(__file__).with_name("scatter.html.jinja"),
        {"scatter": "Scatter"},
        lambda findings: {"scatter": findings.run.read_json(SCATTER)},
        lines=lines,
        of_direction=True,
        needs=(SCATTER, SCATTER_POINTS),
        pictures=pictures,
    ),
    about="Shows where prompts lie in the residual stream at a few layers, along their principal components.",
)

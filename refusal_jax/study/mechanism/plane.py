"""Tells what a model takes a request for, at the instruction's end, against whether it refuses it, at the template's end."""

import pathlib
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from refusal_jax.chat.residuals import extract
from refusal_jax.conditions import Ablate, Add, Baseline, Intervention
from refusal_jax.judges.areas import Area
from refusal_jax.judges.behaviours import REFUSAL as REFUSED
from refusal_jax.judges.behaviours import Behaviour
from refusal_jax.judges.separation import Estimate
from refusal_jax.judges.statistics import PairedRates, Rate, bounded, mean_interval, paired_mean
from refusal_jax.mechanism.plane import (
    INSTRUCTION_END,
    TEMPLATE_END,
    Ends,
    Moved,
    project_ends,
    read_ends,
    unit_rows,
    without,
)
from refusal_jax.plan.programs import Group, Program, Shapes
from refusal_jax.report.findings import Findings, Section
from refusal_jax.report.summary import signed, with_interval
from refusal_jax.runs.artifacts import DIRECTION, MEANS, METADATA, PLANE, PLANE_POINTS, PROMPTS, SETUP
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.stage import Stage
from refusal_jax.study.mechanism.shared import MechanismStudy

HARMFUL, HARMLESS = "harmful", "harmless"
HARMFULNESS, REFUSAL, REST = AXES = (
    "harmfulness",
    "refusal",
    "rest",
)  # the directions that are read along, in this order
PLACES = {HARMFULNESS: INSTRUCTION_END, REFUSAL: TEMPLATE_END, REST: INSTRUCTION_END}
SEPARATES = 0.7  # area below which the instruction's end does not tell harmful from harmless prompts
HALF = 0.5  # of a distance, to call most of it kept or lost
FEW = 5  # prompts of each group, to compare two groups


def axes_in_words(of: Behaviour) -> dict[str, str]:
    """Returns what the directions are called in a study of a behaviour."""
    return {
        HARMFULNESS: f"{of.contrast}, instruction's end",
        REST: "the same without the ablated direction",
        REFUSAL: f"{of.name}, template's end",
    }


def skipped(study: MechanismStudy) -> str:
    """Returns why the plane cannot be drawn, "" if it can."""
    return study.without_tokens


def read(study: MechanismStudy, title: str, texts: Sequence[str], kind: type[Intervention], units_jld) -> Ends:
    """Returns what is read of prompts under an intervention with the study's direction. title: whether they are harmful."""
    edits = kind.of(study.direction(), title == HARMFUL).edits(study.model.config)
    shown = f"plane: {title}, {kind.name}"
    return read_ends(study.model, texts, edits, units_jld, study.refusal_ids(), study.sizes.forward, shown)


def measure(study: MechanismStudy, ledger: Ledger) -> None:
    """Writes the directions of both places, every test prompt's projections on them, and what follows from these."""
    last = len(study.model.chat.post_instruction_ids) + 1
    means_ld = {}
    for side in (HARMFUL, HARMLESS):
        texts, title = study.instructions(f"{side}_train", kept_only=False), f"plane: {side}_train"
        found = extract(study.model, texts, study.refusal_ids(), last, 0, study.sizes.forward, title)
        means_ld[side] = found.mean_lpd[:, 0]
    harmfulness_ld = means_ld[HARMFUL] - means_ld[HARMLESS]
    refusal_ld = study.run.read_tensors(MEANS)["mean_diffs"][-1].astype(np.float64)
    rest_ld = without(harmfulness_ld, study.direction().raw_d)
    units_jld = unit_rows(np.stack([harmfulness_ld, refusal_ld, rest_ld]))
    val = [
        read(study, s, study.instructions(f"{s}_val", kept_only=False), Baseline, units_jld)
        for s in (HARMFUL, HARMLESS)
    ]
    points: dict[str, dict[str, Ends]] = {}
    for name in (HARMFUL, HARMLESS, *study.over_refusal):
        texts = study.instructions(f"{name}_test", kept_only=False)
        kinds = (Baseline, Ablate) if name != HARMLESS else (Baseline, Ablate, Add)
        points[name] = {kind.name: read(study, name, texts, kind, units_jld) for kind in kinds}
    layers = {HARMFULNESS: clearest(*(one.along_nlpj[:, :, INSTRUCTION_END, 0] for one in val))}
    layers |= {REFUSAL: study.direction().place[1], REST: layers[HARMFULNESS]}
    study.run.write_json(PLANE, summary(points, layers, study.behaviour) | cosines(units_jld, study.direction().raw_d))
    arrays = {"harmfulness": harmfulness_ld, "refusal": refusal_ld}
    for name, by in points.items():
        for kind, one in by.items():
            along = {axis: one.along_nlpj[:, :, PLACES[axis], j] for j, axis in enumerate(AXES)}
            arrays |= {f"{name}.{kind}.{axis}": values for axis, values in along.items()}
            arrays[f"{name}.{kind}.scores"] = one.scores_n
    study.run.write_tensors(PLANE_POINTS, {name: np.asarray(values, np.float32) for name, values in arrays.items()})


def clearest(harmful_nl: np.ndarray, harmless_nl: np.ndarray) -> int:
    """Returns the layer at which a harmful prompt most often lies above a harmless one; of equals, that where their means lie
    most standard deviations apart."""
    areas = [Area.of(above, below).area for above, below in zip(harmful_nl.T, harmless_nl.T, strict=True)]
    spread_l = np.sqrt((harmful_nl.var(axis=0) + harmless_nl.var(axis=0)) / 2)
    gap_l = harmful_nl.mean(axis=0) - harmless_nl.mean(axis=0)
    apart_l = np.divide(gap_l, spread_l, out=np.zeros_like(gap_l), where=spread_l > 0)
    return max(range(len(areas)), key=lambda layer: (areas[layer], apart_l[layer]))


def cosines(units_jld: np.ndarray, direction_d: np.ndarray) -> dict:
    """Returns the cosines of the two directions with each other and with the study's, by layer; None where one is zero."""
    unit_d = unit_rows(direction_d)
    first, second = units_jld[0], units_jld[1]

    def listed(values_l: np.ndarray, *vectors: np.ndarray) -> list:
        known_l = np.all([np.linalg.norm(v, axis=-1) > HALF for v in vectors], axis=0)
        return [float(value) if known else None for value, known in zip(values_l, known_l, strict=True)]

    return {
        "cosine": listed((first * second).sum(axis=-1), first, second),
        "cosine_with_direction": {
            HARMFULNESS: listed(first @ unit_d, first),
            REFUSAL: listed(second @ unit_d, second),
        },
    }


def along(points: Mapping[str, Mapping[str, Ends]], name: str, kind: str, axis: str) -> np.ndarray:
    """Returns the projections of a set of prompts under an intervention on one of the directions, at its place, `[n, L]`."""
    return points[name][kind].along_nlpj[:, :, PLACES[axis], AXES.index(axis)].astype(np.float64)


def summary(points: Mapping[str, Mapping[str, Ends]], layers: Mapping[str, int], of: Behaviour = REFUSED) -> dict:
    """Returns the numbers of the report. layers: the layer at which each direction is looked at."""
    effects = {}
    for axis in AXES:
        sides = [
            (
                along(points, name, Baseline.name, axis)[:, layers[axis]],
                along(points, name, Ablate.name, axis)[:, layers[axis]],
            )
            for name in (HARMFUL, HARMLESS)
        ]
        effects[axis] = moved_row(Moved.of(sides[0], sides[1]))
        effects[axis]["added"] = added_row(points, axis)
    refused = {}
    for name, by in points.items():
        before, *after = (one.refused_n.astype(int).tolist() for one in by.values())
        pairs = {kind: PairedRates.of(before, labels) for kind, labels in zip([*by][1:], after, strict=True)}
        refused[name] = {Baseline.name: bounded(Rate.of(before).row)}
        refused[name] |= {
            kind: bounded(pair.second.row)
            | {"change": {"mean": pair.difference, "low": pair.interval[0], "high": pair.interval[1]}}
            for kind, pair in pairs.items()
        }
    found = {
        "layers": dict(layers),
        "areas": areas_by_layer(points),
        "groups": groups_of(points, layers),
        "within": within(points, layers),
        "effects": effects,
        "refused": refused,
    }
    return found | {"verdict": verdict(found, of)}


def added_row(points, axis: str) -> dict | None:
    """Returns by how many distances between harmful and harmless prompts addition moves harmless ones along a direction, at the
    input of the last block, which is after the addition; None where there is no distance."""
    harmful_n, before_n, after_n = (
        along(points, name, kind, axis)[:, -1]
        for name, kind in ((HARMFUL, Baseline.name), (HARMLESS, Baseline.name), (HARMLESS, Add.name))
    )
    gap = harmful_n.mean() - before_n.mean()
    return bounded(paired_mean(before_n / gap, after_n / gap)) if gap else None


def row_of(estimate: Estimate) -> dict:
    """Returns an estimate for a file."""
    return bounded({"mean": estimate.value, "low": estimate.low, "high": estimate.high})


def moved_row(moved: Moved) -> dict:
    """Returns for a file how ablation moves the prompts along a direction."""
    return {
        "gap": row_of(moved.gap[0]),
        "gap_ablated": row_of(moved.gap[1]),
        "kept": row_of(moved.kept),
        "area": row_of(moved.area[0]),
        "area_ablated": row_of(moved.area[1]),
        "area_change": row_of(moved.change),
    }


def area_row(found: np.ndarray, others: np.ndarray) -> dict:
    """Returns an area with its interval, for a file; None where a group has no prompt."""
    area = Area.of(found, others)
    return bounded({"mean": area.area, "low": area.low, "high": area.high})


def areas_by_layer(points) -> dict:
    """Returns how well each place tells harmful from harmless test prompts, by layer, without an edit and under ablation."""
    found: dict = {}
    for axis in AXES:
        for kind in (Baseline.name, Ablate.name):
            above, below = (along(points, name, kind, axis) for name in (HARMFUL, HARMLESS))
            rows = [area_row(a, b) for a, b in zip(above.T, below.T, strict=True)]
            found.setdefault(axis, {})[kind] = rows
    return found


def groups_of(points, layers: Mapping[str, int]) -> list[dict]:
    """Returns the mean projections of refused and of answered prompts of each set, without an edit."""
    rows = []
    for name, by in points.items():
        for refused in (True, False):
            chosen = by[Baseline.name].refused_n == refused
            means = {
                axis: bounded(mean_interval(along(points, name, Baseline.name, axis)[chosen, layers[axis]]))
                for axis in (HARMFULNESS, REFUSAL)
            }
            rows.append({"dataset": name, "refused": refused, "n": int(chosen.sum()), **means})
    return rows


def within(points, layers: Mapping[str, int]) -> dict:
    """Returns how well harmfulness tells harmful from harmless prompts among those that are refused, and how well refusal tells
    refused from answered ones among those that are harmful; None where a group has too few prompts."""
    refused = {name: by[Baseline.name].refused_n for name, by in points.items()}
    at = {
        axis: {name: along(points, name, Baseline.name, axis)[:, layers[axis]] for name in points}
        for axis in (HARMFULNESS, REFUSAL)
    }
    others = [name for name in points if name != HARMFUL]
    pairs = {
        "harmfulness_of_refused": (
            at[HARMFULNESS][HARMFUL][refused[HARMFUL]],
            np.concatenate([at[HARMFULNESS][name][refused[name]] for name in others]),
        ),
        "refusal_of_harmful": (at[REFUSAL][HARMFUL][refused[HARMFUL]], at[REFUSAL][HARMFUL][~refused[HARMFUL]]),
    }
    return {
        name: area_row(*pair) | {"n": len(pair[0]), "m": len(pair[1])} if min(map(len, pair)) >= FEW else None
        for name, pair in pairs.items()
    }


def verdict(found: dict, of: Behaviour = REFUSED) -> str:
    """Returns whether ablation moves what the model judges or only what it says, in words, as far as intervals tell."""
    seen, kept = (found["effects"][HARMFULNESS][name] for name in ("area", "kept"))
    if seen["low"] <= SEPARATES:
        return (
            f"At the instruction's end {of.present} and {of.absent} prompts are not told apart clearly, so that nothing can be "
            "said about what the model judges."
        )
    left = (
        f"of the distance between {of.present} and {of.absent} prompts at the instruction's end {percent(kept)} is left, and "
        f"{percent(found['effects'][REST]['kept'])} of the part of it that is not along the ablated direction"
    )
    if found["refused"][HARMFUL][Ablate.name]["change"]["high"] >= 0:
        return f"Ablation does not end {of.cases} for certain; {left}."
    if kept["low"] > HALF:
        return f"Ablation changes what the model says more than what it judges: {of.cases} end, and {left}."
    if kept["high"] < HALF:
        return f"Ablation changes what the model judges, too: {of.cases} end, and {left}."
    return f"Ablation ends {of.cases}; whether it changes what the model judges is open: {left}."


def percent(row: Mapping[str, float]) -> str:
    """Returns a share with its interval, in words."""
    mean, low, high = (round(100 * row[key]) for key in ("mean", "low", "high"))
    return f"{mean} % ({low} to {high})"


def lines(findings: Findings) -> list[str]:
    """Returns the numbers for a terminal."""
    found, of = findings.run.read_json(PLANE), findings.behaviour
    layers = found["layers"]
    out = ["", f"{of.contrast.capitalize()} and {of.name}: {found['verdict']}"]
    for axis, words in axes_in_words(of).items():
        row = found["effects"][axis]
        area = f"area {row['area']['mean']:.3f} ({row['area']['low']:.3f} to {row['area']['high']:.3f})"
        out.append(
            f"  {words + f', layer {layers[axis]}:':<50}{area}, ablated {row['area_ablated']['mean']:.3f}, change "
            f"{with_interval(row['area_change'])}; distance kept {percent(row['kept'])}"
        )
    cosine = found["cosine"][layers[HARMFULNESS]]
    out.append(
        f"  Cosine of the two at layer {layers[HARMFULNESS]}: {'not defined' if cosine is None else signed(cosine)}"
    )
    return out


def values(findings: Findings) -> dict:
    """Returns what the report shows in tables."""
    return {"plane": findings.run.read_json(PLANE), "axes": axes_in_words(findings.behaviour), "percent": percent}


def pictures(findings: Findings) -> list:
    """Returns the plane without an edit and under ablation, and the separations and cosines by layer."""
    from refusal_jax.report import plane_figures  # imports matplotlib, which the other stages need not pay for

    found, arrays = findings.run.read_json(PLANE), findings.run.read_tensors(PLANE_POINTS)
    of, at = findings.behaviour, {axis: found["layers"][axis] for axis in (HARMFULNESS, REFUSAL)}
    words = axes_in_words(of)
    points = [
        plane_figures.Points(
            name,
            kind,
            arrays[f"{name}.{kind}.{HARMFULNESS}"][:, at[HARMFULNESS]],
            arrays[f"{name}.{kind}.{REFUSAL}"][:, at[REFUSAL]],
            arrays[f"{name}.{kind}.scores"] > 0,
        )
        for name in found["refused"]
        for kind in (Baseline.name, Ablate.name)
    ]
    shown = {(words[axis], kind): rows for axis, by in found["areas"].items() for kind, rows in by.items()}
    with_direction = found["cosine_with_direction"]
    return [
        plane_figures.plane_figure(points, of),
        plane_figures.areas_figure(shown, of),
        plane_figures.cosines_figure(
            {
                f"{of.contrast} with {of.name}": found["cosine"],
                f"{of.contrast} with the study's direction": with_direction[HARMFULNESS],
                f"{of.name} with the study's direction": with_direction[REFUSAL],
            },
            found["layers"][REFUSAL],
            of,
        ),
    ]


def programs(shapes: Shapes, rows: int) -> list[Program]:
    """Returns the pass over the test prompts under each intervention, for `plan`."""
    work, tokens = shapes.work, shapes.work.positions + 1

    def lower():
        units = shapes.array((len(AXES), work.cfg.n_layers, work.cfg.d_model), jnp.float32)
        inputs = *shapes.prompts(rows), shapes.edits(rows), units, shapes.array((1,), jnp.int32)
        return project_ends.lower(shapes.decoder, *inputs, tokens)

    data = work.config.data
    runs = -(-data.n_test // rows) * (5 + 2 * len(data.over_refusal)) + 2 * -(-data.n_val // rows)
    return [Program("plane", lower, runs, rows, work.length, work.cfg.n_layers)]


STAGE = Stage(
    "plane",
    measure,
    reads=(PROMPTS, SETUP, MEANS, METADATA, DIRECTION),
    writes=(PLANE, PLANE_POINTS),
    skipped=skipped,
    programs=Group("plane", "forward", programs),
    about="Compares what the model takes a request for, at its end, with whether it refuses it, at the template's end.",
    section=Section(
        pathlib.Path(__file__).with_name("plane.html.jinja"),
        {"plane": "{of.contrast}"},
        values,
        lines=lines,
        of_direction=True,
        needs=(PLANE, PLANE_POINTS),
        pictures=pictures,
    ),
)

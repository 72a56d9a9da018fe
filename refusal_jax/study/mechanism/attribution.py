"""Tells what writes the last token's component along the direction, with and without a suffix: the paper's figures 5 and 6a."""

import dataclasses
import math
import pathlib

import jax.numpy as jnp
import numpy as np

from refusal_jax.judges.statistics import bounded, mean_interval, paired_mean
from refusal_jax.mechanism.attribution import SITES, Attribution, attribute, attribute_batch
from refusal_jax.mechanism.suffixes import GROUPS, HARMFUL, RANDOM, SUFFIXED, groups_in_words
from refusal_jax.plan.programs import Group, Program, Shapes
from refusal_jax.report.findings import Findings, Section
from refusal_jax.report.summary import signed, with_interval
from refusal_jax.runs.artifacts import ATTRIBUTED, ATTRIBUTION, DIRECTION, METADATA, SETUP, SUFFIXES
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.stage import Stage
from refusal_jax.study.mechanism.shared import MechanismStudy
from refusal_jax.study.mechanism.suffixes import rows_of, without_rows
from refusal_jax.taps import Taps

COMPARED = (SUFFIXED, RANDOM)  # with the prompts without a suffix, in pairs


def attribute_rows(study: MechanismStudy, ledger: Ledger) -> None:
    """Writes every prompt's attribution along the direction, and what follows from them."""
    rows, direction = rows_of(study), study.direction()
    prompts = [row.text for row in rows]
    found = attribute(study.model, prompts, direction.raw_d, study.sizes.forward, "attribution")
    groups = {group: found.take([i for i, row in enumerate(rows) if row.group == group]) for group in GROUPS}
    arrays = {
        f"{group}.{name}": np.asarray(getattr(of, name), np.float32)
        for group, of in groups.items()
        for name in ("embed", "heads", "bias", "mlp", "along", "norm")
    }
    study.run.write_tensors(ATTRIBUTED, arrays)
    study.run.write_json(ATTRIBUTION, summary(groups, study.settings.attribution.heads))


def programs(shapes: Shapes, rows: int) -> list[Program]:
    """Returns the pass over all rows of the suffix study, for `plan`."""
    work = shapes.work
    prompts = min(work.further.suffixes.n_prompts, work.config.data.n_test)
    along = shapes.array((rows, work.cfg.d_model), jnp.float32, "batch")

    def lower():
        taps = dataclasses.replace(Taps(SITES, 1), along=along)
        return attribute_batch.lower(shapes.decoder, *shapes.prompts(rows), shapes.edits(rows), taps)

    runs = math.ceil(len(GROUPS) * prompts / rows)
    return [Program("attribution", lower, runs, rows, work.length, work.cfg.n_layers)]


def summary(groups: dict[str, Attribution], n_heads: int) -> dict:
    """Returns the numbers of the report: means and spreads of cosines by layer, their paired changes, the heads that write most
    for harmful prompts, and what the parts write in sum."""
    mean_ln = np.asarray(groups[HARMFUL].heads, np.float64).mean(axis=0)
    order = np.argsort(-mean_ln, axis=None, kind="stable")[:n_heads]
    top = [tuple(map(int, np.unravel_index(place, mean_ln.shape))) for place in order]
    by_head = {
        group: np.stack([np.asarray(of.heads, np.float64)[:, layer, head] for layer, head in top], axis=1)
        for group, of in groups.items()
    }
    return {
        "cosines": {
            group: {
                "mean": of.cosines.mean(axis=0).tolist(),
                "sd": of.cosines.std(axis=0, ddof=len(of.embed) > 1).tolist(),
            }
            for group, of in groups.items()
            if len(of.embed)
        },
        "cosine_changes": {group: changes(groups[HARMFUL].cosines, groups[group].cosines) for group in COMPARED},
        "heads": [
            {
                "layer": layer,
                "head": head,
                "written": {group: bounded(mean_interval(values[:, i])) for group, values in by_head.items()},
                "changes": {
                    group: bounded(paired_mean(by_head[HARMFUL][:, i], by_head[group][:, i])) for group in COMPARED
                },
            }
            for i, (layer, head) in enumerate(top)
        ],
        "heads_together": {
            "written": {group: bounded(mean_interval(values.sum(axis=1))) for group, values in by_head.items()},
            "changes": {
                group: bounded(paired_mean(by_head[HARMFUL].sum(axis=1), by_head[group].sum(axis=1)))
                for group in COMPARED
            },
        },
        "parts": {group: part_means(of) for group, of in groups.items() if len(of.embed)},
        "largest_error": float(max(np.abs(of.off).max(initial=0.0) for of in groups.values())),
    }


def changes(first_nl: np.ndarray, second_nl: np.ndarray) -> list[dict]:
    """Returns the paired change of each layer."""
    return [bounded(paired_mean(first, second)) for first, second in zip(first_nl.T, second_nl.T, strict=True)]


def part_means(of: Attribution) -> dict[str, float]:
    """Returns what each kind of part writes along the direction, summed over layers, as means over prompts, and their whole."""
    sums = {"embedding": of.embed, "heads": of.heads, "biases": of.bias, "MLPs": of.mlp, "whole": of.along[:, -1]}
    return {
        name: float(np.asarray(part, np.float64).reshape(len(of.embed), -1).sum(axis=1).mean())
        for name, part in sums.items()
    }


def head_name(row: dict) -> str:
    """Returns the name of a head, such as 3.0 for head 0 of layer 3."""
    return f"{row['layer']}.{row['head']}"


def lines(findings: Findings) -> list[str]:
    """Returns the numbers for a terminal."""
    found, direction = findings.run.read_json(ATTRIBUTION), findings.direction
    assert direction is not None
    layer, together, words = direction.place[1], found["heads_together"], groups_in_words(findings.behaviour)
    out = [
        "",
        f"Attribution along the direction, at the last token (parts sum to it within {found['largest_error']:.1g}):",
    ]
    out.append(
        f"  Cosine at layer {layer}, where the direction was found; and what the top {len(found['heads'])} heads write"
    )
    out.append(f"  ({', '.join(map(head_name, found['heads']))}):")
    for group in GROUPS:
        if group not in found["cosines"]:
            continue
        cosine, written = found["cosines"][group]["mean"][layer], together["written"][group]
        line = f"  {words[group] + ':':<30}cosine {signed(cosine, 2)}"
        change = found["cosine_changes"].get(group)
        line += f", change {with_interval(change[layer], 2)}" if change else ""
        line += f"; heads {signed(written['mean'], 2)}"
        change = together["changes"].get(group)
        out.append(line + (f", change {with_interval(change, 2)}" if change else ""))
    return out


def values(findings: Findings) -> dict:
    """Returns what the report shows in a table of the heads."""
    found, direction = findings.run.read_json(ATTRIBUTION), findings.direction
    assert direction is not None
    return {
        "attribution": found,
        "compared": COMPARED,
        "words": groups_in_words(findings.behaviour),
        "groups": shown_groups(found),
        "head_name": head_name,
        "layer": direction.place[1],
    }


def shown_groups(found: dict) -> list[str]:
    """Returns the groups that have prompts."""
    return [group for group in GROUPS if group in found["cosines"]]


def pictures(findings: Findings) -> list:
    """Returns the figures of the cosines, of the heads that write most, and of all heads."""
    from refusal_jax.report import figures, suffix_figures  # import matplotlib, which the other stages need not pay for

    found, arrays = findings.run.read_json(ATTRIBUTION), findings.run.read_tensors(ATTRIBUTED)
    assert findings.direction is not None
    groups, words = shown_groups(found), groups_in_words(findings.behaviour)
    mean_nl = {group: arrays[f"{group}.heads"].astype(np.float64).mean(axis=0).T for group in groups}
    grids = {
        "grid": (f"What each head writes along the direction for {words[HARMFUL]} prompts", mean_nl[HARMFUL]),
        "change": ("Change of what each head writes by the suffix", mean_nl[SUFFIXED] - mean_nl[HARMFUL]),
    }
    most = max(np.abs(values).max() for _, values in grids.values())
    scale = figures.Scale("RdBu_r", figures.Normalize(-most, most), 0.0, 1)
    columns = ("head", "layer", "written [residual units]")
    return [
        suffix_figures.cosine_figure(
            {words[group]: found["cosines"][group]["mean"] for group in groups},
            {words[group]: found["cosines"][group]["sd"] for group in groups},
            findings.direction.place[1],
        ),
        suffix_figures.heads_figure(
            [head_name(row) for row in found["heads"]],
            {words[group]: [row["written"][group] for row in found["heads"]] for group in groups},
        ),
        *(
            figures.heatmap(
                f"attribution-{name}", label, grid, list(map(str, range(len(grid)))), scale, None, columns=columns
            )
            for name, (label, grid) in grids.items()
        ),
    ]


STAGE = Stage(
    "attribution",
    attribute_rows,
    reads=(SUFFIXES, SETUP, METADATA, DIRECTION),
    writes=(ATTRIBUTED, ATTRIBUTION),
    skipped=without_rows,
    given=lambda study: study.settings.attribution.to_dict(),
    programs=Group("attribution", "forward", programs),
    about="Shows which heads and MLPs write along the direction, with and without the suffix (figures 5 and 6a of the paper).",
    section=Section(
        pathlib.Path(__file__).with_name("attribution.html.jinja"),
        {"attribution": "Attribution"},
        values,
        lines=lines,
        of_direction=True,
        needs=(ATTRIBUTION, ATTRIBUTED),
        pictures=pictures,
    ),
)

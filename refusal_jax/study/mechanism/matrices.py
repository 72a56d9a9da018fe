"""Directions of other prompts, such as other languages, and of other models: how alike they are, and whose refusals each
carries."""

import pathlib
from collections.abc import Sequence

import numpy as np

from refusal_jax.chat.refusal_tokens import SAMPLE, Opening, measure_openings
from refusal_jax.edits import Edits
from refusal_jax.judges.behaviours import REFUSAL, Behaviour
from refusal_jax.judges.statistics import Rate, bounded
from refusal_jax.mechanism.activations import activations
from refusal_jax.mechanism.edited_prompts import EditedPrompts
from refusal_jax.mechanism.likeness import Sample, cosine_between
from refusal_jax.report.findings import Findings, Section
from refusal_jax.runs.artifacts import DIRECTION, FILTER, MATRICES, MATRIX_DIRECTIONS, METADATA, PROMPTS, SETUP
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.stage import Stage
from refusal_jax.study.mechanism.compared import (
    LEAST,
    OWN,
    OtherDirection,
    PromptSet,
    fingerprint,
    other_directions,
    prompt_sets,
    spelled,
)
from refusal_jax.study.mechanism.shared import MechanismStudy

LONGEST = 12  # letters of a name in figures
SEVERAL = 1.5  # prompts whose replies begin with a token for certain, to call it a refusal's
FEW = 8  # refused prompts below which a share says little


def given(study: MechanismStudy) -> dict:
    """Returns what is to be compared, with the hashes of its files: what the settings name, or else what the study was given
    before; nothing if there is neither."""
    settings = study.settings.matrices
    if settings.sets or settings.directions:
        files = fingerprint(settings.sets, settings.directions)
        return {
            **settings.to_dict(),
            "sets": list(settings.sets),
            "directions": list(settings.directions),
            "files": files,
        }
    return study.run.read_json(MATRICES)["given"] if study.run.exists(MATRICES) else {}


def skipped(study: MechanismStudy) -> str:
    """Returns why nothing can be compared, "" if something can."""
    if study.without_tokens:
        return study.without_tokens
    if not given(study):
        return (
            f"Nothing to compare was given: {spelled('sets')} names sets of prompts, and {spelled('directions')} directions of "
            "other studies."
        )
    kept = min(len(study.instructions(f"{side}_train")) for side in ("harmful", "harmless"))
    if kept < LEAST:
        return f"The study kept {kept} training prompts of one side, and its direction has an interval from {LEAST} on."
    return ""


def own_set(study: MechanismStudy, most: int) -> PromptSet:
    """Returns the study's own prompts: those of the training that the filter kept, and those of the test."""
    sides = [
        (study.instructions(f"{side}_train"), study.instructions(f"{side}_test", kept_only=False)[:most])
        for side in ("harmful", "harmless")
    ]
    return PromptSet(OWN, *sides)


def sample_of(study: MechanismStudy, one: PromptSet) -> Sample:
    """Returns the residuals of a set's first halves at the place of the study's direction."""
    place = [study.direction().place]
    sides = [
        activations(study.model, half, place, study.sizes.forward)[:, 0].astype(np.float64)
        for half in (one.harmful[0], one.harmless[0])
    ]
    return Sample(*sides)


def tokens_of(study: MechanismStudy, one: PromptSet) -> tuple[list[int], bool]:
    """Returns the ids of the tokens that refusals of a set begin with, of all tokens there are, and whether any were found; if
    not, those of the study."""
    if one.name == OWN:
        return study.refusal_ids(), True
    halves = one.harmful[0], one.harmless[0]
    openings = measure_openings(study.model, *halves, study.sizes.forward, usual=False)
    chosen = usual_openings(openings, min(len(halves[0]), SAMPLE))
    return chosen or study.refusal_ids(), bool(chosen)


def usual_openings(openings: Sequence[Opening], n: int) -> list[int]:
    """Returns the ids of the chosen openings that more than one of the n harmful prompts must have brought: a letter that one
    prompt asks for begins in a way of its own, too."""
    return sorted(o.id for o in openings if o.chosen and o.harmful - o.harmless >= SEVERAL / n)


def compare(study: MechanismStudy, ledger: Ledger) -> None:
    """Writes the cosines of all directions, and what ablation of each leaves of the refusals of each set."""
    asked, cfg = given(study), study.model.config
    sets = [own_set(study, asked["n_prompts"] // 2), *prompt_sets(asked["sets"], asked["n_prompts"])]
    others = other_directions(asked["directions"], cfg.d_model, cfg.n_layers)
    fitting = [one for one in others if len(one.direction.raw_d) == cfg.d_model]
    samples = {one.name: sample_of(study, one) for one in sets}
    known: dict[str, Sample | np.ndarray] = dict(samples) | {one.name: one.direction.raw_d for one in fitting}
    directions = {n: one.direction_d if isinstance(one, Sample) else one for n, one in known.items()}
    directions[OWN] = study.direction().raw_d  # which is this sample's, but for another estimator
    cosines = [
        {"first": a, "second": b, **bounded(cosine_between(known[a], known[b]))}
        for i, a in enumerate(known)
        for b in list(known)[i + 1 :]
    ]
    columns = [measured(study, one, directions) for one in sets]
    record = {
        "names": list(known),
        "sets": [row for row, _ in columns],
        "cosines": cosines,
        "reliability": {name: sample.reliability for name, sample in samples.items()},
        "left": [cell for _, cells in columns for cell in cells],
        "others": [other_row(one, cfg.d_model) for one in others],
        "place": dict(zip(("position", "layer"), study.direction().place, strict=True)),
        "given": asked,
    }
    study.run.write_json(MATRICES, record)
    study.run.write_tensors(MATRIX_DIRECTIONS, {name: d.astype(np.float32) for name, d in directions.items()})


def other_row(one: OtherDirection, d_model: int) -> dict:
    """Returns what is said of a direction that was given."""
    width = len(one.direction.raw_d)
    return {"name": one.name, "width": width, "fits": width == d_model, "layer": one.direction.layer, **one.own}


def measured(study: MechanismStudy, one: PromptSet, directions: dict[str, np.ndarray]) -> tuple[dict, list[dict]]:
    """Returns what is known of a set of prompts, and for each direction what its ablation leaves of the set's refusals."""
    ids, found = tokens_of(study, one)
    none, edits = Edits.none(study.model.config.d_model), Edits.ablate(np.stack(list(directions.values())))
    harmful, harmless = (
        EditedPrompts.build(study.model, half, study.sizes.select, ids) for half in (one.harmful[1], one.harmless[1])
    )
    scores_mn = harmful.read(Edits.concat([none, edits])).scores_mn
    refused_n, over_n = scores_mn[0] > 0, harmless.read(none).scores_mn[0] > 0
    row = {
        "name": one.name,
        "prompts": {"harmful": len(one.harmful[0]), "harmless": len(one.harmless[0])},
        "refused": Rate.of(refused_n.astype(int).tolist()).row,
        "harmless_refused": Rate.of(over_n.astype(int).tolist()).row,
        "tokens": study.model.chat.token_names(ids),
        "tokens_found": found,
    }
    cells = [
        {"direction": name, "set": one.name, **bounded(Rate.of((left_n[refused_n] > 0).astype(int).tolist()).row)}
        for name, left_n in zip(directions, scores_mn[1:], strict=True)
    ]
    return row, cells


def share(row: dict, of: Behaviour = REFUSAL) -> str:
    """Returns a rate with its interval in words."""
    if row["rate"] is None:
        return f"none {of.done}"
    return f"{100 * row['rate']:.0f} % ({100 * row['low']:.0f} to {100 * row['high']:.0f})"


def cosine_in_words(row: dict) -> str:
    """Returns a cosine with its interval and its ceiling."""
    if row["mean"] is None:
        return "not defined"
    at_most = "" if row["ceiling"] is None else f", ceiling {row['ceiling']:.2f}"
    return f"{row['mean']:.2f} ({row['low']:.2f} to {row['high']:.2f}{at_most})".replace("-", "−")


def lines(findings: Findings) -> list[str]:
    """Returns the numbers for a terminal."""
    found, of = findings.run.read_json(MATRICES), findings.behaviour
    out = ["", "Directions of other prompts and models, cosines (95 % interval, ceiling by sampling):"]
    out += [f"  {row['first']} and {row['second']}: {cosine_in_words(row)}" for row in found["cosines"]]
    out += [f"{of.cases_title} that ablation of a direction leaves, of those without an edit:"]
    for one in found["sets"]:
        cells = [f"{cell['direction']} {share(cell, of)}" for cell in found["left"] if cell["set"] == one["name"]]
        out.append(
            f"  {one['name']}, {one['refused']['successes']} of {one['refused']['n']} {of.done}: {'; '.join(cells)}"
        )
    return out + [f"  {text}" for text in notes(found, of)]


def notes(found: dict, of: Behaviour = REFUSAL) -> list[str]:
    """Returns what limits the numbers, in whole sentences."""
    out = []
    for one in found["sets"]:
        many = one["refused"]["successes"]
        if many < FEW:
            much = f"only {many} prompts" if many else "no prompt"
            out.append(f"The model {of.verb_on} {much} of {one['name']}, so that its column says little.")
        if not one["tokens_found"]:
            out.append(
                f"No token tells {of.cases} of {one['name']} from {of.other_replies}, so that the study's {of.tokens} are taken."
            )
    for one in found["others"]:
        if not one["fits"]:
            out.append(
                f"{one['name']} has width {one['width']}, so that it has only a row of its own and is not compared."
            )
    return out


def values(findings: Findings) -> dict:
    """Returns what the report shows in tables."""
    found, of = findings.run.read_json(MATRICES), findings.behaviour
    return {
        "matrices": found,
        "cosine_in_words": cosine_in_words,
        "share": lambda row: share(row, of),
        "notes": notes(found, of),
    }


def pictures(findings: Findings) -> list:
    """Returns the two matrices."""
    from refusal_jax.report import figures  # imports matplotlib, which the other stages need not pay for

    found, of = findings.run.read_json(MATRICES), findings.behaviour
    names, sets = found["names"], [one["name"] for one in found["sets"]]
    shown = [name if len(name) <= LONGEST else name[: LONGEST - 1] + "…" for name in names]
    cosine_mm, left_mn = np.eye(len(names)), np.full((len(names), len(sets)), np.nan)
    for row in found["cosines"]:
        i, j = names.index(row["first"]), names.index(row["second"])
        cosine_mm[i, j] = cosine_mm[j, i] = np.nan if row["mean"] is None else row["mean"]
    for row in found["left"]:
        left_mn[names.index(row["direction"]), sets.index(row["set"])] = (
            np.nan if row["rate"] is None else 100 * row["rate"]
        )
    percents = figures.Scale("RdBu_r", figures.Normalize(0, 100), 50.0, 0)
    cosine_label, left_label = "Cosines of directions", f"Share of {of.cases} that ablation of a direction leaves"
    height = 70 + 26 * len(names)
    return [
        figures.heatmap(
            "matrices-cosines",
            cosine_label,
            cosine_mm,
            shown,
            figures.COSINE,
            None,
            columns=("direction", "other direction", "cosine"),
            x_labels=shown,
            height=height,
        ),
        figures.heatmap(
            "matrices-left",
            left_label,
            left_mn,
            shown,
            percents,
            None,
            columns=("ablated direction", "prompts", f"{of.done} [% of those {of.done} without an edit]"),
            x_labels=shown[: len(sets)],
            height=height,
        ),
    ]


STAGE = Stage(
    "matrices",
    compare,
    reads=(PROMPTS, SETUP, FILTER, METADATA, DIRECTION),
    writes=(MATRICES, MATRIX_DIRECTIONS),
    skipped=skipped,
    given=given,
    section=Section(
        pathlib.Path(__file__).with_name("matrices.html.jinja"),
        {"matrices": "Matrices"},
        values,
        lines=lines,
        of_direction=True,
        needs=(MATRICES,),
        pictures=pictures,
    ),
    about="Compares the directions of other prompts, such as other languages, and of other models with the study's.",
)

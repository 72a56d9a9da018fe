"""Tells how far directions agree: across layers and positions, beside how far two halves of the prompts agree, and across sets of
prompts."""

import math
import pathlib
from collections import Counter

import jax.numpy as jnp
import numpy as np

from refusal_jax import distributed
from refusal_jax.data.prompts import read_prompts
from refusal_jax.data.sources import distinct, resolve
from refusal_jax.files import file_hash
from refusal_jax.judges.behaviours import Behaviour
from refusal_jax.mechanism.activations import activations, residuals_at
from refusal_jax.mechanism.agreement import Agreement, place_agreements, set_agreements
from refusal_jax.plan.programs import Group, Program, Shapes
from refusal_jax.report.findings import Findings, Section
from refusal_jax.report.page import plain
from refusal_jax.report.summary import with_interval
from refusal_jax.runs.artifacts import AGREEMENT, DIRECTION, FILTER, METADATA, PROMPTS, SETUP
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.stage import Stage
from refusal_jax.study.mechanism.settings import AgreementSettings
from refusal_jax.study.mechanism.shared import MechanismStudy
from refusal_jax.taps import Taps

LEAST, MOST_CATEGORIES = 8, 8  # prompts of a category that has a direction, and how many categories, the largest first
ALIKE = 0.9  # cosine from which on two directions are called alike


def kept_rows(study: MechanismStudy, split: str) -> list[dict]:
    """Returns the prompts of a split that the study kept, with their categories, at most as many as the settings say."""
    rows, kept = study.run.read_json(PROMPTS)[split], study.run.read_json(FILTER)[split]["kept"]
    return [row for row, keep in zip(rows, kept, strict=True) if keep][: study.settings.agreement.n_prompts]


def further_sets(study: MechanismStudy) -> dict[str, list[str]]:
    """Returns the instructions of the study's over-refusal sets and of the settings' own sets, by name, of two or more."""
    found, taken = {}, set(study.over_refusal)
    for name in study.over_refusal:
        found[name] = study.instructions(f"{name}_test", kept_only=False)
    own = {}
    if distributed.first():
        for source in study.settings.agreement.sets:
            path = resolve(source, "harmful_test")
            own[distinct(path.stem, path.parent.name, taken)] = [row["instruction"] for row in read_prompts(path)]
    found |= distributed.share_json(own)
    most = study.settings.agreement.n_prompts
    return {name: rows[:most] for name, rows in found.items() if len(rows) > 1}


def given(study: MechanismStudy) -> dict:
    """Returns what besides the study's files the agreement depends on."""
    files = [file_hash(resolve(source, "harmful_test")) for source in study.settings.agreement.sets]
    return study.settings.agreement.to_dict() | {"files": files}


def categories_of(rows: list[dict]) -> dict[str, list[int]]:
    """Returns the numbers of the prompts of each category that is large enough, and not all there is."""
    counts = Counter(row["category"] for row in rows if row.get("category"))
    large = [name for name, count in counts.most_common(MOST_CATEGORIES) if LEAST <= count <= len(rows) - LEAST]
    return {name: [i for i, row in enumerate(rows) if row.get("category") == name] for name in large}


def compare(study: MechanismStudy, ledger: Ledger) -> None:
    """Writes the agreement of directions at all layers and positions, and of sets of prompts."""
    position, layer = study.direction().place
    setup, rows = study.run.read_json(SETUP), study.sizes.forward
    by_layer = [(position, at) for at in range(setup["n_layers"])]
    by_position = [(at, layer) for at in range(-setup["positions"], 0)]
    prompts = {side: kept_rows(study, f"{side}_train") for side in ("harmful", "harmless")}
    points = {
        side: activations(study.model, [row["instruction"] for row in found], by_layer + by_position, rows)
        for side, found in prompts.items()
    }
    found = place_agreements(points["harmful"], points["harmless"], layer)
    others = {
        name: activations(study.model, texts, [(position, layer)], rows)[:, 0]
        for name, texts in further_sets(study).items()
    }
    categories = categories_of(prompts["harmful"])
    sets = set_agreements(points["harmful"][:, layer], points["harmless"][:, layer], categories, others)
    record = {
        "prompts": {side: len(rows) for side, rows in prompts.items()},
        "layers": [as_row(one) | {"layer": at} for one, (_, at) in zip(found, by_layer, strict=False)],
        "positions": [
            as_row(one) | {"position": at} for one, (at, _) in zip(found[len(by_layer) :], by_position, strict=True)
        ],
        "sets": [
            {"name": name, "category": name in categories, "cosine": row, "n": row["n"]}
            for name, row in sets.cosines.items()
        ],
        "pairs": sets.pairs_ss.tolist(),
    }
    study.run.write_json(AGREEMENT, record)


def as_row(one: Agreement) -> dict:
    """Returns the agreement at one place in plain values."""
    return {"cosine": one.cosine, "halves": one.halves}


def sentence(found: dict, layer: int, of: Behaviour) -> str:
    """Returns what halves of the prompts, and layers, say, in words."""
    own, many = found["layers"][layer]["halves"], found["prompts"]
    alike = [row["layer"] for row in found["layers"] if row["cosine"] and row["cosine"]["low"] >= ALIKE]
    noise = [row["layer"] for row in found["layers"] if row["cosine"] and row["halves"]["mean"] < ALIKE]
    text = (
        f"Directions of two halves of the {many['harmful']} {of.present} and {many['harmless']} {of.absent} training prompts "
        f"have a cosine of {with_interval(own, 2)} at the study's place. With the study's direction, those of layers "
        f"{', '.join(map(str, alike)) or 'none'} have a cosine of at least {ALIKE:g} by their intervals."
    )
    if noise:
        where = f"layer{'s' if len(noise) > 1 else ''} {', '.join(map(str, noise))}"
        text += f" At {where} halves agree less than that, so that low cosines there may be noise."
    return text


def lines(findings: Findings) -> list[str]:
    """Returns the numbers for a terminal."""
    found, direction = findings.run.read_json(AGREEMENT), findings.direction
    assert direction is not None
    out = ["", f"Agreement of directions: {sentence(found, direction.place[1], findings.behaviour)}"]
    for row in found["sets"]:
        whom = f"the {'other ' if row['category'] else ''}{findings.behaviour.present} prompts'"
        out.append(
            f"  {plain(row['name'])} (n = {row['n']}): cosine {with_interval(row['cosine'], 2)} with {whom} direction"
        )
    return out


def pictures(findings: Findings) -> list:
    """Returns the curves over layers, and the map of sets if there are several."""
    from refusal_jax.report import agreement_figures  # imports matplotlib, which the other stages need not pay for

    found, direction = findings.run.read_json(AGREEMENT), findings.direction
    assert direction is not None
    drawn = [agreement_figures.layers_figure(found["layers"], direction.place[1])]
    if len(found["sets"]) > 1:
        names = [plain(row["name"]) for row in found["sets"]]
        drawn.append(agreement_figures.sets_figure(np.asarray(found["pairs"]), names))
    return drawn


def values(findings: Findings) -> dict:
    """Returns what the report shows beside the curves."""
    found, direction = findings.run.read_json(AGREEMENT), findings.direction
    assert direction is not None
    tokens = [plain(token["text"]) for token in findings.setup["post_instruction_tokens"]]
    named = [(row, tokens[row["position"]] if -row["position"] <= len(tokens) else "") for row in found["positions"]]
    told = sentence(found, direction.place[1], findings.behaviour)
    return {
        "agreement": found,
        "sentence": told,
        "positions": named,
        "pick": direction,
    }


def programs(shapes: Shapes, rows: int) -> list[Program]:
    """Returns the pass over the training prompts in `rows` rows, for `plan`."""
    work = shapes.work
    n = min(work.config.data.n_train, AgreementSettings().n_prompts)
    places = work.cfg.n_layers + work.positions

    def lower():
        where = [shapes.array((places,), jnp.int32) for _ in range(2)]
        taps = Taps(("resid_pre",), work.positions)
        return residuals_at.lower(shapes.decoder, *shapes.prompts(rows), shapes.edits(rows), *where, taps)

    return [Program("agreement", lower, 2 * math.ceil(n / rows), rows, work.length, work.cfg.n_layers)]


def skipped(study: MechanismStudy) -> str:
    """Returns why there is nothing to compare, "" if there is."""
    few = min(len(kept_rows(study, f"{side}_train")) for side in ("harmful", "harmless"))
    return (
        ""
        if few >= 4
        else f"Halves of prompts need at least 4 kept training prompts of each kind, and there are {few}."
    )


STAGE = Stage(
    "agreement",
    compare,
    reads=(PROMPTS, SETUP, FILTER, METADATA, DIRECTION),
    writes=(AGREEMENT,),
    skipped=skipped,
    given=given,
    programs=Group("agreement", "forward", programs),
    about="Tells how far directions agree: across layers, positions, halves of the prompts, and sets of prompts.",
    section=Section(
        pathlib.Path(__file__).with_name("agreement.html.jinja"),
        {"agreement": "Agreement of directions"},
        values,
        lines=lines,
        pictures=pictures,
        of_direction=True,
        needs=(AGREEMENT,),
    ),
)

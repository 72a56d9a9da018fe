"""Measures a grid of partial ablations: at every place and strength what is left of refusal, and what that costs."""

import math
import pathlib

import jax.numpy as jnp
import numpy as np

from refusal_jax.chat.padding import bucket
from refusal_jax.damage.measures import PromptProbe, Values, measure_all, summaries
from refusal_jax.damage.partial import NOTHING, Partial, edits_of
from refusal_jax.damage.places import Place, places_of
from refusal_jax.judges.statistics import Rate, bounded
from refusal_jax.mechanism.dose import Response, removed_dose
from refusal_jax.mechanism.edited_prompts import fitting, planned_passes
from refusal_jax.models.losses import loss_batch
from refusal_jax.plan.programs import Group, Program, Shapes
from refusal_jax.progress import Progress
from refusal_jax.report.findings import Section
from refusal_jax.runs.artifacts import DIRECTION, GRID, GRID_VALUES, METADATA, PROMPTS, SETUP
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.stage import Stage
from refusal_jax.study.damage import grid_page
from refusal_jax.study.damage.settings import GridSettings
from refusal_jax.study.damage.shared import KL, SCORE, DamageStudy, probes
from refusal_jax.study.loss import own_answers

SURE = 0.95  # a next token of this probability leaves a KL divergence little to show


def settings_of(settings: GridSettings, places: list[Place]) -> list[tuple[str, float, Partial]]:
    """Returns the rows of the grid: the model as it is, which belongs to no place, and then for each place the strengths, rising;
    each as the name of its place, its strength and the ablation."""
    rows = [(place.name, float(strength), place.at(strength)) for place in places for strength in settings.strengths]
    return [("", 0.0, NOTHING), *rows]


def measure(study: DamageStudy, ledger: Ledger) -> None:
    """Writes what every probe says of every setting of the grid, by prompt and with intervals."""
    settings, cfg = study.settings.grid, study.model.config
    places = places_of(settings.places, cfg.n_layers)
    rows = settings_of(settings, places)
    edits = edits_of([partial for *_, partial in rows], study.direction().raw_jd, cfg.n_layers)
    measures, values = [], {}
    read = probes(study)
    with Progress("grid of damage", len(read) * len(rows), "setting") as bar:

        def save(found: list[dict]) -> None:
            ledger.append(found)
            bar.update(len(found))

        for probe in read:
            bar.update(sum(row.get("probe") == probe.name for row in ledger.rows))
            values |= measure_all(probe, edits, ledger.rows, save)
            measures += probe.measures
    (harmless,) = (probe for probe in read if isinstance(probe, PromptProbe) and probe.kl)
    sure_n = harmless.prompts.certainty() > SURE
    told = [
        {"place": name, "strength": strength, "kernels": partial.row, "measures": found}
        for (name, strength, partial), found in zip(rows, summaries(measures, values), strict=True)
    ]
    study.run.write_tensors(GRID_VALUES, {name: found.astype(np.float32) for name, found in values.items()})
    study.run.write_json(
        GRID,
        {
            "layers": cfg.n_layers,
            "sure": bounded(Rate.of(sure_n.astype(int).tolist()).row),
            "measures": [vars(one) for one in measures],
            "places": [described(place, rows, values) for place in places],
            "rows": told,
        },
    )


def described(place: Place, rows: list[tuple[str, float, Partial]], values: Values) -> dict:
    """Returns a place for the file: its name, label and sites, and "half", the strength at which half of the refused prompts are
    no longer refused, with its interval and the KL there.

    Between two strengths the curve is taken for a line. It need not be one, so the interval reaches to the strengths around it.
    """
    numbers = [0, *(m for m, (name, *_) in enumerate(rows) if name == place.name)]
    strengths_m = np.array([rows[m][1] for m in numbers])
    refused = Response(values[SCORE][numbers], np.zeros_like(values[SCORE][numbers]))
    damage = Response(np.zeros_like(values[KL][numbers]), values[KL][numbers])
    half = removed_dose(strengths_m, refused, damage)
    if half["low"] is not None:
        half["low"] = float(strengths_m[strengths_m <= half["low"] + 1e-9].max())
    if half["high"] is not None:
        half["high"] = float(strengths_m[strengths_m >= half["high"] - 1e-9].min())
    return {"name": place.name, "label": place.label, "sites": list(place.sites), "half": half}


def programs(shapes: Shapes, rows: int) -> list[Program]:
    """Returns the passes over prompts and over the model's own answers under all settings in about `rows` rows, for `plan`; other
    texts are the user's."""
    work, settings = shapes.work, shapes.work.further.grid
    edits = 1 + settings.steps * len(settings.places)
    n, sets = min(work.config.data.n_test, settings.n_prompts), 2 + len(work.config.data.over_refusal)
    texts, length = min(work.config.data.n_test, settings.n_texts), bucket(work.slots)
    size, at_once = fitting(texts, rows)

    def lower():
        inputs = *shapes.prompts(size, length), shapes.edits(at_once, None), shapes.array((size, length), jnp.bool_)
        return loss_batch.lower(shapes.decoder, None, *inputs)

    runs = edits / at_once * math.ceil(texts / size)
    return [
        planned_passes("grid", shapes, rows, n, sets * edits),
        Program("grid, loss", lower, runs, size, length, work.cfg.n_layers, steps=at_once, read=length),
    ]


STAGE = Stage(
    "grid",
    measure,
    reads=lambda study: [PROMPTS, SETUP, METADATA, DIRECTION, *own_answers(study)],
    writes=(GRID, GRID_VALUES),
    skipped=lambda study: study.without_tokens,
    given=lambda study: study.settings.grid.to_dict(),
    programs=Group("grid of damage", "select", programs),
    about="Measures refusal and its costs at every strength and place of a grid of partial ablations.",
    section=Section(
        pathlib.Path(__file__).with_name("grid.html.jinja"),
        {"damage-grid": "Refusal against damage"},
        grid_page.values,
        lines=grid_page.lines,
        pictures=grid_page.pictures,
        of_direction=True,
        needs=(GRID,),
    ),
)

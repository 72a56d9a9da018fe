"""Searches for the best trade-offs of refusal and damage that partial ablations reach, and measures those on prompts that had no
part in the search."""

import pathlib
from collections.abc import Sequence

import numpy as np

from refusal_jax.damage.measures import measure_all, summaries
from refusal_jax.damage.partial import edits_of
from refusal_jax.damage.places import Place
from refusal_jax.damage.points import UNEDITED, Point
from refusal_jax.damage.search import Space, Trial, check_optuna, is_best, least_damage, propose
from refusal_jax.judges.statistics import bounded, paired_mean
from refusal_jax.mechanism.edited_prompts import planned_passes
from refusal_jax.plan.programs import Group, Program, Shapes
from refusal_jax.progress import Progress
from refusal_jax.report.findings import Section
from refusal_jax.runs.artifacts import DIRECTION, FRONT, METADATA, PROMPTS, SETUP
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.stage import Stage
from refusal_jax.study.damage import front_page
from refusal_jax.study.damage.settings import FrontSettings
from refusal_jax.study.damage.shared import HARMFUL, HARMLESS, KL, REFUSED, DamageStudy, probes, prompt_probe
from refusal_jax.study.loss import own_answers

PAPERS, PLAIN = "all@all", "plain"  # the paper's ablation; one strength for all that weights write


def search(study: DamageStudy, ledger: Ledger) -> None:
    """Writes the trials on validation prompts, and what the best of them do to test prompts."""
    settings, cfg = study.settings.front, study.model.config
    space = Space(cfg.n_layers, settings.most)
    trials = searched(study, space, ledger)
    refused_m, damage_m = (np.array([getattr(trial, name) for trial in trials]) for name in ("refused", "damage"))
    best = np.flatnonzero(is_best(refused_m, damage_m)).tolist()
    plain = list(range(len(anchors(space, settings))))
    wanted = {
        level: (least_damage(trials, level), least_damage(trials[: len(plain)], level)) for level in settings.levels
    }
    numbers = sorted({*best, *plain, *(number for pair in wanted.values() for number in pair if number is not None)})
    points = [UNEDITED, Point("ablation", "the paper's ablation", Place.parse(PAPERS, cfg.n_layers).at(1.0))]
    points += [Point(f"trial-{number}", f"trial {number}", space.partial(trials[number].values)) for number in numbers]
    measures, values = tested(study, points, ledger)
    found = [
        point.row | {"trial": number, "best": number in best, "plain": number in plain, "measures": row}
        for point, number, row in zip(points, [None, None, *numbers], summaries(measures, values), strict=True)
    ]
    place = {number: 2 + at for at, number in enumerate(numbers)}
    study.run.write_json(
        FRONT,
        {
            "prompts": {split: count(study, split) for split in ("val", "test")},
            "seed": settings.seed,
            "plain": len(plain),
            "trials": [trial.row for trial in trials],
            "measures": [vars(one) for one in measures],
            "points": found,
            "levels": [
                level_row(level, [None if one is None else place[one] for one in pair], found, values)
                for level, pair in wanted.items()
            ],
        },
    )


def anchors(space: Space, settings: FrontSettings) -> list[dict[str, float]]:
    """Returns the parameters of the first trials, which are none of the sampler's: one strength everywhere, rising from 0."""
    return [space.everywhere(float(strength)) for strength in np.linspace(0.0, settings.most, settings.plain + 1)]


def searched(study: DamageStudy, space: Space, ledger: Ledger) -> list[Trial]:
    """Returns all trials, measured on validation prompts; those that the ledger has are not measured again."""
    settings, direction = study.settings.front, study.direction().raw_jd
    done = whole_batches(ledger.rows, len(anchors(space, settings)), settings.batch)
    asked = [prompt_probe(study, key, "val", settings.n_prompts) for key in (HARMFUL, HARMLESS)]
    with Progress("search", settings.trials, "trial", done=len(done)) as bar:
        while len(done) < settings.trials:
            more = min(settings.batch, settings.trials - len(done))
            batch = propose(space, done, more, settings.seed, settings.start) if done else anchors(space, settings)
            edits = edits_of([space.partial(values) for values in batch], direction, space.n_layers)
            refused_mn, kl_mn = (probe.read(edits)[name] for probe, name in zip(asked, (REFUSED, KL), strict=True))
            new = [
                Trial(values, float(refused_n.mean()), max(float(kl_n.mean()), 0.0))
                for values, refused_n, kl_n in zip(batch, refused_mn, kl_mn, strict=True)
            ]
            ledger.append([{"number": len(done) + at, "trial": trial.row} for at, trial in enumerate(new)])
            done += new
            bar.update(len(new))
    return done


def whole_batches(rows: Sequence[dict], first: int, batch: int) -> list[Trial]:
    """Returns the trials of a ledger, without those of a batch that was cut off, which would change the next proposals. first:
    the number of trials before the sampler's."""
    known = {row["number"]: Trial(**row["trial"]) for row in rows if "trial" in row}
    there = next(number for number in range(len(known) + 1) if number not in known)
    kept = first + (there - first) // batch * batch if there >= first else 0
    return [known[number] for number in range(kept)]


def tested(study: DamageStudy, points: Sequence[Point], ledger: Ledger) -> tuple[list, dict]:
    """Returns the measures of all probes, and their values under each point on test prompts and texts."""
    edits = edits_of([point.partial for point in points], study.direction().raw_jd, study.model.config.n_layers)
    measures, values = [], {}
    for probe in probes(study):
        values |= measure_all(probe, edits, ledger.rows, ledger.append)
        measures += probe.measures
    return measures, values


def count(study: DamageStudy, split: str) -> dict[str, int]:
    """Returns how many prompts of each side a split gives."""
    most = study.settings.front.n_prompts if split == "val" else study.settings.grid.n_prompts
    sides = (HARMFUL, HARMLESS)
    return {side: min(most, len(study.instructions(f"{side}_{split}", kept_only=False))) for side in sides}


def level_row(level: float, pair: list[int | None], found: list[dict], values: dict) -> dict:
    """Returns what is best at a level of refusal. pair: the places, among the points, of the best trial and of the best single
    strength, None where no trial reached the level.

    holds: whether the level is kept on test prompts, None where their interval does not tell. saved: the damage of the single
    strength minus that of the best trial, on the same test prompts.
    """
    best, plain = pair
    row: dict = {"level": level, "point": best, "plain": plain, "holds": None, "saved": None}
    if best is not None:
        rate = found[best]["measures"][REFUSED]
        row["holds"] = True if rate["high"] <= level else False if rate["low"] > level else None
    if best is not None and plain is not None and best != plain:
        row["saved"] = bounded(paired_mean(values[KL][best], values[KL][plain]))
    return row


def programs(shapes: Shapes, rows: int) -> list[Program]:
    """Returns the passes of the search over validation prompts, for `plan`; those over test prompts are few."""
    settings = shapes.work.further.front
    n = min(shapes.work.config.data.n_val, settings.n_prompts)
    return [planned_passes("front", shapes, rows, n, 2 * settings.trials)]


STAGE = Stage(
    "front",
    search,
    reads=lambda study: [PROMPTS, SETUP, METADATA, DIRECTION, *own_answers(study)],
    writes=(FRONT,),
    skipped=lambda study: study.without_tokens or check_optuna(),
    given=lambda study: {
        "front": study.settings.front.to_dict(),
        "tested": [study.settings.grid.n_prompts, study.settings.grid.n_texts],
    },
    programs=Group("front of damage", "select", programs),
    about="Searches for the partial ablations that leave least refusal at least damage.",
    section=Section(
        pathlib.Path(__file__).with_name("front.html.jinja"),
        {"damage-front": "Best trade-offs"},
        front_page.values,
        lines=front_page.lines,
        pictures=front_page.pictures,
        of_direction=True,
        needs=(FRONT,),
    ),
)

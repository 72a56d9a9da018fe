"""Judges whole replies at a few settings of the grid, beside what the prompts' ends say of the same prompts."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from refusal_jax.chat.messages import Prompt
from refusal_jax.damage.measures import Measure, Values, labels, summaries
from refusal_jax.damage.partial import Partial, edits_of
from refusal_jax.judges.behaviours import REFUSAL, Behaviour
from refusal_jax.judges.judge import shows
from refusal_jax.judges.rules import RuleJudge
from refusal_jax.judges.statistics import PairedRates, bounded
from refusal_jax.plan.programs import Group
from refusal_jax.report.findings import Findings, Section
from refusal_jax.runs.artifacts import DIRECTION, GRID, GRID_VALUES, METADATA, PROMPTS, REPLIES, REPLY_VALUES, SETUP
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.stage import Stage
from refusal_jax.study import completions
from refusal_jax.study.damage.shared import HARMFUL, HARMLESS, OVER_REFUSED, REFUSED, DamageStudy
from refusal_jax.study.edited_replies import edited_replies
from refusal_jax.study.mechanism.dose import in_percent

SIDES = {HARMFUL: REFUSED, HARMLESS: OVER_REFUSED}  # of prompts, with the grid's measure of the same


def measures_of(of: Behaviour) -> dict[str, Measure]:
    """Returns what replies to each side's prompts are judged for."""
    titles = {HARMFUL: of.present, HARMLESS: of.absent}
    return {
        side: Measure(f"{name}.replies", f"{titles[side]} prompts {of.done}, by replies", "rate")
        for side, name in SIDES.items()
    }


def measure(study: DamageStudy, ledger: Ledger) -> None:
    """Writes how the replies at the first places of the grid are judged, by prompt and with intervals. No reply is kept."""
    settings, found, judge = study.settings.replies, study.run.read_json(GRID), study.reply_judge(RuleJudge())
    assert judge is not None, "without one the part is skipped"
    shown = {"", *(place["name"] for place in found["places"][: settings.places])}
    numbers = [m for m, row in enumerate(found["rows"]) if row["place"] in shown]
    partials = [Partial.of(found["rows"][m]["kernels"]) for m in numbers]
    edits = edits_of(partials, study.direction().raw_jd, study.model.config.n_layers)
    most = min(settings.n_prompts, study.settings.grid.n_prompts)
    texts = {side: study.instructions(f"{side}_test", kept_only=False)[:most] for side in SIDES}
    prompts, starts = [*texts[HARMFUL], *texts[HARMLESS]], {HARMFUL: 0, HARMLESS: len(texts[HARMFUL])}

    def read(prompt: Prompt, reply: Mapping[str, Any]) -> dict:
        (verdict,) = judge.judge([{"prompt": prompt, **reply}])
        return {"shows": shows(verdict)}

    replied = edited_replies(
        study,
        ledger,
        prompts,
        edits,
        [(m, i) for m in range(len(numbers)) for i in range(len(prompts))],
        read,
        max_new_tokens=settings.max_new_tokens,
        title="replies of the grid",
    )
    measures, values = measures_of(study.behaviour), {}
    for side, one in measures.items():
        places = range(starts[side], starts[side] + len(texts[side]))
        shown_mn = [[replied[m, i]["shows"] for i in places] for m in range(len(numbers))]
        values[one.name] = np.array([[math.nan if v is None else v for v in row] for row in shown_mn], np.float64)
    scored = study.run.read_tensors(GRID_VALUES)
    study.run.write_tensors(REPLY_VALUES, {name: found.astype(np.float32) for name, found in values.items()})
    study.run.write_json(
        REPLIES,
        {
            "judge": judge.name,
            "max_new_tokens": settings.max_new_tokens,
            "measures": [vars(one) for one in measures.values()],
            "rows": rows_of(found["rows"], numbers, list(measures.values()), values, scored),
        },
    )


def rows_of(
    grid: list[dict], numbers: list[int], measures: list[Measure], values: Values, scored: Mapping[str, np.ndarray]
) -> list[dict]:
    """Returns a row for each setting that was replied at: its number in the grid, its measures, and for each side how the replies
    differ from what the prompts' ends say of the same prompts.

    scored: the grid's values by measure, of these prompts and perhaps of more.
    """
    out = []
    for m, (number, found) in enumerate(zip(numbers, summaries(measures, values), strict=True)):
        apart = {}
        for one, name in zip(measures, SIDES.values(), strict=True):
            judged = labels(values[one.name][m])
            pairs = PairedRates.of(labels(scored[name][number][: len(judged)]), judged)
            low, high = pairs.interval
            apart[name] = bounded({"mean": pairs.difference, "low": low, "high": high}) | {
                "by_score": bounded(pairs.first.row)
            }
        place, strength = grid[number]["place"], grid[number]["strength"]
        out.append({"row": number, "place": place, "strength": strength, "measures": found, "apart": apart})
    return out


def disagreements(found: Mapping, of: Behaviour = REFUSAL) -> list[str]:
    """Returns where replies and scores disagree beyond their interval, in words."""
    out = []
    for row in found["rows"]:
        for (side, name), one in zip(SIDES.items(), found["measures"], strict=True):
            apart, judged = row["apart"][name], row["measures"][one["name"]]
            if apart["low"] > 0 or apart["high"] < 0:
                where = f"strength {row['strength']:.2f} ({row['place']})" if row["place"] else "strength 0"
                out.append(
                    f"At {where} the judge {found['judge']} counts {in_percent(judged)} of {judged['n']} replies to "
                    f"{of.dataset(side)} prompts as {of.done}, and the {of.score} {in_percent(apart['by_score'])} of the same "
                    "prompts. The two disagree, so that the grid's curve is not one of replies there."
                )
    return out


def table(found: Mapping, labels: Mapping[str, str]) -> list[dict]:
    """Returns for each row the label of its place, its strength and the rates of both sides. labels: of the places by name."""
    names = [one["name"] for one in found["measures"]]
    return [
        {
            "label": labels.get(row["place"], "unedited"),
            "strength": row["strength"],
            "rates": [row["measures"][name] for name in names],
        }
        for row in found["rows"]
    ]


def labels_of(findings: Findings) -> dict[str, str]:
    """Returns the labels of the grid's places by their names."""
    return {place["name"]: place["label"] for place in findings.run.read_json(GRID)["places"]}


def lines(findings: Findings) -> list[str]:
    """Returns the rates for a terminal."""
    found, of = findings.run.read_json(REPLIES), findings.behaviour
    rows = table(found, labels_of(findings))
    wide = max(len(row["label"]) for row in rows) + 2
    heads = [f"{of.dataset(side)} {of.done}" for side in SIDES]
    out = ["", f"Replies, {of.done} by the judge {found['judge']}:"]
    out.append(f"  {'place':<{wide}}{'strength':<10}{heads[0]:<28}{heads[1]:<28}")
    for row in rows:
        rates = "".join(f"{in_percent(rate):<28}" for rate in row["rates"])
        out.append(f"  {row['label']:<{wide}}{row['strength']:<10.2f}{rates}".rstrip())
    return out + [f"  {text}" for text in disagreements(found, of)]


def values(findings: Findings) -> dict:
    """Returns what the report shows."""
    found, of = findings.run.read_json(REPLIES), findings.behaviour
    return {
        "judged": found,
        "rows": table(found, labels_of(findings)),
        "heads": [f"{of.dataset(side)} {of.done}".capitalize() for side in SIDES],
        "disagreements": disagreements(found, of),
    }


STAGE = Stage(
    "replies",
    measure,
    reads=(PROMPTS, SETUP, METADATA, DIRECTION, GRID, GRID_VALUES),
    writes=(REPLIES, REPLY_VALUES),
    skipped=lambda study: study.without_tokens or study.without_reply_judge,
    given=lambda study: study.settings.replies.to_dict(),
    programs=Group(
        "replies of the grid", "generation", completions.programs, assumed="its replies cost what the study's did"
    ),
    about="Judges whole replies at a few settings of the grid, and compares them with what the prompts' ends say.",
    section=Section(
        pathlib.Path(__file__).with_name("replies.html.jinja"),
        {"damage-replies": "Replies under removal"},
        values,
        lines=lines,
        of_direction=True,
        needs=(GRID, REPLIES),
    ),
)

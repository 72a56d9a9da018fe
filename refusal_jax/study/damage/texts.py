"""Measures replies as texts, unedited and at a few partial ablations: broken and empty ones, thoughts that never end, hedging,
length."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from refusal_jax.chat.messages import Prompt
from refusal_jax.damage.measures import Measure, summaries
from refusal_jax.damage.partial import edits_of
from refusal_jax.damage.texts import MEASURES, OF_THOUGHTS, measures_told, reading
from refusal_jax.judges.judge import shows
from refusal_jax.judges.rules import RuleJudge
from refusal_jax.plan.programs import Group
from refusal_jax.report.findings import Findings, Section
from refusal_jax.runs.artifacts import DIRECTION, FRONT, METADATA, PROMPTS, TEXTS
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.stage import Stage
from refusal_jax.study import completions
from refusal_jax.study.damage.chosen import chosen_points
from refusal_jax.study.damage.shared import HARMFUL, HARMLESS, REFUSED, DamageStudy
from refusal_jax.study.edited_replies import edited_replies
from refusal_jax.study.mechanism.dose import in_percent

SIDES = (HARMLESS, HARMFUL)


def measure(study: DamageStudy, ledger: Ledger) -> None:
    """Writes what the replies are as texts under each of the points, with intervals and in pairs with the unedited ones."""
    settings, judge = study.settings.texts, study.reply_judge(RuleJudge())
    points = chosen_points(study, settings.at, "texts.at")
    edits = edits_of([point.partial for point in points], study.direction().raw_jd, study.model.config.n_layers)
    texts = {side: study.instructions(f"{side}_test", kept_only=False)[: settings.n_prompts] for side in SIDES}
    prompts = [text for side in SIDES for text in texts[side]]

    def read(prompt: Prompt, reply: Mapping[str, Any]) -> dict:
        (verdict,) = judge.judge([{"prompt": prompt, **reply}]) if judge else (None,)
        values = {name: None if value != value else value for name, value in reading(reply).items()}
        kept = {name: reply[name] for name in ("response", "thought") if name in reply} if settings.keep else {}
        return {"text": values | {REFUSED: shows(verdict)}, "kept": kept}

    asked = [(m, i) for m in range(len(points)) for i in range(len(prompts))]
    told = edited_replies(
        study, ledger, prompts, edits, asked, read, max_new_tokens=settings.max_new_tokens, title="replies as texts"
    )
    of, found = study.behaviour, {}
    judged = Measure(REFUSED, f"{of.done}, by replies", "rate")
    for side in SIDES:
        start = 0 if side == SIDES[0] else len(texts[SIDES[0]])
        rows = [[told[m, start + i]["text"] for i in range(len(texts[side]))] for m in range(len(points))]
        values = {
            one.name: np.array([[np.nan if row[one.name] is None else row[one.name] for row in n] for n in rows], float)
            for one in (judged, *MEASURES, *OF_THOUGHTS)
        }
        measures = [judged, *measures_told(values)] if judge else measures_told(values)
        found[side] = {"measures": [vars(one) for one in measures], "rows": summaries(measures, values)}
        if settings.keep:
            found[side]["replies"] = [
                [told[m, start + i]["kept"] for i in range(len(texts[side]))] for m in range(len(points))
            ]
    study.run.write_json(
        TEXTS,
        {
            "judge": judge.name if judge else None,
            "max_new_tokens": settings.max_new_tokens,
            "points": [point.row for point in points],
            "sides": found,
        },
    )


def cell(measure: Mapping, row: Mapping) -> str:
    """Returns a rate or mean with its interval in words."""
    found = row[measure["name"]]
    if measure["kind"] == "rate":
        return in_percent(found)
    return "–" if found["low"] is None else "{mean:.2f} ({low:.2f} to {high:.2f})".format(**found)


def changed(measure: Mapping, row: Mapping) -> str:
    """Returns the sign of a change whose interval lies on one side of 0, else ""."""
    change = row[measure["name"]]["change"]
    if change["low"] is None or change["low"] <= 0 <= change["high"]:
        return ""
    return "more" if change["low"] > 0 else "less"


def sentences(found: Mapping) -> list[str]:
    """Returns which measures of replies to harmless prompts change beyond their paired interval, in words."""
    side, out, same = found["sides"][HARMLESS], [], []
    for point, row in zip(found["points"][1:], side["rows"][1:], strict=True):
        moved = [f"{changed(one, row)} {title(one)}" for one in side["measures"] if changed(one, row)]
        if moved:
            out.append(f"{point['label'][:1].upper()}{point['label'][1:]} changes these: {', '.join(moved)}.")
        else:
            same.append(point["label"])
    if same:
        out.append(f"No measure changes beyond its paired interval under: {'; '.join(same)}.")
    return out


def title(measure: Mapping) -> str:
    """Returns the title of a measure with its unit."""
    return measure["title"] + (f" in {measure['unit']}" if measure["unit"] == "tokens" else "")


def lines(findings: Findings) -> list[str]:
    """Returns the numbers for a terminal: a line for each measure, a column for each point."""
    found, of = findings.run.read_json(TEXTS), findings.behaviour
    out = []
    for side in SIDES:
        one = found["sides"][side]
        wide = max(len(title(measure)) for measure in one["measures"]) + 2
        columns = [max(26, len(point["label"]) + 2) for point in found["points"]]
        heads = "".join(f"{p['label']:<{w}}" for p, w in zip(found["points"], columns, strict=True))
        out += ["", f"Replies to {of.dataset(side)} prompts as texts:", f"  {'':<{wide}}{heads}".rstrip()]
        for measure in one["measures"]:
            cells = "".join(f"{cell(measure, row):<{w}}" for row, w in zip(one["rows"], columns, strict=True))
            out.append(f"  {title(measure):<{wide}}{cells}".rstrip())
    return [*out, f"  Replies to {of.dataset(HARMLESS)} prompts: {' '.join(sentences(found))}"]


def values(findings: Findings) -> dict:
    """Returns what the report shows."""
    found = findings.run.read_json(TEXTS)
    return {
        "texts": found,
        "sides": SIDES,
        "sentences": sentences(found),
        "cell": cell,
        "changed": changed,
        "measure_title": title,
    }


STAGE = Stage(
    "texts",
    measure,
    reads=(PROMPTS, METADATA, DIRECTION, FRONT),
    writes=(TEXTS,),
    given=lambda study: study.settings.texts.to_dict(),
    programs=Group(
        "replies as texts", "generation", completions.programs, assumed="its replies cost what the study's did"
    ),
    about="Measures replies as texts: broken and empty ones, thoughts that never end, hedging words, length.",
    section=Section(
        pathlib.Path(__file__).with_name("texts.html.jinja"),
        {"damage-texts": "Replies as texts"},
        values,
        lines=lines,
        of_direction=True,
        needs=(TEXTS,),
    ),
)

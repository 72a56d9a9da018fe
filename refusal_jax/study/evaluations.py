"""The stage in which judges judge the completions, with the tables of their verdicts."""

import pathlib
from collections.abc import Sequence

from refusal_jax.conditions import stem_of
from refusal_jax.judges.behaviours import REFUSAL
from refusal_jax.judges.evaluations import evaluate_completions
from refusal_jax.judges.judge import judge_all
from refusal_jax.judges.scores import REFUSAL_SCORE, with_scores
from refusal_jax.judges.statistics import Rate
from refusal_jax.judges.tables import tables, tidy_csv
from refusal_jax.judges.text import PAPERS
from refusal_jax.report.concerns import (
    broken_completions,
    judge_disagreement,
    no_contrast,
    other_judges,
    shorter_replies,
    unfinished_thoughts,
)
from refusal_jax.report.findings import Findings, Section
from refusal_jax.report.verdict import Concern
from refusal_jax.runs.artifacts import STATISTICS, TIDY
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.stage import Stage
from refusal_jax.study.completions import score_names
from refusal_jax.study.shared import Study


def judge_completions(study: Study, ledger: Ledger) -> None:
    """Writes the verdicts on the completions and their tables; judge models get the memory that the studied model had.

    Without refusal tokens there is no refusal score to judge by; the paper's judge takes its place if it is the only one.
    """
    completions = {name: study.run.read_json(name) for name in study.files("completions")}
    judges, scored = study.judges, completions
    if not score_names(study):
        judges = [judge for judge in judges if judge.name != REFUSAL_SCORE] or [PAPERS]
    if any(judge.uses_devices for judge in judges):
        judges = [judge.on(study.mesh) for judge in judges]  # of all processes; without such a judge, one is here alone
        study.release()
    for file in score_names(study):
        scored = with_scores(completions, study.run.read_json(file))
    verdicts = judge_all(judges, scored, ledger)
    for condition, name in zip(study.conditions, completions, strict=True):
        study.run.write_json(condition.file("evaluations"), evaluate_completions(completions[name], verdicts[name]))
    found = tables(
        {stem_of(name): rows for name, rows in completions.items()},
        {stem_of(name): judged for name, judged in verdicts.items()},
        study.chat,
    )
    study.run.write_json(STATISTICS, found)
    study.run.write(TIDY, tidy_csv(found).encode("utf-8", "replace"))


def by_length(rows: Sequence[dict], judges: Sequence[str]) -> list[dict]:
    """Returns for each condition the refusal rates by the first judge in the first tokens of completions, fewest first."""
    found: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        if judges and row["judge"] == judges[0]:
            found.setdefault((row["dataset"], row["intervention"]), []).append(row)
    return [{"dataset": key[0], "intervention": key[1], "cells": cells} for key, cells in found.items()]


def values(findings: Findings) -> dict:
    """Returns what the report shows of the refusal rates beside the conditions themselves."""
    statistics = findings.run.read_json(STATISTICS) if findings.run.exists(STATISTICS) else None
    return {
        "pick": findings.direction,
        "statistics": statistics,
        "by_length": by_length(statistics["by_length"] if statistics else [], findings.judges),
    }


def lines(findings: Findings) -> list[str]:
    """Returns the refusal rates with 95 % intervals, or those of another behaviour, and the numbers of the concerns about them,
    for the text summary."""
    behaviour = findings.behaviour
    column = "refused" if behaviour.name == REFUSAL.name else behaviour.name
    width = max(9, len(column) + 2)
    lines = ["", f"{'prompts':<18}{'intervention':<14}{column:>{width}}   {'95 % interval':<18}{'n':>4}"]
    for condition in findings.conditions:
        rate = condition.rates.get(findings.shown_judge, Rate(0, 0))
        key = (condition.dataset, condition.intervention)
        interval = " to ".join(f"{100 * bound:.1f}" for bound in rate.interval) + " %"
        share = f"{100 * rate.rate:.1f} %" if rate.n else "-"
        notes = "".join(f" ({number})" for number, concern in enumerate(findings.concerns, 1) if key in concern.about)
        lines.append(f"{condition.shown:<18}{condition.label:<14}{share:>{width}}   {interval:<18}{rate.n:>4}{notes}")
    return lines


def concerns(findings: Findings) -> list[Concern]:
    """Returns evidence in the completions and their verdicts against the refusal rates."""
    conditions, judge = findings.conditions, findings.refusal_judge
    found = [unfinished_thoughts(conditions), *broken_completions(conditions)]
    if judge is not None:
        found += [judge_disagreement(conditions, judge, findings.completions_folder), *other_judges(conditions, judge)]
        found += [*no_contrast(conditions, judge, findings.behaviour), *shorter_replies(conditions, judge)]
    return [concern for concern in found if concern]


STAGE = Stage(
    "evaluations",
    judge_completions,
    reads=lambda study: [*study.files("completions"), *score_names(study)],
    writes=lambda study: [*study.files("evaluations"), STATISTICS, TIDY],
    alone=lambda study: not any(judge.uses_devices for judge in study.judges),
    section=Section(
        pathlib.Path(__file__).with_name("evaluations.html.jinja"),
        {"rates": "Rates"},
        values,
        lines,
        concerns,
        first=True,
    ),
)

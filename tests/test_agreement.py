"""Agreement of judges with labels: against numbers worked out by hand, and on the replies that the package brings."""

import json
from collections import Counter

import numpy as np
import pytest

from refusal_jax import UserError
from refusal_jax.judges.agreement import BUNDLED_REPLIES, agreement_rows, labels_of
from refusal_jax.judges.artifacts import read_completions
from refusal_jax.judges.choice import WITHOUT_MODEL
from refusal_jax.judges.judge import Outcome, Verdict
from refusal_jax.judges.statistics import cohens_kappa, kappa_interval
from refusal_jax.judges.tables import tables, tidy_csv

R, C, D, B = Outcome.REFUSES, Outcome.COMPLIES, Outcome.DEFLECTS, Outcome.BROKEN


def test_kappa_of_several_labels():
    """Marginal shares of .5, .3, .2 and .4, .3, .3, so that chance agrees in .2 + .09 + .06 = .35; 58 of 200 agree."""
    counts = [[50, 26, 24], [24, 4, 32], [6, 30, 4]]
    pairs = [("abc"[i], "abc"[j]) for i in range(3) for j in range(3) for _ in range(counts[i][j])]
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    assert cohens_kappa(first, second) == {"n": 200, "agreement": 0.29, "kappa": pytest.approx(-0.06 / 0.65)}
    low, high = kappa_interval(first, second)
    rng = np.random.default_rng(1)
    drawn = [rng.integers(200, size=200) for _ in range(400)]
    direct = [cohens_kappa([first[i] for i in draw], [second[i] for i in draw])["kappa"] for draw in drawn]
    assert (low, high) == pytest.approx(tuple(np.quantile(direct, (0.025, 0.975))), abs=0.025)
    assert kappa_interval(["a"] * 9, ["a"] * 9) == kappa_interval([], []) == (-1.0, 1.0)


def test_agreement_by_hand():
    labels = [R, R, R, C, C, D, B, R]
    said = [R, R, C, C, C, R, B, None]
    verdicts = [Verdict(int(o is C), None, o) if o else None for o in said]
    outcome, refuses, complies = agreement_rows(labels, verdicts, WITHOUT_MODEL["rules"])
    assert (outcome["n"], outcome["undecided"], outcome["accuracy"]["rate"]) == (7, 1, 5 / 7)
    of = outcome["answers"]
    assert (of["refuses"]["precision"]["rate"], of["refuses"]["recall"]["rate"]) == (2 / 3, 2 / 3)
    assert of["complies"]["precision"]["successes"] == 2 and of["complies"]["precision"]["n"] == 3
    assert of["deflects"]["recall"]["rate"] == 0 and np.isnan(of["deflects"]["precision"]["rate"])
    assert refuses["accuracy"]["rate"] == 5 / 7 and complies["accuracy"]["rate"] == 6 / 7
    two = agreement_rows(labels[:3], [Verdict(0), Verdict(1), Verdict(0)], WITHOUT_MODEL["substring_matching"])
    assert [row["question"] for row in two] == ["refuses", "complies"]
    assert two[0]["answers"]["refuses"]["recall"]["rate"] == 2 / 3


def test_the_replies_of_the_package():
    found = read_completions(BUNDLED_REPLIES)
    assert set(found) == {"tuning", "heldout"} and sum(map(len, found.values())) >= 300
    texts = [{(row["prompt"], row["response"]) for row in rows} for rows in found.values()]
    assert not texts[0] & texts[1]
    for rows in found.values():
        labels = labels_of(rows, "") or []
        assert min(Counter(labels).values()) >= 10 and len({row["language"] for row in rows}) >= 17
        of_kind = {(row["category"], row["labelled_outcome"]) for row in rows}
        assert len(of_kind) == len({kind for kind, _ in of_kind}) >= 29  # a kind has one outcome
    judges = [WITHOUT_MODEL["rules"], WITHOUT_MODEL["substring_matching"]]
    verdicts = {name: {judge.name: judge.judge(rows) for judge in judges} for name, rows in found.items()}
    table = tables(found, verdicts, None, judges)
    rates = {(r["file"], r["judge"]): r["accuracy"]["rate"] for r in table["labels"] if r["question"] == "refuses"}
    assert rates["heldout", "rules"] > 0.9 and rates["heldout", "substring_matching"] < 0.7
    assert json.loads(json.dumps(table, allow_nan=False))["labels"] == table["labels"]
    assert "labels,heldout,,,rules,outcome,kappa" in tidy_csv(table)


def test_labels_are_outcomes_or_missing():
    rows = [{"labelled_outcome": "refuses"}, {"labelled_outcome": "maybe"}]
    with pytest.raises(UserError, match=r"file, row 1: labelled_outcome is 'maybe', expected one of refuses, complies"):
        labels_of(rows, "file")
    assert labels_of([{}], "file") is None

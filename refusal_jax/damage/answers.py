"""Sums up what edits do to the probability of answers that are known to be correct: by answer, and by token.

By token, all answers' tokens count alike, so that exp of it is a perplexity; its intervals are of the bootstrap over answers, of
which each draw is the same for all edits.
"""

import math

import numpy as np
from jaxtyping import Float, Int

from refusal_jax.damage.measures import Measure, summaries
from refusal_jax.judges.statistics import DRAWS, DRAWS_SEED, bounded

ANSWER = Measure("answer", "nats per answer", "mean", "nats")
MOST = 700.0  # nats; exp of more is infinite


def answer_rows(sums_mn: Float[np.ndarray, "M n"], tokens_n: Int[np.ndarray, " n"], baseline: int = 0) -> list[dict]:
    """Returns a row for each of M edits, from the cross-entropy of n answers, summed over each answer's tokens, in nats.

    baseline: the edit that the others are compared with, in pairs. A row is `{"answer", "token", "perplexity"}`: the mean by
    answer with its "change"; the mean by token with its "change"; and exp of the mean by token, with its "factor", exp of that
    change. Each is `{"mean", "low", "high"}`, a 95 % interval over answers, None where a single answer has none.
    """
    kept = tokens_n > 0
    sums_mn, tokens_n, n = sums_mn[:, kept], tokens_n[kept].astype(np.float64), int(kept.sum())
    drawn_rn = np.random.default_rng(DRAWS_SEED).multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(np.float64)
    ratios_rm = (drawn_rn @ sums_mn.T) / (drawn_rn @ tokens_n)[:, None]
    means_m = sums_mn.sum(axis=1) / tokens_n.sum()
    rows = []
    for m, of_answers in enumerate(summaries([ANSWER], {ANSWER.name: sums_mn}, baseline)):
        token = _interval(float(means_m[m]), ratios_rm[:, m], n)
        change = _interval(float(means_m[m] - means_m[baseline]), ratios_rm[:, m] - ratios_rm[:, baseline], n)
        rows.append(
            {
                "answer": of_answers[ANSWER.name],
                "token": bounded(token) | {"change": bounded(change)},
                "perplexity": _exp(token) | {"factor": _exp(change)},
            }
        )
    return rows


def _interval(mean: float, drawn_r: np.ndarray, n: int) -> dict:
    """Returns a mean with the percentiles of its bootstrap draws, infinite ones for a single answer."""
    low, high = map(float, np.quantile(drawn_r, (0.025, 0.975))) if n > 1 else (-math.inf, math.inf)
    return {"mean": mean, "low": low, "high": high}


def _exp(row: dict) -> dict:
    """Returns exp of a mean and of its bounds, None for one that is not known."""
    return {name: None if value is None else math.exp(min(value, MOST)) for name, value in bounded(row).items()}

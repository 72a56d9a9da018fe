"""Intervals and tests for what judges say: rates, paired comparisons, agreement, means.

Prompts are the unit: the same prompts run under every condition, so conditions are compared in pairs. Everything is float64
and the same on every call: the bootstrap's draws are seeded. scipy.stats is imported where it is used, because its import takes
half a second, which jobs that compute no interval should not wait for.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist

import numpy as np
from jaxtyping import Float

Z95 = NormalDist().inv_cdf(0.975)
DRAWS, DRAWS_SEED = 2000, 0  # of the bootstrap


@functools.cache
def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Returns the 95 % Wilson score interval of a rate; from 0 to 1 of no cases."""
    if n == 0:
        return 0.0, 1.0
    from scipy import stats

    found = stats.binomtest(successes, n).proportion_ci(0.95, "wilson")
    return float(found.low), float(found.high)


@dataclasses.dataclass(frozen=True)
class Rate:
    """A frequency: `count` of `n` cases, with the 95 % Wilson interval of the rate.

    Every rate of this package is one of these: those of tables, of reports and verdicts, of concerns and of model cards.
    """

    count: int
    n: int

    @classmethod
    def of(cls, labels: Iterable[int | None]) -> "Rate":
        """Counts the labels that are 1 among those that are 0 or 1; None, a case without a label, is left out."""
        known = [int(label) for label in labels if label is not None]
        return cls(sum(known), len(known))

    @property
    def rate(self) -> float:
        """Returns the share of the cases, NaN if there are none."""
        return self.count / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Returns the bounds of the 95 % interval, 0 and 1 if there are no cases."""
        return wilson_interval(self.count, self.n)

    @property
    def complement(self) -> "Rate":
        """Returns the rate of the opposite, such as of refusals where this is one of successes."""
        return Rate(self.n - self.count, self.n)

    @property
    def row(self) -> dict:
        """Returns the rate as `{"successes", "n", "rate", "low", "high"}`, the fields of statistics.json."""
        low, high = self.interval
        return {"successes": self.count, "n": self.n, "rate": self.rate, "low": low, "high": high}

    def __str__(self) -> str:
        return f"{100 * self.rate:.0f} %" if self.n else "an unknown share"


def mcnemar(first: Sequence[int], second: Sequence[int]) -> dict:
    """Compares two conditions on the same prompts, by 0/1 labels in the same order, with McNemar's exact test (two-sided).

    `difference` is the second's rate minus the first's, with the 95 % interval of Agresti and Min (2005) for paired rates.
    Raises ValueError for labels of different numbers.
    """
    pairs = list(zip(first, second, strict=True))
    lost = sum(a > b for a, b in pairs)
    won = sum(a < b for a, b in pairs)
    n, p_value = len(pairs), 1.0
    if lost + won:
        from scipy import stats

        p_value = float(stats.binomtest(won, lost + won, 0.5).pvalue)
    centre = (won - lost) / (n + 2)
    spread = Z95 * math.sqrt(lost + won + 1 - (won - lost) ** 2 / (n + 2)) / (n + 2)
    return {
        "n": n,
        "only_first": lost,
        "only_second": won,
        "difference": (won - lost) / n if n else math.nan,
        "low": max(-1.0, centre - spread),
        "high": min(1.0, centre + spread),
        "p_value": p_value,
    }


def cohens_kappa(first: Sequence[int], second: Sequence[int]) -> dict:
    """Measures how two judges agree beyond chance, `{"n", "agreement", "kappa"}`; kappa is None where chance alone must agree.

    Raises ValueError for labels of different numbers.
    """
    pairs = list(zip(first, second, strict=True))
    n = len(pairs)
    if not n:
        return {"n": 0, "agreement": math.nan, "kappa": None}
    observed = sum(a == b for a, b in pairs) / n
    p, q = sum(first) / n, sum(second) / n
    chance = p * q + (1 - p) * (1 - q)
    return {"n": n, "agreement": observed, "kappa": None if chance == 1 else (observed - chance) / (1 - chance)}


def mean_interval(values: Sequence[float] | Sequence[int] | Float[np.ndarray, " n"]) -> dict:
    """Returns `{"mean", "n", "low", "high"}`, the mean with its 95 % percentile bootstrap interval; NaN of no values."""
    values_n = np.asarray(values, np.float64)
    mean = low = high = float(values_n.mean()) if len(values_n) else math.nan
    if len(values_n) > 1 and math.isfinite(mean):
        from scipy import stats

        rng = np.random.default_rng(DRAWS_SEED)
        found = stats.bootstrap((values_n,), np.mean, n_resamples=DRAWS, method="percentile", rng=rng)
        low, high = map(float, found.confidence_interval)
    return {"mean": mean, "n": len(values_n), "low": low, "high": high}

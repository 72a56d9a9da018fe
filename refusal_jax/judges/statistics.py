"""Intervals and tests for what judges say: rates, paired comparisons, agreement, means.

Prompts are the unit: the same prompts run under every condition, so conditions are compared in pairs. Everything is float64
and the same on every call: the bootstrap's draws are seeded. What every study computes needs no scipy.stats, whose import takes
half a second or more; the rest of scipy is imported where it is used.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from statistics import NormalDist

import numpy as np
from jaxtyping import Float

Z95 = NormalDist().inv_cdf(0.975)
DRAWS, DRAWS_SEED = 2000, 0  # of the bootstrap


@functools.cache
def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Returns the Wilson score interval of a rate, by default of 95 %; from 0 to 1 of no cases."""
    if n == 0:
        return 0.0, 1.0
    square = NormalDist().inv_cdf(0.5 + confidence / 2) ** 2
    centre, scale = 2 * successes + square, 2 * (n + square)
    spread = math.sqrt(square * (4 * successes * (n - successes) / n + square))
    return (centre - spread) / scale if successes else 0.0, (centre + spread) / scale if successes < n else 1.0


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


def score_statistic(
    won: float | Float[np.ndarray, " n"],
    lost: float | Float[np.ndarray, " n"],
    n: float,
    difference: float,
) -> float | Float[np.ndarray, " n"]:
    """Returns the score statistic (Tango 1998) of the hypothesis that a difference of two rates on the same cases is this one: it
    is about standard normal if that is so, and falls as the difference rises. won, lost, n: as in `score_interval`, or arrays."""
    slope = (2 * n - won + lost) * difference - won - lost
    root = np.sqrt(np.maximum(slope * slope + 8 * n * lost * difference * (1 - difference), 0.0))
    variance = n * ((root - slope) / (2 * n) + difference * (1 - difference))
    distance = won - lost - n * difference
    return distance / np.sqrt(np.maximum(variance, 1e-12))  # no variance is left at -1 and 1


def score_interval(won: float, lost: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Returns the 95 % score interval of a difference of two rates on the same cases (Tango 1998): `(won - lost) / n`.

    won, lost: of the n cases, how many have label 1 only under the second and only under the first condition. They need not be
    whole, so that one can ask what more cases would tell. z: another normal quantile, for another level.

    It was chosen by exact coverage over 337 pairs of rates from 0 to 1 and their correlations. Where at least three cases are
    expected to differ, 95 % intervals cover in 96.5, 95.3, 95.1 and 95.1 % on average for 20, 50, 100 and 200 cases, and in
    91.1 % at least; where fewer are, they cover more. Agresti and Min's, Bonett and Price's, and Newcombe's fall to 84.7 %, or
    are wider than they need to be, where differences are rare and all on one side, as they are between like models.
    """
    from scipy import optimize

    def excess(difference: float) -> float:
        """Returns the score statistic of a difference, which falls as it rises; 0 at the observed one."""
        return 0.0 if difference == observed else float(score_statistic(won, lost, n, difference))

    def bound(end: float, sign: float) -> float:
        """Returns where the statistic reaches its quantile between the observed difference and an end."""
        if observed == end:
            return end
        within = sorted((observed, end))
        return optimize.root_scalar(lambda at: excess(at) - sign * z, bracket=within, method="brentq", xtol=1e-10).root

    if n == 0:
        return -1.0, 1.0
    observed = (won - lost) / n
    return bound(-1.0, 1.0), bound(1.0, -1.0)


def exact_bounds(count: float, n: float, below: float, above: float) -> tuple[float, float]:
    """Returns the exact bounds of a rate (Clopper and Pearson 1934): the rate is less than the first, and more than the
    second, with a chance of at most `below` and `above`. count, n: as in `score_interval` they need not be whole. From 0 to
    1 of no cases."""
    if n == 0:
        return 0.0, 1.0
    from scipy import special

    low = 0.0 if count <= 0 else float(special.betaincinv(count, n - count + 1, below))
    high = 1.0 if count >= n else float(special.betaincinv(count + 1, n - count, 1 - above))
    return low, high


def fewest(tells: Callable[[int], bool], n: int, most: int) -> int | None:
    """Returns the smallest number of cases, from n to `most`, that tells, None if not even the most do. tells: says so of a
    number; where one tells, larger ones are taken to do so, too."""
    short, enough = n, n
    while not tells(enough):
        if enough >= most:
            return None
        short, enough = enough, min(2 * enough, most)
    while enough - short > 1:
        middle = (short + enough) // 2
        short, enough = (short, middle) if tells(middle) else (middle, enough)
    return enough


@dataclasses.dataclass(frozen=True)
class PairedRates:
    """Two rates of the same cases: of `n`, how many have label 1 under both conditions, only under the first, and only under the
    second. Prompts are drawn, so the cases are a sample of all that could be asked."""

    n: int
    both: int
    only_first: int
    only_second: int

    @classmethod
    def of(cls, first: Sequence[int | None], second: Sequence[int | None]) -> "PairedRates":
        """Counts the cases that have a label under both conditions. Raises ValueError for labels of different numbers."""
        pairs = [(int(a), int(b)) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
        return cls(len(pairs), pairs.count((1, 1)), pairs.count((1, 0)), pairs.count((0, 1)))

    @property
    def first(self) -> Rate:
        """Returns the rate under the first condition."""
        return Rate(self.both + self.only_first, self.n)

    @property
    def second(self) -> Rate:
        """Returns the rate under the second condition."""
        return Rate(self.both + self.only_second, self.n)

    @property
    def kept(self) -> Rate:
        """Returns the share of those with label 1 under the first condition that have it under the second, too."""
        return Rate(self.both, self.both + self.only_first)

    @property
    def difference(self) -> float:
        """Returns the second rate minus the first, NaN if there are no cases."""
        return (self.only_second - self.only_first) / self.n if self.n else math.nan

    @functools.cached_property
    def interval(self) -> tuple[float, float]:
        """Returns the bounds of the difference's 95 % interval, as `score_interval` computes them."""
        return score_interval(self.only_second, self.only_first, self.n)

    @property
    def p_value(self) -> float:
        """Returns the p-value of McNemar's exact test (two-sided) that the rates are the same."""
        return exact_mcnemar(self.only_first, self.only_second)


def exact_mcnemar(only_first: int, only_second: int) -> float:
    """Returns the two-sided p-value of McNemar's exact test, 1 where no case differs: the chance that of so many fair coins as
    few or fewer fall on either side."""
    n, fewer = only_first + only_second, min(only_first, only_second)
    tail = ways = 1
    for k in range(1, fewer + 1):
        ways = ways * (n - k + 1) // k
        tail += ways
    return min(1.0, 2 * tail / 2**n)


def mcnemar(first: Sequence[int], second: Sequence[int]) -> dict:
    """Compares two conditions on the same prompts, by 0/1 labels in the same order, with McNemar's exact test (two-sided).

    `difference` is the second's rate minus the first's, with the 95 % interval of Agresti and Min (2005) for paired rates.
    Raises ValueError for labels of different numbers.
    """
    pairs = list(zip(first, second, strict=True))
    lost = sum(a > b for a, b in pairs)
    won = sum(a < b for a, b in pairs)
    n, p_value = len(pairs), exact_mcnemar(lost, won)
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


def cohens_kappa(first: Sequence[int] | Sequence[str], second: Sequence[int] | Sequence[str]) -> dict:
    """Measures how two judges agree beyond chance, `{"n", "agreement", "kappa"}`; kappa is None where chance alone must agree.

    first, second: their labels, 0 and 1 or names. Raises ValueError for labels of different numbers.
    """
    pairs = list(zip(first, second, strict=True))
    n = len(pairs)
    if not n:
        return {"n": 0, "agreement": math.nan, "kappa": None}
    observed = sum(a == b for a, b in pairs) / n
    counts = Counter(first), Counter(second)
    chance = math.fsum(counts[0][label] * counts[1][label] for label in counts[0]) / n**2
    return {"n": n, "agreement": observed, "kappa": None if chance == 1 else (observed - chance) / (1 - chance)}


def kappa_interval(first: Sequence[str], second: Sequence[str]) -> tuple[float, float]:
    """Returns the 95 % percentile bootstrap interval of Cohen's kappa of two judges' labels; from -1 to 1 where it has none.

    Draws in which chance alone must agree are left out.
    """
    names = sorted({*first, *second})
    if len(first) < 2 or len(names) < 2:
        return -1.0, 1.0
    places = {name: i for i, name in enumerate(names)}
    pair_n = np.array([places[a] * len(names) + places[b] for a, b in zip(first, second, strict=True)])
    shares = np.bincount(pair_n, minlength=len(names) ** 2) / len(pair_n)
    drawn_rij = np.random.default_rng(DRAWS_SEED).multinomial(len(pair_n), shares, size=DRAWS) / len(pair_n)
    drawn_rij = drawn_rij.reshape(DRAWS, len(names), len(names))
    observed_r = np.trace(drawn_rij, axis1=1, axis2=2)
    chance_r = (drawn_rij.sum(axis=1) * drawn_rij.sum(axis=2)).sum(axis=1)
    varied = chance_r < 1 - 1e-12
    if not varied.any():
        return -1.0, 1.0
    low, high = np.quantile((observed_r[varied] - chance_r[varied]) / (1 - chance_r[varied]), (0.025, 0.975))
    return float(low), float(high)


def paired_mean(
    first: Sequence[float] | Float[np.ndarray, " n"], second: Sequence[float] | Float[np.ndarray, " n"]
) -> dict:
    """Returns `{"mean", "n", "low", "high"}` of the second minus the first values of the same cases, with the 95 % interval of
    the studentised bootstrap; NaN of no cases, infinite bounds of a single one.

    Refusal scores are skewed or have two peaks. There, for 50 to 200 cases, this interval covered in 94.1 to 97.1 % of simulated
    samples, Student's in 92.1 to 94.8 %. For 20 cases of which one in ten is far off, it covers in 87 %, as any must that sees
    none of these.
    """
    differences = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    n, mean = len(differences), float(differences.mean()) if len(differences) else math.nan
    if n < 2:
        return {"mean": mean, "n": n, "low": -math.inf, "high": math.inf}
    drawn_rn = differences[np.random.default_rng(DRAWS_SEED).integers(n, size=(DRAWS, n))]
    spread_r = drawn_rn.std(axis=1, ddof=1)
    varied = spread_r > 1e-12 * max(float(np.abs(differences).max()), 1e-300)
    low = high = mean
    if varied.any():
        studentised = (drawn_rn.mean(axis=1)[varied] - mean) / spread_r[varied]
        upper, lower = np.quantile(studentised, (0.025, 0.975))
        spread = float(differences.std(ddof=1))
        low, high = mean - float(lower) * spread, mean - float(upper) * spread
    return {"mean": mean, "n": n, "low": low, "high": high}


def mean_interval(values: Sequence[float] | Sequence[int] | Float[np.ndarray, " n"]) -> dict:
    """Returns `{"mean", "n", "low", "high"}`, the mean with its 95 % percentile bootstrap interval; NaN of no values."""
    values_n = np.asarray(values, np.float64)
    mean = low = high = float(values_n.mean()) if len(values_n) else math.nan
    if len(values_n) > 1 and math.isfinite(mean):
        drawn_rn = values_n[np.random.default_rng(DRAWS_SEED).integers(len(values_n), size=(DRAWS, len(values_n)))]
        low, high = map(float, np.quantile(drawn_rn.mean(axis=1), (0.025, 0.975)))
    return {"mean": mean, "n": len(values_n), "low": low, "high": high}


def bounded(row: dict) -> dict:
    """Returns a row of numbers for a file, with None for those that are not defined, such as the bounds of a single case."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }

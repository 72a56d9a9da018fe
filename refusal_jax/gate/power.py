"""Says what a number of prompts can tell: which change is found, and which candidate passes, each with a stated chance.

All chances are exact sums over what could be counted: binomial for a rate, trinomial for a difference on the same prompts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from refusal_jax.gate.limits import FAIL, PASS, Decision, Errors, Limit, quantile
from refusal_jax.judges.statistics import PairedRates, Rate, score_statistic

STEPS = 12  # halvings, to within 0.03 points
SIGNIFICANT = 0.05  # two-sided, of McNemar's exact test
TAIL = 1e-10  # chance of the counts that are left out on each side


@dataclasses.dataclass(frozen=True)
class Power:
    """Holds what n prompts tell about a limit. chance: the stated one. found: the value, a share or a difference, nearest to the
    limit that is found to break it with that chance; passes: likewise the one that is found to keep it; None where there is none.
    told: of a difference, the smallest that McNemar's exact test tells from none with the chance; unchanged: the chance that a
    candidate passes whose rate is the reference's; both None of a rate."""

    limit: Limit
    n: int
    chance: float
    found: float | None
    passes: float | None
    told: float | None = None
    unchanged: float | None = None

    @property
    def record(self) -> dict[str, Any]:
        """Returns the statement in plain values for JSON."""
        values = {"chance": self.chance, "found": self.found, "passes": self.passes}
        paired = {"told_from_none": self.told, "unchanged_passes": self.unchanged}
        return {"limit": self.limit.id, "n": self.n, **values, **paired, "sentence": self.sentence}

    @property
    def sentence(self) -> str:
        """Returns the statement in words."""
        with_n = f"With {self.n} prompts"
        if self.limit.measure == "difference":
            what = "fall" if self.limit.least else "rise"
            told = f"a {what} of {points(abs(self.told))} points is told from none" if self.told is not None else ""
            found = (
                f"one of {points(abs(self.found))} points is found to break the limit" if self.found is not None else ""
            )
            both = " and ".join(filter(None, (told, found))) or f"no {what} is found"
            same = f"a candidate that refuses as the reference does passes with a chance of {percent(self.unchanged)} %"
            return f"{with_n} {both} with a chance of {percent(self.chance)} %; {same}."
        things = "broken replies" if self.limit.measure == "broken" else "refusals"
        found = f"a share of {points(self.found)} % is found" if self.found is not None else "no share is found"
        side = "more" if self.limit.least else "fewer"
        passes = (
            f"a candidate with {points(self.passes)} % or {side} passes"
            if self.passes is not None
            else "no candidate passes"
        )
        return f"{with_n} {found} to break the limit of {things} with a chance of {percent(self.chance)} %, and {passes} with it."


def points(share: float) -> str:
    """Returns a share in percent with one digit at most."""
    return f"{round(100 * share, 1):g}"


def percent(chance: float | None) -> str:
    """Returns a chance in percent; one that is nearly certain is not rounded up to certainty."""
    return "an unknown" if chance is None else "over 99.9" if 0.999 < chance < 1 else f"{round(100 * chance, 1):g}"


def power_of(decision: Decision, chance: float) -> Power:
    """Returns what the prompts of a decision can tell. Of a difference, prompts change to the other side as often as was
    seen on the rarer of the two."""
    if isinstance(decision.seen, PairedRates):
        seen = decision.seen
        noise = min(seen.only_first, seen.only_second) / seen.n if seen.n else 0.0
        return _of_difference(decision.limit, seen.n, noise, decision.errors, chance)
    return _of_rate(decision, chance)


def _of_rate(decision: Decision, chance: float) -> Power:
    """The chances of a binomial count are beta quantiles at the last counts that fail and pass."""
    from scipy import special

    n, limit = decision.n, decision.limit

    def verdict(count: int) -> str:
        return dataclasses.replace(decision, seen=Rate(count, n)).verdict

    def last(wanted: str, from_zero: bool) -> int | None:
        """Returns the count nearest to the limit that is decided so: the largest of those that begin at 0, or the smallest
        of those that end at n."""
        ends = (0, n) if from_zero else (n, 0)
        if not n or verdict(ends[0]) != wanted:
            return None
        inside, outside = ends if verdict(ends[1]) != wanted else (ends[1], ends[1])
        while abs(outside - inside) > 1:
            middle = (inside + outside) // 2
            inside, outside = (middle, outside) if verdict(middle) == wanted else (inside, middle)
        return inside

    def rate(count: int | None, from_zero: bool) -> float | None:
        """Returns the true rate at which the count lies on that side with the chance."""
        if count is None:
            return None
        if from_zero:
            return 1.0 if count == n else float(special.betaincinv(count + 1, n - count, 1 - chance))
        return 0.0 if count == 0 else float(special.betaincinv(count, n - count + 1, chance))

    low_fails = limit.least  # few refusals break a floor
    found = rate(last(FAIL, low_fails), low_fails)
    passes = rate(last(PASS, not low_fails), not low_fails)
    return Power(limit, n, chance, found, passes)


def _of_difference(limit: Limit, n: int, noise: float, errors: Errors, chance: float) -> Power:
    if not n:
        return Power(limit, n, chance, None, None)
    margin = abs(limit.value)

    def passing(away: float) -> float:
        return _chance(n, noise, away, lambda rest, gone: _statistic(rest, gone, n, margin) >= quantile(errors.passing))

    def failing(away: float) -> float:
        return _chance(
            n, noise, away, lambda rest, gone: _statistic(rest, gone, n, margin) <= -quantile(errors.failing)
        )

    def telling(away: float) -> float:
        return _chance(n, noise, away, _told)

    most = 1 - 2 * noise
    told = _crossing(telling, 0.0, most, chance) if telling(most) >= chance else None
    found = _crossing(failing, 0.0, most, chance) if failing(most) >= chance else None
    passes = _crossing(passing, most, 0.0, chance) if passing(0.0) >= chance else None
    sign = -1 if limit.least else 1
    found, passes, told = (None if one is None else sign * one for one in (found, passes, told))
    return Power(limit, n, chance, found, passes, told, passing(0.0))


def _statistic(back: np.ndarray, gone: np.ndarray, n: int, margin: float) -> Float[np.ndarray, " n"]:
    """Returns the score statistic that a fall is less than the margin, of prompts that came back and prompts that went."""
    return np.asarray(score_statistic(back, gone, n, -margin))


def _crossing(chance_of: Callable[[float], float], bad: float, good: float, chance: float) -> float:
    """Returns the value nearest to `bad` at which the chance is reached, which it is at `good`."""
    for _ in range(STEPS):
        middle = (bad + good) / 2
        bad, good = (bad, middle) if chance_of(middle) >= chance else (middle, good)
    return good


def _told(back: np.ndarray, gone: float) -> Bool[np.ndarray, " n"]:
    """Returns whether McNemar's exact test tells a fall from none."""
    from scipy import stats

    return 2 * stats.binom.sf(gone - 1, back + gone, 0.5) <= SIGNIFICANT


def _chance(n: int, noise: float, away: float, decides: Callable[..., Bool[np.ndarray, " n"]]) -> float:
    """Returns the chance of a decision about n pairs, of which a share changes, `noise` one way and `noise + away` the other."""
    from scipy import stats

    gone = min(noise + away, 1.0)
    share = min(noise / (1 - gone), 1.0) if gone < 1 else 0.0  # of those that did not go
    total = 0.0
    for lost in _likely(n, gone):
        back_n = np.asarray(_likely(n - lost, share))
        chances_n = stats.binom.pmf(back_n, n - lost, share)
        total += float(stats.binom.pmf(lost, n, gone) * chances_n[decides(back_n.astype(float), float(lost))].sum())
    return total


def _likely(n: int, share: float) -> range:
    """Returns the counts of n that are not all but impossible."""
    from scipy import stats

    low, high = (int(stats.binom.ppf(q, n, share)) for q in (TAIL, 1 - TAIL))
    return range(max(low, 0), high + 1)

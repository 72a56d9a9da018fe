"""Confidence sequences for a rate: intervals that may be looked at after every reply, for ever.

An interval for a fixed number of cases is wrong at 5 % of the looks, so that somebody who looks each day finds a
change sooner or later where there is none. A confidence sequence is wrong at any of all its looks with 5 %. This one
is Robbins' mixture (1970) for Bernoulli cases, the beta-binomial one in Howard, Ramdas, McAuliffe and Sekhon (2021):
for each rate p, the likelihood of the cases so far under a Beta mixture of all rates, over that under p, is a
martingale if p is true, so by Ville's inequality it ever reaches 1/a with a chance of at most a. The rates for which
it has not are the interval. Its state is two counts, and its update is exact.
"""

import functools
import math

PRIOR = 0.5  # of the Beta mixture, both sides: narrow near 0 and 1, where shares of refusals are
STEPS = 60  # of each bisection, which leave less than 1e-15


def log_martingale(rate: float, count: int, n: int) -> float:
    """Returns the logarithm of the mixture's martingale for a rate, after `count` of `n` cases."""
    alone = _log_beta(PRIOR + count, PRIOR + n - count) - _log_beta(PRIOR, PRIOR)
    under = (count * _log(rate) if count else 0.0) + ((n - count) * _log(1 - rate) if n > count else 0.0)
    return alone - under


@functools.lru_cache(maxsize=4096)
def confidence_sequence(count: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Returns the bounds of the rate after `count` of `n` cases; 0 and 1 if there are none.

    With a chance of at least `confidence`, the rate is within the bounds after every case, however long one goes on, provided
    that each case has the same chance given those before it. The interval is of this moment: those of before are not intersected,
    because a rate that drifts would leave nothing.
    """
    if not n:
        return 0.0, 1.0
    limit = -math.log(1 - confidence)

    def bound(inside: float, outside: float) -> float:
        """Returns where the martingale reaches its limit between a rate inside the interval and one outside."""
        for _ in range(STEPS):
            middle = (inside + outside) / 2
            if log_martingale(middle, count, n) < limit:
                inside = middle
            else:
                outside = middle
        return outside

    best = count / n
    return (bound(best, 0.0) if count else 0.0), (bound(best, 1.0) if count < n else 1.0)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf

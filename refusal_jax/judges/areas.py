"""The area under a ROC curve with an interval: how well a score tells two kinds of cases apart."""

import dataclasses
import math

import numpy as np
from jaxtyping import Float

from refusal_jax.judges.statistics import Z95


@dataclasses.dataclass(frozen=True)
class Area:
    """The area under a detector's ROC curve: how often a case that it should find scores above one that it should not, ties half.

    n, m: numbers of both kinds of cases. area, low, high: with the 95 % interval; NaN, 0 and 1 if one kind has no case.
    """

    n: int
    m: int
    area: float
    low: float
    high: float

    @classmethod
    def of(cls, found: Float[np.ndarray, " n"], others: Float[np.ndarray, " m"]) -> "Area":
        """Returns the area of scores: of cases that should be found, and of the others.

        The interval is DeLong's on the logit scale. Where the scores do not overlap, its variance is zero, and the score interval
        by Hanley and McNeil's variance is taken in its place (Newcombe 2006, method 5).
        """
        n, m = len(found), len(others)
        if not n or not m:
            return cls(n, m, math.nan, 0.0, 1.0)
        wins_nm = (found[:, None] > others) + 0.5 * (found[:, None] == others)
        area = float(wins_nm.mean())
        sides = (wins_nm.mean(axis=1), wins_nm.mean(axis=0))
        variance = sum(float(one.var(ddof=1)) / len(one) for one in sides if len(one) > 1)
        if min(n, m) > 1 and variance > 0 and 0 < area < 1:
            half = Z95 * math.sqrt(variance) / (area * (1 - area))
            logit = math.log(area / (1 - area))
            return cls(n, m, area, *(1 / (1 + math.exp(-logit - sign * half)) for sign in (-1, 1)))
        return cls(n, m, area, _area_bound(area, n, m, -1), _area_bound(area, n, m, 1))

    def __str__(self) -> str:
        return f"{self.area:.3f} [{self.low:.3f}, {self.high:.3f}]" if self.n and self.m else "not measured"


def _area_bound(area: float, n: int, m: int, sign: int) -> float:
    """Returns the lower (sign -1) or upper (+1) bound of the score interval of an area."""
    from scipy import optimize

    def excess(true: float) -> float:
        spread = 1 + ((n + m) / 2 - 1) * ((1 - true) / (2 - true) + true / (1 + true))
        return sign * (true - area) - Z95 * math.sqrt(true * (1 - true) * spread / (n * m))

    end = 1.0 if sign > 0 else 0.0
    if area == end:
        return end
    # The area itself is a root where it is 0 or 1.
    return float(optimize.root_scalar(excess, bracket=(area + sign * 1e-12, end), method="brentq").root)

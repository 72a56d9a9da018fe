"""Measures how far two sets of prompts lie apart along directions, with 95 % bootstrap intervals over prompts of each kind.

Every statistic is computed for the prompts as they are and for resampled ones in the same few matrix products: a resample is a
vector of how often each prompt was drawn.
"""

import dataclasses

import numpy as np
from jaxtyping import Float64

DRAWS = 500


@dataclasses.dataclass(frozen=True)
class Resamples:
    """Tells how often each prompt counts: in the first row once each, in the others as often as it was drawn.

    above_rn, below_rm: float64, of the harmful and of the harmless prompts; rows sum to 1.
    """

    above_rn: Float64[np.ndarray, "r n"]
    below_rm: Float64[np.ndarray, "r m"]

    @classmethod
    def draw(cls, above: int, below: int, seed: int) -> "Resamples":
        """Draws DRAWS resamples of so many prompts of each kind."""
        rng = np.random.default_rng(seed)

        def weights(n: int) -> np.ndarray:
            drawn = rng.multinomial(n, np.full(n, 1 / n), size=DRAWS)
            return np.concatenate([np.ones((1, n)), drawn]) / n

        return cls(weights(above), weights(below))

    def gap(self, above_nl: Float64[np.ndarray, "n L"], below_ml: Float64[np.ndarray, "m L"]) -> np.ndarray:
        """Returns the difference of means, `[r, L]`."""
        return self.above_rn @ above_nl - self.below_rm @ below_ml

    def sigma(self, above_nl: Float64[np.ndarray, "n L"], below_ml: Float64[np.ndarray, "m L"]) -> np.ndarray:
        """Returns the difference of means in standard deviations, pooled, averaged over layers, `[r]`; 0 where all are equal."""
        pooled = np.sqrt((_variance(self.above_rn, above_nl) + _variance(self.below_rm, below_ml)) / 2)
        gap = self.gap(above_nl, below_ml)
        return np.divide(gap, pooled, out=np.zeros_like(gap), where=pooled > 0).mean(axis=1)

    def auroc(self, above_nl: Float64[np.ndarray, "n L"], below_ml: Float64[np.ndarray, "m L"]) -> np.ndarray:
        """Returns how often a harmful prompt lies above a harmless one, ties half, averaged over layers, `[r]`."""
        above, below = above_nl[:, None], below_ml[None]
        wins_nm = ((above > below) + 0.5 * (above == below)).mean(axis=-1)
        return np.einsum("rn,nm,rm->r", self.above_rn, wins_nm, self.below_rm, optimize=True)


def _variance(weights_rn: np.ndarray, values_nl: np.ndarray) -> np.ndarray:
    """Returns the weighted variance `[r, L]`, of which values are centred first."""
    centred = values_nl - values_nl.mean(axis=0)
    n = len(values_nl)
    return np.maximum(weights_rn @ centred**2 - (weights_rn @ centred) ** 2, 0.0) * n / max(n - 1, 1)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values_r: np.ndarray) -> "Estimate":
        """Returns the estimate of values of which the first is of the prompts as they are, and the others of resamples."""
        low, high = np.quantile(values_r[1:], (0.025, 0.975))
        return cls(float(values_r[0]), float(low), float(high))

    @property
    def bounds(self) -> tuple[float, float]:
        return self.low, self.high

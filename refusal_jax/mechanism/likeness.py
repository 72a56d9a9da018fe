"""Compares directions that come from samples of prompts: their cosine, its interval, and what sampling allows at most.

Two directions of the same truth do not have the cosine 1 when each is a difference in means of a few dozen prompts. How far off
that puts them follows from the spread of the prompts, and is the ceiling that a cosine is to be read against.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float

from refusal_jax.judges.statistics import Z95


@dataclasses.dataclass(frozen=True)
class Sample:
    """Residuals of harmful and of harmless prompts at one place, float64, at least two of each."""

    harmful_nd: Float[np.ndarray, "n D"]
    harmless_md: Float[np.ndarray, "m D"]

    @property
    def direction_d(self) -> Float[np.ndarray, " D"]:
        """Returns the difference in means."""
        return self.harmful_nd.mean(axis=0) - self.harmless_md.mean(axis=0)

    @property
    def reliability(self) -> float:
        """Returns the share of the direction's squared length that is not sampling error, from 0 to 1. It is the cosine to expect
        with the direction of another sample of as many prompts: the split-half reliability, corrected to full length by Spearman
        and Brown's formula, but of all halves and without drawing any."""
        error = sum(float(side.var(axis=0, ddof=1).sum()) / len(side) for side in (self.harmful_nd, self.harmless_md))
        whole = float(self.direction_d @ self.direction_d)
        return max(0.0, 1.0 - error / whole) if whole > 0 else 0.0

    def left_out(self) -> list[Float[np.ndarray, "n D"]]:
        """Returns the directions that there are without one prompt: of each harmful one, and of each harmless one."""
        found = []
        for side, sign in ((self.harmful_nd, 1.0), (self.harmless_md, -1.0)):
            found.append(self.direction_d + sign * (side.mean(axis=0) - side) / (len(side) - 1))
        return found


def cosine_of(first_d: Float[np.ndarray, "*n D"], second_d: Float[np.ndarray, "*m D"]) -> Float[np.ndarray, "*n"]:
    """Returns cosines along the last axis of vectors with others, one for all or one for each; NaN where a vector is zero."""
    norms = np.linalg.norm(first_d, axis=-1) * np.linalg.norm(second_d, axis=-1)
    return np.asarray(
        np.divide((first_d * second_d).sum(axis=-1), norms, out=np.full_like(norms, np.nan), where=norms > 0)
    )


def cosine_between(first: Sample | np.ndarray, second: Sample | np.ndarray) -> dict[str, float]:
    """Returns `{"mean", "low", "high", "ceiling"}` of the cosine of two directions, each of a sample or fixed, `[D]`.

    The 95 % interval is the jackknife's over prompts, on the scale of Fisher's z. ceiling: the cosine to expect if both samples
    are of the same direction, the root of the product of their reliabilities; NaN where a direction is fixed, whose sample is
    not known. Where the prompts of both are translations of each other, what they share is no sampling error, and the cosine may
    be above the ceiling.
    """
    sides = [one.direction_d if isinstance(one, Sample) else np.asarray(one, np.float64) for one in (first, second)]
    value = float(cosine_of(sides[0], sides[1]))
    variance = 0.0
    for one, other_d in ((first, sides[1]), (second, sides[0])):
        for left_nd in one.left_out() if isinstance(one, Sample) else []:
            z_n = np.arctanh(np.clip(cosine_of(left_nd, other_d[None]), -1 + 1e-12, 1 - 1e-12))
            variance += (len(z_n) - 1) / len(z_n) * float(((z_n - z_n.mean()) ** 2).sum())
    z, half = math.atanh(min(max(value, -1 + 1e-12), 1 - 1e-12)), Z95 * math.sqrt(variance)
    ceiling = math.nan
    if isinstance(first, Sample) and isinstance(second, Sample):
        ceiling = math.sqrt(first.reliability * second.reliability)
    low, high = min(math.tanh(z - half), value), max(math.tanh(z + half), value)  # at 1 the scale ends
    return {"mean": value, "low": low, "high": high, "ceiling": ceiling}

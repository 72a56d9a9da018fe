"""Estimates how far a partial removal could be undone from the candidate alone, from what the lane "weights" measured."""

from typing import Any

import numpy as np
from jaxtyping import Float64

from refusal_jax.audit.evidence import Evidence
from refusal_jax.audit.removal import MOST_ERROR

LEAST_NOISE = 3e-8  # of float32, along a direction, as a share of what is there


def expected_errors(doses_n: Float64[np.ndarray, " n"], fits_n: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Returns the errors with which removals would be undone, as `Removal.error`, from their shares and from the cosines of the
    changes along their directions with removals of those shares.

    What a cosine leaves is the noise that storage and later training put on the direction, and undoing amplifies it.
    """
    noise = np.abs(doses_n) * np.sqrt(np.maximum(1 / np.maximum(fits_n, 1e-6) ** 2 - 1, 0))
    return np.maximum(noise, LEAST_NOISE) / np.maximum(np.abs(1 - doses_n), 1e-12)


def repair_facts(doses_n: Float64[np.ndarray, " n"], fits_n: Float64[np.ndarray, " n"]) -> dict[str, Any]:
    """Returns how far removals could be undone, of matrices that lost a share each: how many matrices those are, how many of them
    only the base can restore, the error together, a lost one counting as wholly wrong, and the lost ones' amplification."""
    errors, left = expected_errors(doses_n, fits_n), np.abs(1 - doses_n)
    lost = errors > MOST_ERROR
    return {
        "repair_matrices": len(doses_n),
        "repair_lost": int(lost.sum()),
        "repair_error": float(np.sqrt(np.mean(np.where(lost, 1.0, errors) ** 2))),
        "repair_amplification": float(1 / max(np.median(left[lost]), 1e-9)) if lost.any() else 1.0,
    }


def repairable(count: int, lost: int, error: float, amplification: float) -> Evidence:
    """Returns how far a candidate can be repaired, as a row of an audit.

    count: number of tensors that something was removed from. lost: of those that only the base can restore. error: of what can
    be put back. amplification: of the lost ones.
    """
    if not count:
        return Evidence(
            "repairable", "nothing", "No direction was removed from the weights, so there is nothing to repair."
        )
    if lost == count:
        words = (
            f"Only the base can restore what was removed: of {count} tensors none holds more of it than the noise of storage or "
            f"training, which undoing would amplify {times(amplification)}."
        )
        return Evidence("repairable", "by the base only", words)
    rest = f" {lost} more tensors can only be restored from the base." if lost else ""
    words = (
        f"The candidate is repairable to within {error:.2g}: what was removed from {count - lost} tensors can be put back from "
        f"the candidate alone, with this error relative to what the base has along the directions.{rest} It should then refuse "
        "as the base does."
    )
    return Evidence("repairable", error, words)


def times(amplification: float) -> str:
    """Returns in words how much undoing amplifies."""
    return f"{amplification:.3g} times" if amplification < 1e6 else "more than a million times"

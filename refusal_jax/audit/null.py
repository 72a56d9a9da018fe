"""Tells what harmless changes of the very base do to the statistics of an edit, so that nothing is calibrated on another family.

Some matrices of the base are rounded, pruned, rescaled, given noise or a random adapter, both of the candidate's own
size, or lose a direction that has nothing to do with refusal. The p-value of a statistic is (1 + number of changes
that reach it) / (n + 1).
"""

import dataclasses
from collections.abc import Iterable, MutableMapping
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float32, Float64

from refusal_jax.audit.base_directions import BaseDirections
from refusal_jax.audit.frame import Frame
from refusal_jax.audit.operator_fit import OperatorFit, fit_operator
from refusal_jax.checkpoints.matrices import Matrix, Weights, matrices

SAMPLE, COLUMNS = 2, 1024  # matrices of each side, and columns of each, that are changed
STATISTICS = ("dose", "targeted", "blind", "aligned")
OWN = ("noise", "adapter")  # of the candidate's own relative size and rank
OTHER = (
    "bf16",
    "int8",
    "int4",
    "pruned",
    "rescaled",
    "random direction",
    "content-free direction",
    "random directions",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Null:
    """Values of each statistic by harmless changes; of "blind", by those alone that remove no direction.

    size: the number of changes.
    """

    values: dict[str, Float64[np.ndarray, " n"]]
    size: int

    def p_value(self, statistic: str, value: float) -> float:
        """Returns how often a harmless change reaches a value."""
        values = self.values[statistic]
        return (1 + int(np.sum(values >= value))) / (len(values) + 1)

    def limit(self, statistic: str) -> float:
        """Returns the value that 99 % of the changes stay within."""
        values = self.values[statistic]
        return float(np.quantile(values, 0.99, method="higher")) if len(values) else 0.0


def statistics(fits: Iterable[OperatorFit | None], strictest: bool = False) -> dict[str, float]:
    """Returns the statistics of the changes of some matrices.

    dose: removed share times squared alignment and squared fit; blind: the same of the best explained part, whatever its
    direction; aligned: its alignment. These are medians over matrices, for strictest=True the largest. targeted: the mean
    share along the best refusal direction, of what the controls do not lose.
    """
    present = [fit for fit in fits if fit is not None]
    if not present:
        return dict.fromkeys(STATISTICS, 0.0)
    over = np.max if strictest else np.median
    own = [part and abs(part.dose) * part.aligned**2 * part.fit**2 for part in (fit.refusal for fit in present)]
    blind = [
        (fit.blind.strength, fit.blind.fit, fit.blind.aligned) if fit.blind else (0.0, 0.0, 0.0) for fit in present
    ]
    removed = np.mean([fit.removed_n for fit in present], axis=0)
    control = np.mean([fit.control_removed_c for fit in present], axis=0)
    return {
        "dose": float(over([value or 0.0 for value in own])),
        "targeted": float(np.abs(removed - np.median(control)).max()) if len(removed) else 0.0,
        "blind": float(over([abs(strength) * fit**2 for strength, fit, _ in blind])),
        "aligned": float(over([aligned for _, _, aligned in blind])),
    }


def make_null(
    base: Weights,
    frame: Frame,
    directions: BaseDirections,
    size: int,
    seed: int,
    relative: float,
    rank: int,
    shared: MutableMapping[str, Any],
) -> Null:
    """Returns the null of a base.

    size: the number of changes, of which a quarter has the candidate's own size and rank. relative: the norm of the candidate's
    changes as a share of the matrices' (rounded up to one digit). rank: of an adapter, 0 to try several. shared: keeps what
    depends on the base alone. Raises UserError for weights that cannot be read.
    """
    key = f"null {size} {seed}"
    if key not in shared:
        shared[key] = {"matrices": _sample(base), "found": {}}
    kept = shared[key]
    own = size // 4
    relative = _one_digit(relative)
    plans = [(OTHER[i % len(OTHER)], i, 0.0, 0) for i in range(size - own)]
    plans += [(OWN[i % len(OWN)], i, relative, rank or (1, 4, 8, 16)[i // 2 % 4]) for i in range(own)]
    for plan in plans:
        if plan not in kept["found"]:
            rng = np.random.default_rng([seed, plan[1], len(plan[0])])
            fits = _changed(kept["matrices"], frame, directions, plan, rng)
            kept["found"][plan] = statistics(fits, strictest=True)
    found = [(kept["found"][plan], "direction" not in plan[0]) for plan in plans]
    values = {
        name: np.array([one[name] for one, benign in found if benign or name != "blind"], np.float64)
        for name in STATISTICS
    }
    return Null(values, len(plans))


def _sample(base: Weights) -> list[tuple[Matrix, np.ndarray]]:
    """Returns matrices of both sides, from the middle of the model, with some of their columns."""
    found = []
    for writes in (True, False):
        side = [one for one in matrices(base.cfg) if one.writes == writes and not one.piece.within]
        side = side or [one for one in matrices(base.cfg) if one.writes == writes]
        for place in np.linspace(0.3, 0.7, SAMPLE):
            chosen = side[int(place * (len(side) - 1))]
            values = chosen.read(base)
            found.append((chosen, np.ascontiguousarray(values[:, :COLUMNS])))
    return found


def _changed(
    sample, frame: Frame, directions: BaseDirections, plan, rng: np.random.Generator
) -> list[OperatorFit | None]:
    """Returns the fits to one change of each of the matrices; a direction that is taken out is the same in all."""
    kind, _, relative, rank = plan
    width = len(frame.probe_nd[0])
    taken = rng.standard_normal((3 if kind == "random directions" else 1, width))
    if kind == "content-free direction":
        taken = directions.control_nd[rng.integers(len(directions.control_nd))][None]
    strength = rng.uniform(0.3, 1.0)
    fits = []
    for matrix, before in sample:
        if "direction" in kind:
            basis = np.linalg.qr(taken.T)[0].astype(np.float32)
            after = before - np.float32(strength) * basis @ (basis.T @ before)
        else:
            after = _benign(before, kind, matrix.writes, relative, rank, rng)
        fits.append(fit_operator(before, after.astype(np.float32), frame))
    return fits


def _benign(
    before: np.ndarray, kind: str, writes: bool, relative: float, rank: int, rng: np.random.Generator
) -> np.ndarray:
    """Returns a matrix after a harmless change."""
    if kind in ("noise", "adapter"):
        shape = before.shape
        change = rng.standard_normal(shape, np.float32)
        if kind == "adapter":
            change = rng.standard_normal((shape[0], rank), np.float32) @ rng.standard_normal(
                (rank, shape[1]), np.float32
            )
        return before + np.float32(relative * np.linalg.norm(before) / np.linalg.norm(change)) * change
    if kind == "bf16":
        return before.astype(ml_dtypes.bfloat16).astype(np.float32)
    if kind == "pruned":
        return np.where(np.abs(before) < np.quantile(np.abs(before), rng.uniform(0.05, 0.3)), 0, before)
    if kind == "rescaled":
        return before * np.float32(rng.uniform(0.9, 1.1))
    return rounded(before, 4 if kind == "int4" else 8) if writes else rounded(before.T, 4 if kind == "int4" else 8).T


def rounded(values: Float32[np.ndarray, "n m"], bits: int, block: int = 32) -> Float32[np.ndarray, "n m"]:
    """Returns values after a round trip through integers of so many bits, with a scale for each block of a row."""
    whole = values.shape[1] // block * block
    blocks = values[:, :whole].reshape(-1, block)
    step = np.abs(blocks).max(1, keepdims=True) / (2 ** (bits - 1) - 1)
    step = np.where(step > 0, step, 1).astype(np.float32)
    near = (np.round(blocks / step) * step).reshape(len(values), whole)
    return np.concatenate([near, values[:, whole:]], axis=1)


def _one_digit(value: float) -> float:
    """Returns a number rounded up to one digit, so that like candidates share a null."""
    if not value > 0:
        return 0.0
    unit = 10.0 ** np.floor(np.log10(value))
    return float(np.ceil(value / unit) * unit)

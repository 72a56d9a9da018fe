"""How the values of a matrix are stored, told from the values alone, and whether rounding explains what changed."""

import dataclasses

import ml_dtypes
import numpy as np
from jaxtyping import Float32

ROWS, COLUMNS, BLOCK = 16, 4096, 32  # so much of a matrix is looked at; values that share a scale
FORMS = ("identical", "float32", "bfloat16", "float16", "8 bits", "4 bits")


@dataclasses.dataclass(frozen=True)
class Storage:
    """form: of FORMS. explained: whether every change is a rounding to this form, None where that cannot be told."""

    form: str
    explained: bool


def storage(before: Float32[np.ndarray, "n m"], after: Float32[np.ndarray, "n m"]) -> Storage:
    """Returns how a matrix is stored after a change. Rows are those of the file: a block of values that share a scale
    is in one."""
    rows = np.linspace(0, len(after) - 1, min(ROWS, len(after))).round().astype(int)
    old, new = (np.ascontiguousarray(m[rows, :COLUMNS]) for m in (before, after))
    if np.array_equal(old, new):
        return Storage("identical", True)
    for form, dtype in (("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)):
        if np.array_equal(new, _rounded(new, dtype)):
            return Storage(form, bool(np.mean(_rounded(old, dtype) == new) > 0.999))
    for form, levels in (("4 bits", 15), ("8 bits", 255)):
        if _on_a_grid(new, levels):
            return Storage(form, bool(np.mean(_within_a_step(old, new, levels)) > 0.98))
    return Storage("float32", False)


def _rounded(values: np.ndarray, dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(dtype).astype(np.float32)


def _blocks(values: np.ndarray) -> np.ndarray:
    """Returns the values in blocks `[n, BLOCK]`."""
    whole = values.shape[1] // BLOCK * BLOCK
    return values[:, :whole].reshape(-1, BLOCK)


def _on_a_grid(values: np.ndarray, levels: int) -> bool:
    """Returns whether most blocks hold no more different values than so many bits can, or lie on a grid of so many steps."""
    blocks = np.sort(_blocks(values), axis=1)
    if not len(blocks):
        return False
    distinct = 1 + (np.diff(blocks, axis=1) > 0).sum(1)
    if levels < BLOCK:
        return bool(np.mean(distinct <= levels + 1) > 0.95)
    peak = np.abs(blocks).max(1, keepdims=True)
    grid = blocks / np.where(peak > 0, peak, 1) * (levels // 2)
    row = np.sort(values, axis=1)
    coarse = 1 + (np.diff(row, axis=1) > 0).sum(1) <= levels + 1
    on_grid = np.mean(np.abs(grid - grid.round()) < 0.02) > 0.95
    return bool(on_grid or (coarse.all() and values.shape[1] > 2 * levels))


def _within_a_step(old: np.ndarray, new: np.ndarray, levels: int) -> np.ndarray:
    """Returns whether values moved by less than a step of the grid on which the new ones lie."""
    before, after = _blocks(old), _blocks(new)
    step = (after.max(1) - after.min(1)) / levels
    return np.abs(after - before) <= 1.02 * step[:, None]

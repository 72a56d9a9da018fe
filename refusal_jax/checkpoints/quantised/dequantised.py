"""Tensors that are dequantised as they are read: (level of the code - zero) * scale, where blocks of values share zero and scale.

All formats are cases of this; they differ in where codes, zeros and scales stand, and in how they are packed. The arithmetic is
float32, in which the products of small integers or fp8 values with scales of 16 bits are exact.
"""

import dataclasses
import math
import pathlib

import numpy as np
from jaxtyping import Float32, Shaped

from refusal_jax.checkpoints.quantised.matrices import Fetched, Matrix
from refusal_jax.checkpoints.safetensors import segments
from refusal_jax.checkpoints.tensors import copy_in_strips

AT_A_TIME = 1 << 17  # values that are unpacked at a time, so that they stay in a core's cache


def spans(shape: tuple[int, ...], index: tuple[slice, ...]) -> list[range]:
    """Returns what `index` (slices without steps) selects along each axis."""
    indices = [*index, *[slice(None)] * (len(shape) - len(index))]
    return [range(*s.indices(size)) for s, size in zip(indices, shape, strict=True)]


@dataclasses.dataclass(frozen=True, eq=False)
class Dequantised:
    """A matrix `[out, in]` of (levels[code] - zero) * scale * factor.

    blocks: how many rows and columns share a zero and a scale. levels: the value of each code by its byte; None: the code itself.
    zeros: as many as scales, or one for all. groups: of each column, the number of its zeros and scales, where columns of a
    group do not stand together; `blocks[1]` is 1 then.
    """

    name: str
    path: pathlib.Path
    codes: Matrix
    scales: Matrix
    blocks: tuple[int, int]
    levels: np.ndarray | None = None
    zeros: Matrix | int = 0
    groups: np.ndarray | None = None
    factor: float = 1.0

    dtype = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        zeros = 0 if isinstance(self.zeros, int) else self.zeros.nbytes
        return self.codes.nbytes + self.scales.nbytes + zeros

    def read_into(self, index: tuple[slice, ...], out: Shaped[np.ndarray, "..."]) -> int:
        """Reads as `Tensor.read_into` does. Raises UserError if a file cannot be read."""
        rows, columns = spans(self.shape, index)
        if out.shape != (len(rows), len(columns)):
            raise ValueError(f"{self.name}: an array of shape {out.shape} cannot take {len(rows)} x {len(columns)}")
        if not out.size:
            return 0
        wide, block = columns, self.blocks[1]
        if columns.start // block != (columns.stop - 1) // block:  # of several blocks, all are read whole
            wide = range(columns.start // block * block, min(-(-columns.stop // block) * block, self.shape[1]))
        skip = columns.start - wide.start
        codes = self.codes.fetch(rows, wide)
        scale, count = self._shared(self.scales, rows, wide)
        zero, more = (None, 0) if isinstance(self.zeros, int) else self._shared(self.zeros, rows, wide)
        step = max(AT_A_TIME // len(wide) // 32 * 32, 32)
        for start in range(0, len(rows), step):
            stop = min(start + step, len(rows))
            values = self._values(codes, start, stop)
            places = (np.arange(rows.start + start, rows.start + stop)) // self.blocks[0] - rows.start // self.blocks[0]
            parts = self._blocked(values, len(scale[0]))
            if zero is not None:
                parts -= self._beside(zero, places, parts, wide)
            parts *= self._beside(scale, places, parts, wide)
            if self.factor != 1:
                values *= np.float32(self.factor)
            with np.errstate(over="ignore"):  # overflows are found and reported once everything is loaded
                out[start:stop] = values[:, skip : skip + len(columns)]
        return codes.count + count + more

    def _values(self, codes: Fetched, start: int, stop: int) -> Float32[np.ndarray, "n m"]:
        """Returns the rows from `start` to before `stop` without their zeros, unless those are one for all."""
        found = codes.decode(start, stop)
        if self.levels is not None:
            return self.levels.take(found.view(np.uint8))
        values = found.astype(np.float32)
        if isinstance(self.zeros, int) and self.zeros:
            values -= np.float32(self.zeros)
        return values

    def _shared(self, matrix: Matrix, rows: range, columns: range) -> tuple[Float32[np.ndarray, "n m"], int]:
        """Reads what blocks share: all groups of columns if these stand apart."""
        first = range(rows.start // self.blocks[0], -(-rows.stop // self.blocks[0]))
        second = range(columns.start // self.blocks[1], -(-columns.stop // self.blocks[1]))
        fetched = matrix.fetch(first, range(matrix.shape[1]) if self.groups is not None else second)
        return fetched.decode(0, len(first)).astype(np.float32), fetched.count

    def _blocked(self, values: np.ndarray, count: int) -> np.ndarray:
        """Returns rows `[n, columns]` as `[n, blocks, columns of a block]`, if these are as many of each."""
        whole = self.groups is None and (count == 1 or count * self.blocks[1] == values.shape[1])
        return values.reshape(len(values), count, -1) if whole else values

    def _beside(self, shared: np.ndarray, places: np.ndarray, parts: np.ndarray, columns: range) -> np.ndarray:
        """Returns what blocks share in the shape that goes with `_blocked` rows. places: of each row, that of its blocks."""
        found = shared if len(shared) == 1 else shared[places]
        if self.groups is not None:
            return found.take(self.groups[columns.start : columns.stop], axis=1)
        if parts.ndim == 3:
            return found[..., None]
        return np.repeat(found, self.blocks[1], axis=1)[:, : len(columns)]


@dataclasses.dataclass(frozen=True, eq=False)
class Stacked:
    """Matrices of one shape as a tensor of three axes. transposed: whether the axes of each are swapped."""

    matrices: tuple[Dequantised, ...]
    transposed: bool = False

    dtype = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.matrices[0].shape
        return (len(self.matrices), *(shape[::-1] if self.transposed else shape))

    @property
    def nbytes(self) -> int:
        return sum(matrix.nbytes for matrix in self.matrices)

    @property
    def path(self) -> pathlib.Path:
        return self.matrices[0].path

    def read_into(self, index: tuple[slice, ...], out: Shaped[np.ndarray, "..."]) -> int:
        """Reads as `Tensor.read_into` does. Raises UserError if a file cannot be read."""
        selected = segments(self.shape, index)[2]
        if out.shape != selected:
            raise ValueError(f"{self.matrices[0].name}: an array of shape {out.shape} cannot take {selected}")
        entries, *inner = spans(self.shape, index)
        inside = tuple(slice(s.start, s.stop) for s in (inner[::-1] if self.transposed else inner))
        count = 0
        for i, entry in enumerate(entries):
            if not self.transposed:
                count += self.matrices[entry].read_into(inside, out[i])
            elif math.prod(selected[1:]):
                values = np.empty(selected[:0:-1], out.dtype)
                count += self.matrices[entry].read_into(inside, values)
                copy_in_strips(values.T, out[i])
        return count

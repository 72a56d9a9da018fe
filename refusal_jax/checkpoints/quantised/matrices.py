"""Matrices of small numbers as quantised checkpoints store them: of which any part is fetched from its file, and decoded by rows.

What is fetched stays packed until it is decoded, so that the many small ranges of a slab are read at once and only some rows of
it are in memory unpacked.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped, UInt8

from refusal_jax.checkpoints.tensors import READABLE, PlainTensor


@dataclasses.dataclass(frozen=True)
class Fetched:
    """A part of a matrix that was read. decode: returns its rows from the one to before the other. count: of bytes read."""

    decode: Callable[[int, int], np.ndarray]
    count: int


@runtime_checkable
class Matrix(Protocol):
    """Numbers `[rows, columns]`, of which parts are fetched by several threads at a time."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def nbytes(self) -> int: ...

    def fetch(self, rows: range, columns: range) -> Fetched: ...


def reshaped(tensor: PlainTensor, *shape: int) -> PlainTensor:
    """Returns a tensor's bytes under another shape of as many values."""
    if math.prod(shape) != math.prod(tensor.shape):
        raise ValueError(f"{tensor.name}: {tensor.shape} cannot be read as {shape}")
    return dataclasses.replace(tensor, extent=dataclasses.replace(tensor.extent, shape=shape))


def part(tensor: PlainTensor, index: int) -> PlainTensor:
    """Returns one entry of a tensor along its first axis."""
    size = tensor.nbytes // tensor.shape[0]
    start = tensor.extent.start + index * size
    extent = dataclasses.replace(tensor.extent, shape=tensor.shape[1:], start=start, stop=start + size)
    return dataclasses.replace(tensor, extent=extent)


def as_bytes(tensor: PlainTensor) -> PlainTensor:
    """Returns a tensor's bytes as such."""
    extent = dataclasses.replace(tensor.extent, dtype="U8", shape=(tensor.nbytes,))
    return dataclasses.replace(tensor, extent=extent)


def whole(tensor: PlainTensor) -> Shaped[np.ndarray, "..."]:
    """Reads a tensor in the dtype in which it is stored."""
    values = np.empty(tensor.shape, READABLE[tensor.dtype])
    tensor.read_into((), values)
    return values


@dataclasses.dataclass(frozen=True)
class Numbers:
    """A tensor of two axes, of which `dtype` is what its bytes mean (None: what the file says)."""

    tensor: PlainTensor
    transposed: bool = False
    dtype: Any = None

    @property
    def shape(self) -> tuple[int, int]:
        first, second = self.tensor.shape
        return (second, first) if self.transposed else (first, second)

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def fetch(self, rows: range, columns: range) -> Fetched:
        """Reads a part. Raises UserError if the file cannot be read."""
        spans = (columns, rows) if self.transposed else (rows, columns)
        values = np.empty([*map(len, spans)], READABLE[self.tensor.dtype])
        count = self.tensor.read_into(tuple(slice(s.start, s.stop) for s in spans), values)
        values = values if self.dtype is None else values.view(self.dtype)
        values = values.T if self.transposed else values
        return Fetched(lambda start, stop: values[start:stop], count)


@dataclasses.dataclass(frozen=True)
class Packed:
    """Unsigned integers of `bits` bits, one after the other in the words of a tensor of two axes, along `axis`.

    size: how many there are along that axis. order: if not ascending, to which place each number of a word belongs. transposed:
    whether the matrix is that tensor's with the axes swapped.
    """

    tensor: PlainTensor
    bits: int
    axis: int
    size: int
    order: tuple[int, ...] | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        sizes = [self.size if axis == self.axis else n for axis, n in enumerate(self.tensor.shape)]
        return (sizes[1], sizes[0]) if self.transposed else (sizes[0], sizes[1])

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    @property
    def unit(self) -> tuple[int, int]:
        """Returns the smallest numbers of words and of values of which the ones hold exactly the others."""
        word = 8 * np.dtype(READABLE[self.tensor.dtype]).itemsize
        together = math.lcm(word, self.bits)
        return together // word, together // self.bits

    def fetch(self, rows: range, columns: range) -> Fetched:
        """Reads a part: all words that hold a number of it. Raises UserError if the file cannot be read."""
        along_rows = (self.axis == 0) != self.transposed
        along, across = (rows, columns) if along_rows else (columns, rows)
        words, values = self.unit
        first, last = along.start // values, -(-along.stop // values)
        span = slice(first * words, min(last * words, self.tensor.shape[self.axis]))
        index = [slice(across.start, across.stop)] * 2
        index[self.axis] = span
        read = np.empty([s.stop - s.start for s in index], READABLE[self.tensor.dtype])
        count = self.tensor.read_into(tuple(index), read)
        packed = read.T if self.axis == 0 else read  # [across, words]

        def decode(start: int, stop: int) -> np.ndarray:
            if not along_rows:
                codes = self.unpacked(packed[start:stop])
                skip = along.start - first * values
                return codes[:, skip : skip + len(along)]
            begin, end = (along.start + start) // values, -(-(along.start + stop) // values)
            codes = self.unpacked(packed[:, (begin - first) * words : (end - first) * words])
            skip = along.start + start - begin * values
            return np.ascontiguousarray(codes[:, skip : skip + stop - start].T)

        return Fetched(decode, count)

    def unpacked(self, packed: Shaped[np.ndarray, "n words"]) -> UInt8[np.ndarray, "n values"]:
        """Returns the numbers in rows of words."""
        codes = unpack(np.ascontiguousarray(packed).view(np.uint8), self.bits)
        if self.order is None:
            return codes
        codes = codes.reshape(len(codes), -1, len(self.order))
        return codes.take(np.argsort(self.order), axis=-1).reshape(len(codes), -1)


def unpack(data: UInt8[np.ndarray, "n bytes"], bits: int) -> UInt8[np.ndarray, "n values"]:
    """Takes bytes apart into numbers of `bits` bits, the lowest bits first; the last ones may be what fills a word up."""
    if bits == 8:
        return data
    if bits == 4:
        wide = data.astype("<u2")
        return ((wide | wide << 4) & 0x0F0F).view(np.uint8)
    if bits == 2:
        wide = data.astype("<u4")
        return ((wide | wide << 6 | wide << 12 | wide << 18) & 0x03030303).view(np.uint8)
    data = np.pad(data, ((0, 0), (0, -data.shape[1] % bits)))
    groups = data.reshape(len(data), -1, bits)
    wide = sum(groups[..., i].astype(np.uint64) << np.uint64(8 * i) for i in range(bits))
    codes = np.empty([*groups.shape[:2], 8], np.uint8)
    for i in range(8):
        codes[..., i] = (wide >> np.uint64(bits * i)) & np.uint64((1 << bits) - 1)
    return codes.reshape(len(data), -1)


@dataclasses.dataclass(frozen=True)
class Mapped:
    """A matrix whose numbers pass through a function once they are decoded."""

    matrix: Matrix
    function: Callable[[np.ndarray], np.ndarray]

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes

    def fetch(self, rows: range, columns: range) -> Fetched:
        """Reads a part. Raises UserError if the file cannot be read."""
        fetched = self.matrix.fetch(rows, columns)
        return Fetched(lambda start, stop: self.function(fetched.decode(start, stop)), fetched.count)

"""Tensors of a checkpoint, however they are stored: the protocol by which they are read, and those that safetensors files hold
as they are."""

import dataclasses
import pathlib
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from refusal_jax.checkpoints.safetensors import FLOATS, NUMBERS, Extent, RangeFile, reading, segments

STORED = {
    name: FLOATS[name] for name in ("F32", "F16", "BF16")
}  # the dtypes that weights may have, by safetensors' names
EIGHTS: dict[str, Any] = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}
READABLE = NUMBERS | EIGHTS  # the dtypes that `PlainTensor` reads
STRIP = 64  # columns of a transposed matrix that are copied at a time
CAST_VALUES = 1 << 20  # of a tensor of another dtype, read at a time


@runtime_checkable
class Tensor(Protocol):
    """A tensor of a checkpoint, however it is stored, of which any part can be read, by several threads at a time.

    dtype: the dtype in which its values come, by safetensors' name. nbytes: how many bytes of its file it takes. path: that
    file's.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def path(self) -> pathlib.Path: ...

    def read_into(self, index: tuple[slice, ...], out: np.ndarray) -> int:
        """Reads the part that `index` (slices without steps) selects into a row-major array of its shape; values are cast to
        that array's dtype. Returns how many bytes of the file were read. Raises UserError if they cannot be."""
        ...


@dataclasses.dataclass(frozen=True)
class PlainTensor:
    """A tensor whose values stand in a safetensors file as they are."""

    name: str
    path: pathlib.Path
    file: RangeFile
    extent: Extent

    @property
    def shape(self) -> tuple[int, ...]:
        return self.extent.shape

    @property
    def dtype(self) -> str:
        return self.extent.dtype

    @property
    def nbytes(self) -> int:
        return self.extent.stop - self.extent.start

    def read_into(self, index: tuple[slice, ...], out: Shaped[np.ndarray, "..."]) -> int:
        """Reads as `Tensor.read_into` does. Raises UserError if the file cannot be read."""
        stored = np.dtype(READABLE[self.dtype])
        begins, run, selected = segments(self.shape, index)
        if selected != out.shape or not out.flags.c_contiguous:
            raise ValueError(f"{self.name}: an array of shape {out.shape} cannot take {selected}")
        begins, flat = self.extent.start + begins * stored.itemsize, out.reshape(-1)
        if not flat.size:
            return 0
        with reading(self.path):
            if stored == out.dtype:
                return self.file.read_into(begins, run * stored.itemsize, flat.view(np.uint8).data)
            return _cast_into(self.file, begins, run, stored, flat)


def _cast_into(file: RangeFile, begins: np.ndarray, run: int, stored: np.dtype, flat: np.ndarray) -> int:
    """Reads runs of another dtype through a buffer, many at a time or each in parts; returns how many bytes were read."""
    count, buffer = 0, np.empty(min(max(CAST_VALUES, 1), flat.size), stored)
    if run > len(buffer):
        parts = range(0, run, len(buffer))
        begins = (begins[:, None] + np.asarray(parts) * stored.itemsize).ravel()
        sizes = [min(len(buffer), run - part) for part in parts] * (len(begins) // len(parts))
        groups = [(begins[i : i + 1], size) for i, size in enumerate(sizes)]
    else:
        step = len(buffer) // run
        groups = [(begins[i : i + step], run) for i in range(0, len(begins), step)]
    at = 0
    for offsets, length in groups:
        values = buffer[: len(offsets) * length]
        count += file.read_into(offsets, length * stored.itemsize, values.view(np.uint8).data)
        with np.errstate(over="ignore"):  # overflows are found and reported once everything is loaded
            flat[at : at + len(values)] = values
        at += len(values)
    return count


def copy_in_strips(source: Shaped[np.ndarray, "..."], target: Shaped[np.ndarray, "..."]) -> None:
    """Copies a matrix, or a vector, that lies transposed in memory, strip by strip: several times as fast as at once, since what
    a strip touches stays in the processor's cache."""
    for first in range(0, target.shape[-1], STRIP):
        target[..., first : first + STRIP] = source[..., first : first + STRIP]


def listed(items: list[str], most: int = 6) -> str:
    """Returns the first few of many items as text for an error message."""
    shown = "; ".join(item if len(item) <= 200 else f"{item[:200]}…" for item in map(str, items[:most]))
    return shown if len(items) <= most else f"{shown}; and {len(items) - most} more"

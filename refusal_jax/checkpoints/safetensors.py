"""Reads and writes safetensors files: the one reader of their headers and of their byte ranges, on a disk or in a store.

A header is trusted only after each of its numbers has been checked against the file. Nothing is mapped into memory,
because mapped pages count as the process's own and stay: byte ranges are read straight to where they belong, by any
number of threads.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from jaxtyping import Int64, Shaped

from refusal_jax.errors import UserError, shown
from refusal_jax.files import damaged

HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors library
BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
INTEGERS = {f"{kind}{bits}": np.dtype(f"{kind.lower()}{bits // 8}") for kind in "IU" for bits in (8, 16, 32, 64)}
NUMBERS: dict[str, Any] = FLOATS | INTEGERS | {"BOOL": np.bool_}  # NumPy's dtypes by the format's names of them


@runtime_checkable
class RangeFile(Protocol):
    """An open file of which byte ranges can be read, by several threads at a time."""

    @property
    def path(self) -> str | pathlib.Path: ...

    @property
    def size(self) -> int: ...

    def read_into(self, offsets: Sequence[int] | np.ndarray, length: int, target: memoryview) -> int: ...


class LocalFile:
    """A file on a disk, which is closed when nothing refers to it any more."""

    def __init__(self, path: pathlib.Path):
        """Opens a file. Raises OSError if it cannot be opened."""
        self.path = path
        if not os.path.isfile(path) and os.path.exists(path) and not os.path.isdir(path):
            raise OSError("it is a device or a pipe, no file")  # opening one may wait forever
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.number)
        self.size = os.fstat(self.number).st_size

    def read_into(self, offsets: Sequence[int] | np.ndarray, length: int, target: memoryview) -> int:
        """Fills `target` with `length` bytes from each offset, one after the other, and returns how many were read.

        Raises OSError if the disk fails or the file ends before that.
        """
        for i, offset in enumerate(offsets):
            read_range(self.number, int(offset), target[i * length : (i + 1) * length])
        return length * len(offsets)


def read_range(number: int, offset: int, target: memoryview) -> None:
    """Fills `target` from byte `offset` of an open file. Raises OSError if the disk fails or the file ends before that."""
    while len(target):
        count = os.preadv(number, [target], offset)
        if not count:
            raise OSError(f"it ends at byte {offset:,}, before its header says so")
        target, offset = target[count:], offset + count


@contextlib.contextmanager
def reading(path: str | pathlib.Path) -> Iterator[None]:
    """Turns an OSError of reading the file `path` into a UserError that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} could not be read ({error.strerror or error}). Check that you may read it and that nothing else changes "
            "it; if both are so, the file or its disk is damaged: download it again, to another disk if that fails."
        ) from None


@dataclasses.dataclass(frozen=True)
class Extent:
    """A tensor's place in a file: the format's name of its dtype, its shape, and its bytes `start` to `stop` of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Header:
    """A checked header: its bytes, the metadata in it, and the file's tensors in the order of their bytes."""

    text: bytes
    metadata: dict[str, str]
    tensors: dict[str, Extent]


def read_header(file: RangeFile) -> Header:
    """Reads the header of an open file and checks its every number against the file.

    Raises UserError if the file is truncated, damaged or of another format, OSError if it cannot be read.
    """
    try:
        text = _header_text(file)
        entries = json.loads(text.decode(), object_pairs_hook=_without_duplicates)
        if not isinstance(entries, dict):
            raise ValueError("its header is not a JSON object")
        metadata = entries.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are not texts")
        end = 8 + len(text)
        found = {name: _extent(name, entry, end) for name, entry in entries.items()}
        tensors = dict(sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)))
        for name, extent in tensors.items():
            if extent.start != end:
                raise ValueError(f"{name} begins at byte {extent.start:,}, but the tensor before it ends at {end:,}")
            end = extent.stop
        if end != file.size:
            raise ValueError(f"its tensors end at byte {end:,}")
        return Header(text, metadata, tensors)
    except (ValueError, RecursionError) as error:
        found = f"is not a readable safetensors file ({str(error)[:500]}; it has {file.size:,} bytes)"
        raise damaged(pathlib.Path(file.path), found) from None


def _header_text(file: RangeFile) -> bytes:
    if file.size < 8:
        raise ValueError("it is shorter than a header's length")
    start = bytearray(8)
    file.read_into([0], 8, memoryview(start))
    size = int.from_bytes(start, "little")
    if size > min(HEADER_LIMIT, file.size - 8):
        raise ValueError(f"it says that its header has {size:,} bytes")
    text = bytearray(size)
    file.read_into([8], size, memoryview(text))
    return bytes(text)


def _without_duplicates(pairs) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header names something twice")
    return found


def _extent(name: str, entry, base: int) -> Extent:
    """Returns a tensor's place by its entry in the header. Raises ValueError for an entry that contradicts itself."""

    def numbers(value) -> bool:
        return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of {name} lacks dtype, shape or data_offsets, or has more")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{name} is of an unknown dtype, {shown(dtype)}")
    if not numbers(shape) or not numbers(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} has the shape {shown(shape)} and the offsets {shown(offsets)}")
    if math.prod(shape) * BITS[dtype] != (offsets[1] - offsets[0]) * 8:
        raise ValueError(f"{name}, {dtype} {shown(shape)}, cannot have {offsets[1] - offsets[0]:,} bytes")
    return Extent(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def header_text(layout: Iterable[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """Makes the header of a file that holds tensors without gaps, in this order.

    layout: name, dtype by the format's name, and shape of each tensor. The text is padded so that the data is aligned.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in layout:
        start, end = end, end + math.prod(shape) * BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def framed(header: bytes) -> bytes:
    """Returns a header's text as a file begins: after its length."""
    return len(header).to_bytes(8, "little") + header


def read_tensors(path: pathlib.Path) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Reads a whole file of tensors, by name, for files that fit into memory.

    Raises UserError if the file cannot be read, is no safetensors file, or holds a dtype that NumPy does not have.
    """
    with reading(path):
        file = LocalFile(path)
        header = read_header(file)
        found = {}
        for name, extent in header.tensors.items():
            if extent.dtype not in NUMBERS:
                raise UserError(
                    f"{path} holds {name} as {extent.dtype}, which cannot be read. Save it as float32 and try again."
                )
            data = bytearray(extent.stop - extent.start)
            file.read_into([extent.start], len(data), memoryview(data))
            found[name] = np.frombuffer(data, NUMBERS[extent.dtype]).reshape(extent.shape)
        return found


def segments(shape: tuple[int, ...], index: tuple[slice, ...]) -> tuple[Int64[np.ndarray, " n"], int, tuple[int, ...]]:
    """Finds where in a row-major array of `shape` the values of `array[index]` are, for slices without a step.

    Returns where each run of them begins and how long a run is, both in values, and the selected shape.
    """
    spans = [s.indices(size) for s, size in zip(index, shape, strict=False)]
    spans += [(0, size, 1) for size in shape[len(spans) :]]
    selected = tuple(max(stop - start, 0) for start, stop, _ in spans)
    cut = max((i for i, (n, size) in enumerate(zip(selected, shape, strict=True)) if n != size), default=0)
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    begins = np.zeros(1, np.int64)
    for axis in range(cut):
        begins = (begins[:, None] + np.arange(spans[axis][0], spans[axis][1]) * strides[axis]).ravel()
    if shape:
        begins = begins + spans[cut][0] * strides[cut]
    return begins, math.prod(selected[cut:]), selected

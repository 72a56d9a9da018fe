"""One safetensors file: its header, checked, and reading byte ranges of it.

Nothing is mapped into memory: mapped pages count as the process's own and stay. Ranges are read straight to where they
belong, by any number of threads.
"""

import dataclasses
import json
import math
import os
import pathlib
import weakref

import numpy as np

from refusal_jax.errors import shown
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


class LocalFile:
    """A file on a disk."""

    def __init__(self, path: pathlib.Path):
        """Raises OSError if the file cannot be opened."""
        self.path = path
        if not os.path.isfile(path) and os.path.exists(path) and not os.path.isdir(path):
            raise OSError("it is a device or a pipe, no file")  # opening one may wait forever
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.number)
        self.size = os.fstat(self.number).st_size

    def read_into(self, offsets, length: int, target: memoryview) -> int:
        """Fills `target` with `length` bytes from each offset, one after the other; returns how many were read.

        Raises OSError if the disk fails or the file ends before that.
        """
        for i, offset in enumerate(offsets):
            part, offset = target[i * length : (i + 1) * length], int(offset)
            while len(part):
                count = os.preadv(self.number, [part], offset)
                if not count:
                    raise OSError(f"it ends at byte {offset:,}, though it had {self.size:,}")
                part, offset = part[count:], offset + count
        return length * len(offsets)


@dataclasses.dataclass(frozen=True)
class Extent:
    """A tensor in a file: safetensors' name of its dtype, its shape, and its bytes `start` to `stop` of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself: the header's bytes, the metadata in it, and its tensors in file order."""

    text: bytes
    metadata: dict[str, str]
    tensors: dict[str, Extent]


def read_header(file) -> Header:
    """The header of an open file (`LocalFile` or alike), whose every number has been checked against the file.

    Raises UserError if the file is truncated, damaged or something else, OSError if it cannot be read.
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
        raise damaged(file.path, found) from None


def _header_text(file) -> bytes:
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
    """A tensor from its entry in the header. Raises ValueError for an entry that contradicts itself."""

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


def segments(shape: tuple[int, ...], index: tuple[slice, ...]) -> tuple[np.ndarray, int, tuple[int, ...]]:
    """Where in a row-major array of `shape` the values of `array[index]` are: where each run begins, a run's length (both
    in values), and the selected shape. Slices have no step."""
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

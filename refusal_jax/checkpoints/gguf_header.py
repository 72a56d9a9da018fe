"""Reads the header of a GGUF file, which holds the model's settings, its tokenizer, and where its tensors are.

A header is trusted only after each of its numbers has been checked against the file: the gguf library's own reader follows
them unchecked. The names of types and their sizes are that library's.
"""

import dataclasses
import functools
import math
import pathlib
import re
import struct
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from refusal_jax.checkpoints.safetensors import LocalFile, RangeFile, reading
from refusal_jax.errors import UserError, shown
from refusal_jax.files import damaged

MAGIC = b"GGUF"
VERSIONS = (2, 3)
HEADER_LIMIT = 256 << 20  # bytes; vocabularies of a quarter million tokens take 15 MB
CHUNK = 4 << 20  # bytes of the header that are read at a time
MOST_AXES = 4
SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}
SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.S)  # the name of one file of several


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor of a GGUF file: its type, its shape as HF writes it (slowest axis first), and where its bytes begin."""

    name: str
    path: pathlib.Path
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        """Returns how many bytes a row takes, which is the last axis."""
        block, size = GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // block * size

    @property
    def rows(self) -> int:
        """Returns the number of rows, along all axes but the last."""
        return math.prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes


@dataclasses.dataclass(frozen=True)
class GgufHeader:
    """The checked header of one GGUF model, of all its files together.

    paths: the files, in order. metadata: the values of the first file by key. tensors: of all files, by name. text: the
    first file's header as it stands there.
    """

    paths: tuple[pathlib.Path, ...]
    metadata: dict[str, Any]
    tensors: dict[str, Stored]
    text: bytes


def read_gguf(path: pathlib.Path) -> GgufHeader:
    """Reads the header of a GGUF file and, if it is one of several that belong together, of all of them.

    A header that has been read is kept until its files change. Raises UserError if a file is missing, truncated, damaged or of
    another format.
    """
    paths = split_paths(path)
    with reading(path):
        stats = [part.stat() for part in paths]
    return _read_all(paths, tuple((s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for s in stats))


@functools.lru_cache(maxsize=2)
def _read_all(paths: tuple[pathlib.Path, ...], stamps: tuple) -> GgufHeader:
    """Reads the headers of all files of a model. stamps: what changes when the files do."""
    path = paths[0]
    found = [_read_one(part) for part in paths]
    metadata, tensors = found[0][0], {}
    count = metadata.get("split.count", 1)
    if count not in (0, len(paths)):
        raise UserError(
            f"{paths[0]} says that its model is split into {shown(count)} files, but its name speaks of {len(paths)}. Give the "
            "files their original names, NAME-00001-of-0000N.gguf, and keep them in one folder."
        )
    for number, (part, (own, held, _)) in enumerate(zip(paths, found, strict=True)):
        if len(paths) > 1 and own.get("split.no") != number:
            raise UserError(
                f"{part} says that it is file {shown(own.get('split.no'))} of its model, counted from 0, and its name that it is "
                f"{number}. Files were renamed or swapped: download them again."
            )
        twice = sorted(held.keys() & tensors.keys())
        if twice:
            raise UserError(
                f"{part} holds {twice[0]}, which {tensors[twice[0]].path.name} holds too. The files are not of one model: "
                "download them again."
            )
        tensors |= held
    total = metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise UserError(
            f"{path} says that its model has {shown(total)} tensors, and its files hold {len(tensors)}. Download all of its "
            "files again."
        )
    return GgufHeader(paths, metadata, tensors, found[0][2])


def split_paths(path: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """Returns all files of the model that a GGUF file belongs to, by its name. Raises UserError if one is missing."""
    match = SPLIT.fullmatch(path.name)
    if not match:
        return (path,)
    count = int(match[3])
    if not 1 <= int(match[2]) <= count:
        raise UserError(f"{path} is no file of {count}: files are counted from 00001. Give it its original name.")
    paths = tuple(path.with_name(f"{match[1]}-{i:05d}-of-{match[3]}.gguf") for i in range(1, count + 1))
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"{path.parent} lacks {len(missing)} of the {count} files of {match[1]}: {', '.join(missing[:3])}{more}. Download "
            "all of them into one folder."
        )
    return paths


def _read_one(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Stored], bytes]:
    """Reads one file's metadata, its tensors and its header's bytes."""
    with reading(path):
        file = LocalFile(path)
        try:
            cursor = Cursor(file)
            _check_start(cursor)
            tensor_count, key_count = cursor.number("<u8"), cursor.number("<u8")
            cursor.check_count(key_count, 13)  # the least that a key, its type and a value take
            metadata = {}
            for _ in range(key_count):
                key = cursor.text()
                if key in metadata:
                    raise ValueError(f"it gives {shown(key)} twice")
                metadata[key] = _value(cursor, key)
            tensors = _tensors(cursor, tensor_count, metadata, path)
            return metadata, tensors, cursor.read_so_far
        except (ValueError, struct.error, RecursionError) as error:
            found = f"is not a readable GGUF file ({str(error)[:500]}; it has {file.size:,} bytes)"
            raise damaged(path, found) from None


def _check_start(cursor: "Cursor") -> None:
    """Raises ValueError unless the file begins as a GGUF file of a version that is read here."""
    magic = bytes(cursor.take(4))
    if magic != MAGIC:
        raise ValueError(f"it begins with {magic!r} instead of {MAGIC!r}")
    version = cursor.number("<u4")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in VERSIONS:
            raise ValueError(
                "its numbers are big-endian, for machines that are hardly used any more, and only little-endian files are read"
            )
        raise ValueError(f"it is of version {version}, and versions {VERSIONS[0]} and {VERSIONS[1]} are read")


class Cursor:
    """Reads a file from its beginning on, and never beyond its end. at: the next byte. data: what was read so far."""

    def __init__(self, file: RangeFile):
        self.file, self.at, self.data = file, 0, bytearray()

    @property
    def read_so_far(self) -> bytes:
        return bytes(memoryview(self.data)[: self.at])

    def take(self, count: int) -> bytearray:
        """Returns the next bytes. Raises ValueError if the file or what may be a header ends before them."""
        start, self.at = self.at, self.at + count
        if self.at > len(self.data):
            self._fetch(start, count)
        return self.data[start : self.at]

    def _fetch(self, start: int, count: int) -> None:
        """Reads on, so that `count` bytes from `start` on are there."""
        if start + count > self.file.size:
            raise ValueError(f"its header has {count:,} bytes from byte {start:,} on, which is beyond its end")
        if start + count > HEADER_LIMIT:
            raise ValueError(f"its header has more than {HEADER_LIMIT:,} bytes")
        have = len(self.data)
        new = bytearray(min(max(start + count, have + CHUNK), self.file.size) - have)
        self.file.read_into([have], len(new), memoryview(new))
        self.data += new

    def check_count(self, count: int, least: int) -> None:
        """Raises ValueError for a number of entries, each of `least` bytes or more, that cannot be in the rest of the file."""
        if count * least > self.file.size - self.at:
            raise ValueError(f"its header speaks of {count:,} entries at byte {self.at:,}, more than the file can hold")

    def number(self, dtype: str) -> Any:
        """Returns the next number, of a NumPy dtype, as Python's."""
        return np.frombuffer(self.take(np.dtype(dtype).itemsize), dtype)[0].item()

    def text(self) -> str:
        """Returns the next text. Raises ValueError if it is not UTF-8."""
        return self.take(int.from_bytes(self.take(8), "little")).decode()

    def texts(self, count: int) -> list[str]:
        """Returns the next texts."""
        self.check_count(count, 8)
        take, found = self.take, []
        for _ in range(count):  # of which there are hundreds of thousands
            found.append(take(int.from_bytes(take(8), "little")).decode())
        return found


def _value(cursor: Cursor, key: str) -> Any:
    """Reads a value of the metadata: a number, a text, or a list of either."""
    kind = cursor.number("<u4")
    if kind == GGUFValueType.STRING:
        return cursor.text()
    if kind in SCALARS:
        return cursor.number(SCALARS[GGUFValueType(kind)])
    if kind != GGUFValueType.ARRAY:
        raise ValueError(f"{shown(key)} has a value of the unknown type {kind}")
    kind, count = cursor.number("<u4"), cursor.number("<u8")
    if kind == GGUFValueType.STRING:
        return cursor.texts(count)
    if kind not in SCALARS:
        raise ValueError(f"{shown(key)} is a list of the unknown type {kind}")
    dtype = np.dtype(SCALARS[GGUFValueType(kind)])
    cursor.check_count(count, dtype.itemsize)
    return np.frombuffer(cursor.take(count * dtype.itemsize), dtype).tolist()


def _tensors(cursor: Cursor, count: int, metadata: dict, path: pathlib.Path) -> dict[str, Stored]:
    """Reads the list of tensors. Raises ValueError for one that is not wholly in the file, or overlaps another."""
    cursor.check_count(count, 24)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {shown(alignment)}, expected a power of two")
    tensors: dict[str, Stored] = {}
    for _ in range(count):
        tensor = _tensor(cursor, path)
        if tensor.name in tensors:
            raise ValueError(f"it holds {shown(tensor.name)} twice")
        if tensor.start % alignment:
            raise ValueError(f"{shown(tensor.name)} begins at byte {tensor.start:,} of the data, which is not aligned")
        tensors[tensor.name] = tensor
    base = -(-cursor.at // alignment) * alignment
    tensors = {name: dataclasses.replace(t, start=base + t.start) for name, t in tensors.items()}
    end = base
    for tensor in sorted(tensors.values(), key=lambda t: t.start):
        if tensor.start < end:
            raise ValueError(f"{shown(tensor.name)} overlaps the tensor before it")
        end = tensor.start + tensor.nbytes
        if end > cursor.file.size:
            raise ValueError(f"{shown(tensor.name)} ends at byte {end:,}, beyond the file's end")
    return tensors


def _tensor(cursor: Cursor, path: pathlib.Path) -> Stored:
    """Reads a tensor's entry, its place still counted from where the data begin."""
    name, axes = cursor.text(), cursor.number("<u4")
    if not 1 <= axes <= MOST_AXES:
        raise ValueError(f"{shown(name)} has {axes} axes, expected 1 to {MOST_AXES}")
    shape = tuple(cursor.number("<u8") for _ in range(axes))[::-1]
    kind, start = cursor.number("<u4"), cursor.number("<u8")
    if kind not in list(GGMLQuantizationType) or GGMLQuantizationType(kind) not in GGML_QUANT_SIZES:
        raise ValueError(
            f"{shown(name)} is of the unknown type {kind}: it needs a newer version of the package gguf, or is wrong"
        )
    kind = GGMLQuantizationType(kind)
    block, _ = GGML_QUANT_SIZES[kind]
    if not all(0 < size <= cursor.file.size * block for size in shape) or shape[-1] % block:
        raise ValueError(f"{shown(name)} has the shape {list(shape)}, which cannot be of {kind.name}")
    return Stored(name, path, kind, shape, start)

"""Writes copies of a checkpoint's weight files in which some tensors are edited, with several threads, for exports.

Weights that are not stored as plain numbers are written in bfloat16, in files made anew. Untouched ranges of bytes are copied
by the kernel and never pass through Python. Memory: a block of rows for each thread, whatever the size of the checkpoint.
"""

import contextlib
import dataclasses
import errno
import hashlib
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from refusal_jax.checkpoints.check import check_tensors, is_idle_bias
from refusal_jax.checkpoints.safetensors import (
    BITS,
    Header,
    LocalFile,
    RangeFile,
    framed,
    header_text,
    read_range,
    reading,
)
from refusal_jax.checkpoints.tensor_files import SINGLE, TensorFiles
from refusal_jax.checkpoints.tensors import STORED, PlainTensor, Tensor
from refusal_jax.errors import UserError
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.families import hf_shapes
from refusal_jax.models.hf_config import load_config
from refusal_jax.models.quantisation import Quantisation

COPY_BYTES = 64 << 20  # of an untouched range, in one task
BLOCK_BYTES = 256 << 10  # of a tensor, as stored, in memory at a time: what comes of it stays in a core's cache
DEQUANTISED_BYTES = 4 << 20  # the same of one that is dequantised, whose rows may be many small ranges of its file
UNPACKED_ROWS = 32  # are packed together by some formats, so that blocks should hold whole ones
SHARD_BYTES = 5 << 30  # of a weight file, at most, where a checkpoint's files are made anew
HASH_BYTES = 4 << 20
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)

Blocks = Iterable[tuple[int, np.ndarray]]  # of rows, each with its first row


@runtime_checkable
class BlockEdit(Protocol):
    """A change of one tensor, made block by block."""

    def blocks(self, blocks: Callable[[], Blocks]) -> Blocks:
        """Yields the edited blocks of a tensor whose blocks the function `blocks` gives, as often as it is called."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """A tensor that a file holds, or is to hold: what `source` reads, as `dtype` and changed by `edit`.

    dtype: by safetensors' name. source: None for a new tensor of zeros. edit: None for a tensor that stays as it is.
    written: its name in the file, where that is not `name`, the one of the family's table.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Tensor | None
    edit: BlockEdit | None = None
    written: str = ""

    @property
    def spelled(self) -> str:
        """Returns the tensor's name in its file."""
        return self.written or self.name

    @property
    def layout(self) -> tuple:
        return self.spelled, self.dtype, self.shape

    @property
    def numpy_dtype(self) -> np.dtype:
        return np.dtype(STORED[self.dtype])

    @property
    def size(self) -> int:
        """Returns the tensor's size in bytes."""
        return math.prod(self.shape) * BITS[self.dtype] // 8

    @property
    def count(self) -> int:
        """Returns the number of rows of a matrix, or of entries of a vector."""
        return self.shape[0] if self.shape else 1

    @property
    def width(self) -> int:
        """Returns the size in bytes of a row of a matrix, or of an entry of a vector."""
        return self.size // self.count

    @property
    def place(self) -> PlainTensor | None:
        """Returns the source if its bytes are those of this tensor before the edit."""
        same = isinstance(self.source, PlainTensor) and self.source.dtype == self.dtype
        return self.source if same and isinstance(self.source, PlainTensor) else None

    def rows(self, start: int = 0, stop: int | None = None) -> Float32[np.ndarray, "..."]:
        """Reads rows of a matrix, or entries of a vector, as they are before the edit, rounded to the tensor's dtype.

        Raises UserError if the file cannot be read.
        """
        stop = self.count if stop is None else stop
        if self.source is None:
            return np.zeros((stop - start, *self.shape[1:]), np.float32)
        values = np.empty((stop - start, *self.shape[1:]), np.float32 if self.place else self.numpy_dtype)
        index = (slice(start, stop),) if self.shape else ()
        self.source.read_into(index, values if self.shape else values.reshape(()))
        return values.astype(np.float32, copy=False)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields `rows` in blocks, each with its first row."""
        step = max((BLOCK_BYTES if self.place else DEQUANTISED_BYTES) // max(self.width, 1), 1)
        step = step // UNPACKED_ROWS * UNPACKED_ROWS or step
        for first in range(0, self.count, step if len(self.shape) > 1 else self.count):
            yield first, self.rows(first, min(first + step, self.count) if len(self.shape) > 1 else self.count)

    def written_blocks(self) -> Iterator[tuple[int, memoryview]]:
        """Yields the bytes that the source and the edit make of the tensor, block by block, each with its offset.

        Raises UserError if they are not finite.
        """
        dtype = self.numpy_dtype
        for first, block in self.blocks() if self.edit is None else self.edit.blocks(self.blocks):
            stored = block.astype(dtype, copy=False)
            suspect = block if dtype.itemsize == 4 or dtype.kind == "V" else stored  # the cast to float16 may overflow
            if not np.isfinite(suspect).all():
                raise UserError(
                    f"{self.name} holds NaN or infinite values, or gets them by the edit, as {self.dtype}. If the model loads "
                    "(`refusal-jax chat`), the edit is too large for this dtype: lower its scale, or export from a bfloat16 or "
                    "float32 checkpoint. If not, the checkpoint is damaged: download it again."
                )
            yield first * self.width, stored.data.cast("B") if dtype.kind == "f" else stored.view(np.uint8).data


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """A weight file as it is, or is to be written: its header's bytes, the metadata in it, and its tensors in the order of
    their bytes."""

    header: bytes
    metadata: dict[str, str]
    tensors: tuple[Stored, ...]

    @classmethod
    def of(cls, header: Header, tensors: Mapping[str, Tensor], written: Mapping[str, str]) -> "WeightFile":
        """Returns an open file as it is. header: of that file, from `safetensors.read_header`. tensors: those in it, and more.
        written: as in `TensorFiles`."""
        names, held = {old: new for new, old in written.items()}, []
        for old, extent in header.tensors.items():
            name = names.get(old, old)
            held.append(Stored(name, extent.dtype, extent.shape, tensors[name], written=old if name != old else ""))
        return cls(header.text, header.metadata, tuple(held))

    @property
    def size(self) -> int:
        """Returns the size of the tensors in bytes."""
        return sum(t.size for t in self.tensors)

    def holding(self, tensors: list[Stored]) -> "WeightFile":
        """Returns this file with other contents. The header stays as it is if it still describes them, and else is made anew."""
        if [t.layout for t in tensors] == [t.layout for t in self.tensors]:
            return dataclasses.replace(self, tensors=tuple(tensors))
        # Wide numbers first, as safetensors itself writes them: each must begin at a multiple of its size.
        tensors = sorted(tensors, key=lambda t: -t.size // max(math.prod(t.shape), 1))
        header = header_text([t.layout for t in tensors], self.metadata)
        return WeightFile(header, self.metadata, tuple(tensors))

    def write(self, path: pathlib.Path, pool: ThreadPoolExecutor, bar) -> str:
        """Writes the new file `path` and returns its sha256, which follows behind the threads of `pool`.

        bar: the progress in bytes. Raises UserError for values that are not finite and for sources that cannot be read,
        OSError for a disk that refuses.
        """
        head = framed(self.header)
        target = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        tasks: list[tuple[int, Future]] = []
        try:
            _write_at(target, head, 0)
            for size, work, *args in self._parts(target, len(head)):
                tasks.append((size, pool.submit(work, *args)))
            digest, at = hashlib.sha256(head), len(head)
            buffer = memoryview(bytearray(HASH_BYTES))
            for size, task in tasks:
                task.result()
                for offset in range(0, size, HASH_BYTES):
                    part = buffer[: min(HASH_BYTES, size - offset)]
                    read_range(target, at + offset, part)
                    digest.update(part)
                at += size
                bar.update(size)
            return digest.hexdigest()
        finally:
            for _, task in tasks:
                task.cancel()
            for _, task in tasks:
                with contextlib.suppress(BaseException):
                    task.result()  # no thread may write into a file that is closed
            os.close(target)

    def _parts(self, target: int, at: int) -> Iterator[tuple]:
        """Yields the tasks in the order of their bytes: size, function, arguments. Neighbouring ranges that are only
        copied are joined."""
        copied: list[PlainTensor] = []
        for tensor in (*self.tensors, None):
            place = tensor.place if tensor is not None and tensor.edit is None else None
            if copied and (
                place is None or place.file is not copied[-1].file or place.extent.start != copied[-1].extent.stop
            ):
                start, stop = copied[0].extent.start, copied[-1].extent.stop
                for first in range(start, stop, COPY_BYTES):
                    size = min(COPY_BYTES, stop - first)
                    yield size, copy_range, copied[0].file, first, target, at, size
                    at += size
                copied = []
            if place is not None:
                copied.append(place)
            elif tensor is not None:
                yield tensor.size, _write_tensor, tensor, target, at
                at += tensor.size


def _write_tensor(tensor: Stored, target: int, at: int) -> None:
    if tensor.edit is None and tensor.source is None:
        return _write_at(target, bytes(tensor.size), at)
    with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is looked at
        for offset, data in tensor.written_blocks():
            _write_at(target, data, at + offset)


def _write_at(target: int, data, at: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(target, view, at)
        view, at = view[count:], at + count


def copy_range(source: RangeFile, start: int, target: int, at: int, size: int) -> None:
    """Copies bytes of one open file into another, in the kernel where it can.

    Raises UserError if the source cannot be read, OSError for a disk that refuses.
    """
    while size:
        count = _copy_in_kernel(source.number, start, target, at, size) if isinstance(source, LocalFile) else 0
        if not count:
            data = memoryview(bytearray(min(size, HASH_BYTES)))
            with reading(source.path):
                source.read_into([start], len(data), data)
            _write_at(target, data, at)
            count = len(data)
        start, at, size = start + count, at + count, size - count


def _copy_in_kernel(source: int, start: int, target: int, at: int, size: int) -> int:
    """Returns how many bytes were copied: 0 where the system or the file systems cannot, or where the source ends."""
    try:
        return os.copy_file_range(source, target, size, start, at)
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", None) in DISK_ERRORS:
            raise
        return 0


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An HF checkpoint folder: its config, its weight files, and its tensors by name.

    quantisation: how the weights are stored, where they are dequantised as they are read. anew: whether `files` are not those of
    the folder but of a copy, as the weights do not stand in files of safetensors as they are.
    """

    folder: pathlib.Path
    cfg: ModelConfig
    files: dict[pathlib.Path, WeightFile]
    tensors: dict[str, Stored]
    quantisation: Quantisation | None = None
    anew: bool = False

    @classmethod
    def open(cls, folder: pathlib.Path) -> "Checkpoint":
        """Opens a checkpoint's files. Raises UserError for a config, an index, files or tensors that cannot be used, as loading
        would."""
        cfg, found = load_config(folder), TensorFiles.open(folder)
        check_tensors(cfg, found)
        anew = not all(isinstance(tensor, PlainTensor) for tensor in found.tensors.values())
        if anew:
            needed = hf_shapes(cfg).keys()
            idle = {name for name in found.tensors if name not in needed and is_idle_bias(found, name)}
            files = copied_files(folder, found, idle)
        else:
            files = {
                path: WeightFile.of(header, found.tensors, found.written) for path, header in found.headers.items()
            }
        tensors = {t.name: t for file in files.values() for t in file.tensors}
        return cls(folder, cfg, files, tensors, found.quantisation, anew)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Float32[np.ndarray, "..."]:
        """Reads rows of a tensor, all by default."""
        return self.tensors[name].rows(start, stop)


def copied_files(folder: pathlib.Path, found: TensorFiles, without: Set[str]) -> dict[pathlib.Path, WeightFile]:
    """Returns the files of a copy of a checkpoint as safetensors, by the paths that they would have in its folder.

    without: names of tensors that are left out. Quantised weights and all matrices beside them are in bfloat16. Vectors that are
    stored in float32 stay so: some models need it, such as for a router's corrections, and they are small.
    """
    shards: list[list[Stored]] = [[]]
    for name in sorted(found.tensors.keys() - without, key=in_order):
        tensor = found.tensors[name]
        kept = found.quantisation is None or tensor.dtype not in STORED
        kept = kept or (tensor.dtype == "F32" and len(tensor.shape) < 2)
        one = Stored(name, tensor.dtype if kept else "BF16", tensor.shape, tensor)
        if shards[-1] and sum(t.size for t in shards[-1]) + one.size > SHARD_BYTES:
            shards.append([])
        shards[-1].append(one)
    many = len(shards) > 1
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" if many else SINGLE for i in range(1, len(shards) + 1)]
    empty = WeightFile(b"", {"format": "pt"}, ())
    return {folder / name: empty.holding(shard) for name, shard in zip(names, shards, strict=True)}


def in_order(name: str) -> list[tuple[str, int]]:
    """Returns what to sort names by, so that layer 10 comes after layer 9."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D+)(\d*)", name)]

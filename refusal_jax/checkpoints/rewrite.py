"""Writes copies of safetensors files in which some tensors are edited, with several threads, for exports.

Untouched ranges of bytes are copied by the kernel and never pass through Python. Memory: a block of rows for each thread,
whatever the size of the checkpoint.
"""

import contextlib
import dataclasses
import errno
import hashlib
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from refusal_jax.checkpoints.check import check_tensors
from refusal_jax.checkpoints.safetensors import (
    Header,
    LocalFile,
    RangeFile,
    framed,
    header_text,
    read_range,
    reading,
)
from refusal_jax.checkpoints.tensor_files import STORED, TensorFiles
from refusal_jax.errors import UserError
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.hf_config import load_config

COPY_BYTES = 64 << 20  # of an untouched range, in one task
BLOCK_BYTES = 256 << 10  # of a tensor, as stored, in memory at a time: what comes of it stays in a core's cache
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
    """A tensor that a file holds, or is to hold: bytes `start` to `stop` of `file`, changed by `edit`.

    dtype: by safetensors' name. file: None for a new tensor of zeros. edit: None for a tensor that stays as it is.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: RangeFile | None
    start: int
    stop: int
    edit: BlockEdit | None = None

    @property
    def layout(self) -> tuple:
        return self.name, self.dtype, self.shape

    @property
    def numpy_dtype(self) -> np.dtype:
        return np.dtype(STORED[self.dtype])

    @property
    def size(self) -> int:
        """Returns the tensor's size in bytes."""
        return self.stop - self.start

    @property
    def count(self) -> int:
        """Returns the number of rows of a matrix, or of entries of a vector."""
        return self.shape[0] if self.shape else 1

    @property
    def width(self) -> int:
        """Returns the size in bytes of a row of a matrix, or of an entry of a vector."""
        return self.size // self.count

    def rows(self, start: int = 0, stop: int | None = None) -> Float32[np.ndarray, "..."]:
        """Reads rows of a matrix, or entries of a vector, as they are before the edit.

        Raises UserError if the file cannot be read.
        """
        stop = self.count if stop is None else stop
        data = bytearray((stop - start) * self.width)
        if self.file is not None:
            with reading(self.file.path):
                self.file.read_into([self.start + start * self.width], len(data), memoryview(data))
        values = np.frombuffer(data, self.numpy_dtype)
        return values.astype(np.float32, copy=False).reshape(-1, *self.shape[1:])

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields `rows` in blocks of about BLOCK_BYTES, each with its first row."""
        step = max(BLOCK_BYTES // self.width, 1) if len(self.shape) > 1 else self.count
        for first in range(0, self.count, step):
            yield first, self.rows(first, min(first + step, self.count))

    def edited_blocks(self, edit: BlockEdit) -> Iterator[tuple[int, memoryview]]:
        """Yields the bytes that an edit makes of the tensor, block by block, each with its offset.

        Raises UserError if they are not finite.
        """
        dtype = self.numpy_dtype
        for first, block in edit.blocks(self.blocks):
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
    def of(cls, file: RangeFile, header: Header) -> "WeightFile":
        """Returns an open file as it is. header: of that file, from `safetensors.read_header`."""
        tensors = (Stored(name, e.dtype, e.shape, file, e.start, e.stop) for name, e in header.tensors.items())
        return cls(header.text, header.metadata, tuple(tensors))

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
        header = header_text([(t.name, t.dtype, t.shape) for t in tensors], self.metadata)
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
        copied: list[Stored] = []
        for tensor in (*self.tensors, None):
            if copied and (
                tensor is None
                or tensor.edit is not None
                or tensor.file is not copied[-1].file
                or tensor.start != copied[-1].stop
            ):
                start, stop = copied[0].start, copied[-1].stop
                for first in range(start, stop, COPY_BYTES):
                    size = min(COPY_BYTES, stop - first)
                    yield size, copy_range, copied[0].file, first, target, at, size
                    at += size
                copied = []
            if tensor is None:
                return
            if tensor.edit is not None or tensor.file is None:
                yield tensor.size, _write_tensor, tensor, target, at
                at += tensor.size
            else:
                copied.append(tensor)


def _write_tensor(tensor: Stored, target: int, at: int) -> None:
    if tensor.edit is None:
        return _write_at(target, bytes(tensor.size), at)
    with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is looked at
        for offset, data in tensor.edited_blocks(tensor.edit):
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
    """An HF checkpoint folder: its config, its weight files, and its tensors by name."""

    folder: pathlib.Path
    cfg: ModelConfig
    files: dict[pathlib.Path, WeightFile]
    tensors: dict[str, Stored]

    @classmethod
    def open(cls, folder: pathlib.Path) -> "Checkpoint":
        """Opens a checkpoint's files. Raises UserError for a config, an index, files or tensors that cannot be used, as loading
        would."""
        cfg, found = load_config(folder), TensorFiles.open(folder)
        check_tensors(cfg, found)
        files = {path: WeightFile.of(found.handles[path], header) for path, header in found.headers.items()}
        return cls(folder, cfg, files, {t.name: t for file in files.values() for t in file.tensors})

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Float32[np.ndarray, "..."]:
        """Reads rows of a tensor, all by default."""
        return self.tensors[name].rows(start, stop)

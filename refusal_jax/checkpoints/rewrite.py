"""Safetensors files as byte ranges: rows of tensors read without mapping a file, and edited copies written by several
threads, of which untouched ranges never pass through Python.

Memory: a block of rows for each thread, whatever the size of the checkpoint. safetensors itself has checked the headers.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import pathlib
import struct
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from refusal_jax.checkpoints.load import STORED, TensorFiles, check_tensors, checkpoint_files
from refusal_jax.errors import UserError
from refusal_jax.models.config import ModelConfig, load_config

COPY_BYTES = 64 << 20  # of an untouched range, in one task
BLOCK_BYTES = 256 << 10  # of a tensor, as stored, in memory at a time: what comes of it stays in a core's cache
HASH_BYTES = 4 << 20
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """A tensor as a safetensors file holds it (dtype by safetensors' name): bytes `start` to `stop` of `file`, edited.
    file: None for a new tensor of zeros."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: pathlib.Path | None
    start: int
    stop: int
    edit: object = None  # of tensor_edits

    @property
    def layout(self) -> tuple:
        return self.name, self.dtype, self.shape

    @property
    def numpy_dtype(self) -> np.dtype:
        return np.dtype(STORED[self.dtype])

    @property
    def size(self) -> int:
        """In bytes."""
        return self.stop - self.start

    @property
    def row_bytes(self) -> int:
        """Of a row of a matrix; a vector is one row."""
        return self.size // (self.shape[0] if len(self.shape) > 1 else 1)

    def rows(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows of a matrix, or entries of a vector, as they are before the edit; float32."""
        width = self.size // self.shape[0]
        stop = self.shape[0] if stop is None else stop
        data = bytearray((stop - start) * width)
        if self.file is not None:
            with open(self.file, "rb", buffering=0) as file:
                _read_into(file.fileno(), data, self.start + start * width)
        values = np.frombuffer(data, self.numpy_dtype)
        return values.astype(np.float32, copy=False).reshape(-1, *self.shape[1:])

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """`rows` in blocks of about BLOCK_BYTES, each with its first row."""
        step = max(BLOCK_BYTES // self.row_bytes, 1) if len(self.shape) > 1 else self.shape[0]
        for first in range(0, self.shape[0], step):
            yield first, self.rows(first, min(first + step, self.shape[0]))

    def edited_blocks(self) -> Iterator[tuple[int, bytes]]:
        """Its edited bytes, block by block, each with its offset. Raises UserError if they are not finite."""
        dtype, width = self.numpy_dtype, self.size // self.shape[0]
        for first, block in self.edit.blocks(self.blocks):
            stored = block.astype(dtype, copy=False)
            suspect = block if dtype.itemsize == 4 or dtype.kind == "V" else stored  # the cast to float16 may overflow
            if not np.isfinite(suspect).all():
                raise UserError(
                    f"{self.name} holds NaN or infinite values, or gets them by the edit, as {self.dtype}. If the model loads "
                    "(`refusal-jax chat`), the edit is too large for this dtype: lower its scale, or export from a bfloat16 or "
                    "float32 checkpoint. If not, the checkpoint is damaged: download it again."
                )
            yield first * width, stored.data.cast("B") if dtype.kind == "f" else stored.view(np.uint8).data


def _read_into(fd: int, buffer, at: int) -> None:
    """Fills `buffer` from offset `at`. Raises OSError at a file's early end."""
    view = memoryview(buffer).cast("B")
    while view:
        count = os.preadv(fd, [view], at)
        if not count:
            raise OSError(f"a weight file ended at byte {at}, before its header says so")
        view, at = view[count:], at + count


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """A safetensors file: its header's bytes, the metadata in it, and its tensors in the order of their bytes."""

    header: bytes
    metadata: dict
    tensors: tuple[Stored, ...]

    @classmethod
    def read(cls, path: pathlib.Path) -> "WeightFile":
        """From a file whose header safetensors has accepted."""
        with open(path, "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = file.read(size)
        entries = json.loads(header)
        metadata = entries.pop("__metadata__", {})
        tensors = [
            Stored(name, e["dtype"], tuple(e["shape"]), path, *(8 + size + offset for offset in e["data_offsets"]))
            for name, e in entries.items()
        ]
        return cls(header, metadata, tuple(sorted(tensors, key=lambda tensor: tensor.start)))

    @property
    def size(self) -> int:
        """Of its tensors, in bytes."""
        return sum(t.size for t in self.tensors)

    def holding(self, tensors: list[Stored]) -> "WeightFile":
        """This file with other contents. The header stays as it is if it still describes them, and else is made anew."""
        if [t.layout for t in tensors] == [t.layout for t in self.tensors]:
            return dataclasses.replace(self, tensors=tuple(tensors))
        # Wide numbers first, as safetensors itself writes them: each must begin at a multiple of its size.
        tensors = sorted(tensors, key=lambda t: -t.size // max(math.prod(t.shape), 1))
        entries, end = {"__metadata__": self.metadata} if self.metadata else {}, 0
        for t in tensors:
            start, end = end, end + t.size
            entries[t.name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": [start, end]}
        header = json.dumps(entries, separators=(",", ":")).encode()
        return WeightFile(header + b" " * (-len(header) % 8), self.metadata, tuple(tensors))

    def write(self, path: pathlib.Path, pool: ThreadPoolExecutor, bar) -> str:
        """Writes the new file `path` and returns its sha256, which follows behind the threads of `pool`.

        bar: a tqdm of bytes. Raises UserError for values that are not finite, OSError for a disk that refuses.
        """
        head = struct.pack("<Q", len(self.header)) + self.header
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
                    _read_into(target, part, at + offset)
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
        """What is to be done, in the order of the bytes: size, function, arguments. Neighbours that are only copied go
        together."""
        copied: list[Stored] = []
        for tensor in (*self.tensors, None):
            if copied and (
                tensor is None or tensor.edit or tensor.file != copied[-1].file or tensor.start != copied[-1].stop
            ):
                start, stop = copied[0].start, copied[-1].stop
                for first in range(start, stop, COPY_BYTES):
                    size = min(COPY_BYTES, stop - first)
                    yield size, copy_range, copied[0].file, first, target, at, size
                    at += size
                copied = []
            if tensor is None:
                return
            if tensor.edit or tensor.file is None:
                yield tensor.size, _write_tensor, tensor, target, at
                at += tensor.size
            else:
                copied.append(tensor)


def _write_tensor(tensor: Stored, target: int, at: int) -> None:
    if tensor.edit is None:
        return _write_at(target, bytes(tensor.size), at)
    with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is looked at
        for offset, data in tensor.edited_blocks():
            _write_at(target, data, at + offset)


def _write_at(target: int, data, at: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(target, view, at)
        view, at = view[count:], at + count


def copy_range(source: pathlib.Path, start: int, target: int, at: int, size: int) -> None:
    """Copies bytes of a file into an open one, in the kernel where it can."""
    with open(source, "rb", buffering=0) as file:
        while size:
            try:
                count = os.copy_file_range(file.fileno(), target, size, start, at)
            except (AttributeError, OSError) as error:  # another system, or file systems that cannot
                if getattr(error, "errno", None) in DISK_ERRORS:
                    raise
                data = os.pread(file.fileno(), min(size, HASH_BYTES), start)
                _write_at(target, data, at)
                count = len(data)
            if not count:
                raise OSError(f"{source.name} ended before its header says so")
            start, at, size = start + count, at + count, size - count


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An HF checkpoint folder: its config, its weight files, and its tensors by name."""

    folder: pathlib.Path
    cfg: ModelConfig
    files: dict[pathlib.Path, WeightFile]
    tensors: dict[str, Stored]

    @classmethod
    def open(cls, folder: pathlib.Path) -> "Checkpoint":
        """Raises UserError for a config, an index, files or tensors that cannot be used, as loading would."""
        cfg = load_config(folder)
        check_tensors(cfg, TensorFiles.open(folder))
        files = {path: WeightFile.read(path) for path in checkpoint_files(folder)[0]}
        return cls(folder, cfg, files, {t.name: t for file in files.values() for t in file.tensors})

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows of a tensor, float32."""
        return self.tensors[name].rows(start, stop)

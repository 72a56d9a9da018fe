"""Finds the tensors of a checkpoint folder and reads slices of them, whichever file, on a disk or in a store, holds them.

Only safetensors are read; pickled weights are refused.
"""

import dataclasses
import os
import pathlib
import threading
from types import EllipsisType
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped

from refusal_jax.checkpoints.remote import STUB, RemoteFile, is_there, stub_of
from refusal_jax.checkpoints.safetensors import (
    FLOATS,
    Extent,
    Header,
    LocalFile,
    RangeFile,
    read_header,
    reading,
    segments,
)
from refusal_jax.errors import UserError
from refusal_jax.files import damaged, read_json
from refusal_jax.models.hf_config import adapter_advice

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
STORED = {
    name: FLOATS[name] for name in ("F32", "F16", "BF16")
}  # the dtypes that weights may have, by safetensors' names
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
        stored = np.dtype(STORED[self.dtype])
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


@dataclasses.dataclass
class TensorFiles:
    """The open weight files of a checkpoint folder, and the tensors in them by name.

    headers: of each safetensors file. bytes_read: how many bytes of tensors have been read so far, headers apart.
    """

    folder: pathlib.Path
    tensors: dict[str, Tensor]
    handles: dict[pathlib.Path, RangeFile]
    headers: dict[pathlib.Path, Header]
    bytes_read: int = 0
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    @classmethod
    def open(cls, folder: pathlib.Path) -> "TensorFiles":
        """Opens all weight files and reads their headers.

        Raises UserError for missing, corrupt or outside files, and for tensors that are held twice.
        """
        paths, weight_map = checkpoint_files(folder)
        opened = cls(folder, {}, {}, {})
        problems = []
        for path in paths:
            with reading(path):
                stub = stub_of(path)
                file = opened.handles[path] = RemoteFile(stub) if stub else LocalFile(path)
                header = opened.headers[path] = read_header(file)
            for name, extent in header.tensors.items():
                if name in opened.tensors:
                    problems.append(f"{name} is in both {opened.tensors[name].path.name} and {path.name}")
                    continue
                opened.tensors[name] = PlainTensor(name, path, file, extent)
        for name, file in weight_map.items():
            if name not in opened.tensors or opened.tensors[name].path != folder / file:
                problems.append(f"{INDEX} places {name} in {file}, which does not hold it")
        if problems:
            raise UserError(
                f"The weight files of {folder} contradict each other: {listed(problems)}. They may come from two checkpoints "
                f"or a save that was interrupted: remove *.safetensors and {INDEX}, and get them all from one place."
            )
        return opened

    def read(self, name: str, index: tuple[slice, ...] | EllipsisType = ()) -> Shaped[np.ndarray, "..."]:
        """Reads a tensor of a dtype of STORED, or only the part that `index` (slices without steps) selects.

        Raises UserError if the file cannot be read.
        """
        tensor = self.tensors[name]
        out = np.empty(segments(tensor.shape, () if index is ... else index)[2], STORED[tensor.dtype])
        self.read_into(name, index, out)
        return out

    def read_into(self, name: str, index: tuple[slice, ...] | EllipsisType, out: Shaped[np.ndarray, "..."]) -> None:
        """Reads as `read` does into a row-major array of the selected shape; values are cast to its dtype.

        Raises UserError if the file cannot be read.
        """
        count = self.tensors[name].read_into(() if index is ... else index, out)
        with self.lock:
            self.bytes_read += count


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


def checkpoint_files(folder: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, str]]:
    """Returns the paths of a checkpoint's safetensors files, and the index's weight map (empty for a single file).

    Raises UserError if there are none, if the index is malformed, or if it names files outside the folder.
    """
    if os.path.lexists(folder / INDEX):
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise damaged(folder / INDEX, "has no usable weight_map, the file of each tensor by name")
        names = sorted(set(weight_map.values()))
        if is_there(folder / SINGLE) and SINGLE not in names:
            raise UserError(
                f"{folder} holds both {SINGLE} and {INDEX}, which names other files: it is not clear which weights count. "
                "Remove one of the two."
            )
        outside = [n for n in names if pathlib.PurePath(n).name != n or n in ("", ".", "..")]
        if outside:
            raise UserError(
                f"{folder / INDEX} names files outside the checkpoint's folder: {listed(outside)}. Do not "
                "use this checkpoint: no tool writes such an index by accident."
            )
        missing = [n for n in names if not is_there(folder / n)]
        if missing:
            raise UserError(
                f"{folder} lacks {len(missing)} of the {len(names)} weight files that {INDEX} names: "
                f"{listed(missing)}. The download is incomplete: resume it."
            )
        return [folder / n for n in names], weight_map
    if is_there(folder / SINGLE) or os.path.islink(folder / SINGLE):
        return [folder / SINGLE], {}
    adapter = adapter_advice(folder)
    if adapter:
        raise UserError(adapter)
    pickled = [n for n in (p.name.removesuffix(STUB) for p in folder.iterdir()) if n.endswith((".bin", ".pt"))]
    hint = (
        f" It holds pickled weights ({listed(sorted(pickled))}), which can run code when opened and are never "
        "read: convert them with transformers' save_pretrained(safe_serialization=True)."
        if pickled
        else " Download *.safetensors into it."
    )
    raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}.{hint}")


def listed(items: list[str], most: int = 6) -> str:
    """Returns the first few of many items as text for an error message."""
    shown = "; ".join(item if len(item) <= 200 else f"{item[:200]}…" for item in map(str, items[:most]))
    return shown if len(items) <= most else f"{shown}; and {len(items) - most} more"

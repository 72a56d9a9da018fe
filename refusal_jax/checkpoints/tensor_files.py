"""Finds the tensors of a checkpoint folder and reads slices of them, whichever file, on a disk or in a store, holds them.

Only safetensors are read; pickled weights are refused.
"""

import dataclasses
import os
import pathlib
import threading
from types import EllipsisType

import numpy as np
from jaxtyping import Shaped

from refusal_jax.checkpoints.remote import STUB, RemoteFile, is_there, stub_of
from refusal_jax.checkpoints.safetensors import (
    FLOATS,
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


@dataclasses.dataclass
class TensorFiles:
    """The open weight files of a checkpoint folder: which of them holds which tensor, with shapes and dtypes from the headers.

    bytes_read: how many bytes of tensors have been read so far, headers apart.
    """

    folder: pathlib.Path
    file_of: dict[str, pathlib.Path]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
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
        opened = cls(folder, {}, {}, {}, {}, {})
        problems = []
        for path in paths:
            with reading(path):
                stub = stub_of(path)
                file = opened.handles[path] = RemoteFile(stub) if stub else LocalFile(path)
                header = opened.headers[path] = read_header(file)
            for name, extent in header.tensors.items():
                if name in opened.file_of:
                    problems.append(f"{name} is in both {opened.file_of[name].name} and {path.name}")
                    continue
                opened.file_of[name], opened.shapes[name], opened.dtypes[name] = path, extent.shape, extent.dtype
        for name, file in weight_map.items():
            if opened.file_of.get(name, folder / file) != folder / file or name not in opened.file_of:
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
        shape = segments(self.shapes[name], () if index is ... else index)[2]
        out = np.empty(shape, STORED[self.dtypes[name]])
        self.read_into(name, index, out)
        return out

    def read_into(self, name: str, index: tuple[slice, ...] | EllipsisType, out: Shaped[np.ndarray, "..."]) -> None:
        """Reads as `read` does into a row-major array of the selected shape; values are cast to its dtype.

        Raises UserError if the file cannot be read.
        """
        path, stored = self.file_of[name], np.dtype(STORED[self.dtypes[name]])
        file, extent = self.handles[path], self.headers[path].tensors[name]
        begins, run, selected = segments(extent.shape, () if index is ... else index)
        if selected != out.shape or not out.flags.c_contiguous:
            raise ValueError(f"{name}: an array of shape {out.shape} cannot take {selected}")
        begins, flat = extent.start + begins * stored.itemsize, out.reshape(-1)
        if not flat.size:
            return
        with reading(path):
            if stored == out.dtype:
                count = file.read_into(begins, run * stored.itemsize, flat.view(np.uint8).data)
            else:
                count = self._cast_into(file, begins, run, stored, flat)
        with self.lock:
            self.bytes_read += count

    def _cast_into(self, file: RangeFile, begins: np.ndarray, run: int, stored: np.dtype, flat: np.ndarray) -> int:
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

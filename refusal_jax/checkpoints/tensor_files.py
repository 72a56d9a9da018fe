"""Finds the tensors of a checkpoint folder and reads slices of them, whichever file, on a disk or in a store, holds them.

Only safetensors and GGUF files are read; pickled weights are refused. Quantised weights are dequantised as they are read.
"""

import dataclasses
import os
import pathlib
import threading
from types import EllipsisType

import numpy as np
from jaxtyping import Shaped

from refusal_jax.checkpoints.adapters import adapted, adapter_parts
from refusal_jax.checkpoints.gguf_mirror import gguf_files, open_gguf
from refusal_jax.checkpoints.mirrors import STUB, is_there, stub_of
from refusal_jax.checkpoints.quantised.formats import dequantised
from refusal_jax.checkpoints.ranges import open_stub
from refusal_jax.checkpoints.safetensors import Header, LocalFile, RangeFile, read_header, reading, segments
from refusal_jax.checkpoints.tensors import STORED, PlainTensor, Tensor, listed
from refusal_jax.errors import UserError
from refusal_jax.files import damaged, read_json
from refusal_jax.models.hf_config import adapter_advice, load_config
from refusal_jax.models.quantisation import Quantisation, read_quantisation

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclasses.dataclass
class TensorFiles:
    """The open weight files of a checkpoint folder, and the tensors in them by name.

    headers: of each safetensors file. quantisation: how the weights are stored, where they are dequantised as they are read.
    bytes_read: how many bytes of tensors have been read so far, headers apart. written: by name, what tensors are called in the
    files, where that differs.
    """

    folder: pathlib.Path
    tensors: dict[str, Tensor]
    handles: dict[pathlib.Path, RangeFile]
    headers: dict[pathlib.Path, Header]
    quantisation: Quantisation | None = None
    bytes_read: int = 0
    written: dict[str, str] = dataclasses.field(default_factory=dict)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def rename(self, names: dict[str, str]) -> None:
        """Calls tensors otherwise. names: the present names by the new ones."""
        for new, old in names.items():
            self.tensors[new] = self.tensors.pop(old)
            self.written[new] = self.written.pop(old, old)

    @classmethod
    def open(cls, folder: pathlib.Path) -> "TensorFiles":
        """Opens all weight files and reads their headers.

        Raises UserError for missing, corrupt or outside files, for tensors that are held twice, and for quantised ones that are
        not stored as config.json says.
        """
        if adapter_parts(folder) is not None:
            return cls._adapted(folder)
        if gguf_files(folder):
            return cls(folder, *open_gguf(folder), {}, read_quantisation(folder))
        paths, weight_map = checkpoint_files(folder)
        opened = cls(folder, {}, {}, {})
        problems, stored = [], {}
        for path in paths:
            with reading(path):
                stub = stub_of(path)
                file = opened.handles[path] = open_stub(stub) if stub else LocalFile(path)
                header = opened.headers[path] = read_header(file)
            for name, extent in header.tensors.items():
                if name in stored:
                    problems.append(f"{name} is in both {stored[name].path.name} and {path.name}")
                    continue
                stored[name] = PlainTensor(name, path, file, extent)
        for name, file in weight_map.items():
            if name not in stored or stored[name].path != folder / file:
                problems.append(f"{INDEX} places {name} in {file}, which does not hold it")
        if problems:
            raise UserError(
                f"The weight files of {folder} contradict each other: {listed(problems)}. They may come from two checkpoints "
                f"or a save that was interrupted: remove *.safetensors and {INDEX}, and get them all from one place."
            )
        opened.quantisation = read_quantisation(folder)
        opened.tensors = dequantised(folder, stored, opened.quantisation)
        return opened

    @classmethod
    def _adapted(cls, folder: pathlib.Path) -> "TensorFiles":
        """Opens the files of the base that an adapter's mirror names, with their tensors as the adapter changes them."""
        from refusal_jax.checkpoints.check import check_tensors  # imported late, as it reads the files of this class

        parts = adapter_parts(folder)
        assert parts is not None, "whoever calls this has seen that the folder is a mirror"
        opened = cls.open(parts[1])
        check_tensors(load_config(parts[1]), opened)
        return dataclasses.replace(opened, folder=folder, tensors=adapted(folder, opened.tensors), headers={})

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

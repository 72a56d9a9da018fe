"""The tensors of a checkpoint folder: where each is, reading slices of them, and whether they are what the config says.

Total: every tensor of the checkpoint is known and used, every tensor of the decoder is found and shapes agree, or there
is one error that lists everything wrong at once. Only safetensors are read; pickled weights are refused.
"""

import dataclasses
import os
import pathlib
import threading

import ml_dtypes
import numpy as np

from refusal_jax.checkpoints.remote import STUB, RemoteFile, is_there, stub_of
from refusal_jax.checkpoints.safetensors import Header, LocalFile, read_header, segments
from refusal_jax.checkpoints.tensor_names import rename_advice, renamed, unmerged_advice
from refusal_jax.errors import UserError
from refusal_jax.files import damaged, read_json
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.families import TABLES, hf_shapes, is_spare
from refusal_jax.models.hf_attributes import adapter_advice

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
STORED = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}  # safetensors' names
CAST_VALUES = 1 << 20  # of a tensor of another dtype, read at a time
TIED_ROWS = 4096  # of an embedding, compared at a time


@dataclasses.dataclass
class TensorFiles:
    """The tensors of a checkpoint folder: which file holds which, with shapes and dtypes from the headers.

    bytes_read: of tensors, so far, headers apart.
    """

    folder: pathlib.Path
    file_of: dict[str, pathlib.Path]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    handles: dict[pathlib.Path, LocalFile | RemoteFile]
    headers: dict[pathlib.Path, Header]
    bytes_read: int = 0
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    @classmethod
    def open(cls, folder: pathlib.Path) -> "TensorFiles":
        """Raises UserError for missing, corrupt or outside files, and for tensors held twice."""
        paths, weight_map = checkpoint_files(folder)
        opened = cls(folder, {}, {}, {}, {}, {})
        problems = []
        for path in paths:
            try:
                file = opened.handles[path] = RemoteFile(path) if stub_of(path) else LocalFile(path)
                header = opened.headers[path] = read_header(file)
            except OSError as error:
                raise _unreadable(path, error) from None
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

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """One tensor of a dtype of STORED, or the part that `index` (slices without steps) selects; only that is read.

        Raises UserError if the file cannot be read.
        """
        shape = segments(self.shapes[name], () if index is ... else index)[2]
        out = np.empty(shape, STORED[self.dtypes[name]])
        self.read_into(name, index, out)
        return out

    def read_into(self, name: str, index: tuple[slice, ...], out: np.ndarray) -> None:
        """As `read`, into an array of the selected shape: row-major, of any dtype, to which values are cast.

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
        try:
            if stored == out.dtype:
                count = file.read_into(begins, run * stored.itemsize, memoryview(flat.view(np.uint8)))
            else:
                count = self._cast_into(file, begins, run, stored, flat)
        except OSError as error:
            raise _unreadable(path, error) from None
        with self.lock:
            self.bytes_read += count

    def _cast_into(self, file, begins, run: int, stored: np.dtype, flat: np.ndarray) -> int:
        """Runs of another dtype through a buffer, many at a time or each in parts; how many bytes were read."""
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
            count += file.read_into(offsets, length * stored.itemsize, memoryview(values.view(np.uint8)))
            with np.errstate(over="ignore"):  # what overflows is found, and said, once all is there
                flat[at : at + len(values)] = values
            at += len(values)
        return count


def _unreadable(path: pathlib.Path, error: OSError) -> UserError:
    return UserError(
        f"{path} could not be read ({error.strerror or error}). Check that you may read it and that nothing else changes it; "
        "if both are so, the file or its disk is damaged: download it again, to another disk if that fails."
    )


def checkpoint_files(folder: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, str]]:
    """The safetensors files of a checkpoint and the index's weight map (empty for a single file).

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
    """The first few of many, for an error message."""
    shown = "; ".join(item if len(item) <= 200 else f"{item[:200]}…" for item in map(str, items[:most]))
    return shown if len(items) <= most else f"{shown}; and {len(items) - most} more"


def check_tensors(cfg: ModelConfig, files: TensorFiles, share: tuple[int, int] = (0, 1)) -> None:
    """Raises UserError unless the checkpoint's tensors are exactly those of the config, of the right shapes.

    share: (i, n), where n processes check the same checkpoint and this is the i-th: each reads a part of what must be read.
    """
    _check_not_quantised(files)
    shapes = hf_shapes(cfg)
    missing = sorted(set(shapes) - set(files.file_of))
    extra = sorted(n for n in set(files.file_of) - set(shapes) if not is_spare(cfg, n))
    names = renamed(cfg, extra, missing)
    missing = [n for n in missing if n not in names.values()]
    extra = [n for n in extra if n not in names]
    holding = {n: n for n in shapes if n in files.file_of} | {new: n for n, new in names.items() if new in shapes}
    wrong = [
        f"{n} is {list(files.shapes[n])}, expected {list(shapes[new])}"
        for new, n in holding.items()
        if files.shapes[n] != shapes[new]
    ]
    kinds = [f"{n} is {files.dtypes[n]}" for n in holding.values() if files.dtypes[n] not in STORED]
    problems = [
        f"{len(group)} {what}: {listed(group)}"
        for what, group in (
            ("missing", missing),
            ("unknown", extra),
            ("misshapen", wrong),
            (f"of a dtype other than {', '.join(STORED)}", kinds),
        )
        if group
    ]
    advice = unmerged_advice(extra) or (rename_advice(files.folder, names) if names else "")
    if not advice and not extra and missing == [TABLES[cfg.family]["unembed"]]:
        advice = (
            "If the model's embedding is its unembedding too, config.json must say tie_word_embeddings: true. Else it was saved "
            "without its head: save it again from the AutoModelForCausalLM."
        )
    if advice or problems:
        raise UserError(
            f"The tensors of {files.folder} do not fit its config.json: {'. '.join(problems)}{'. ' * bool(problems)}"
            + (advice or "Check that config.json and the weights belong together, or download both again.")
        )
    _check_tied(cfg, files, share)


def _check_tied(cfg: ModelConfig, files: TensorFiles, share: tuple[int, int]) -> None:
    """Raises UserError if the checkpoint ties its unembedding by its config and stores another one all the same."""
    embed, unembed = (TABLES[cfg.family][path] for path in ("embed", "unembed"))
    if not cfg.tied_embeddings or unembed not in files.file_of:
        return
    same = files.shapes[embed] == files.shapes[unembed] and files.dtypes[unembed] in STORED
    part, parts = share
    stop = cfg.vocab_size * (part + 1) // parts
    for start in range(cfg.vocab_size * part // parts, stop, TIED_ROWS):
        rows = (slice(start, min(start + TIED_ROWS, stop)),)
        same = same and np.array_equal(files.read(embed, rows), files.read(unembed, rows))
    if not same:
        raise UserError(
            f"{files.folder} ties its embeddings (tie_word_embeddings in config.json) but holds an {unembed} that differs "
            f"from {embed}. Set tie_word_embeddings to false if it is meant to count, else remove the tensor."
        )


# Endings of tensor names that only quantised checkpoints have, and the format that each gives away.
QUANTISED = {
    ".g_idx": "GPTQ",
    ".qzeros": "AWQ or GPTQ",
    ".qweight": "AWQ or GPTQ",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_scale_inv": "fp8",
    ".weight_scale": "fp8",
    ".input_scale": "fp8",
}


def _check_not_quantised(files: TensorFiles) -> None:
    """Raises UserError for a quantised checkpoint whose config.json does not say so."""
    found = [(name, form) for name in files.file_of for end, form in QUANTISED.items() if name.endswith(end)]
    found += [(name, "fp8") for name, dtype in files.dtypes.items() if dtype.startswith("F8")]
    if found:
        name, form = min(found, key=lambda item: list(QUANTISED.values()).index(item[1]))
        raise UserError(
            f"The weights of {files.folder} are quantised ({form}: it holds {name}, {files.dtypes[name]}), which cannot "
            "be edited exactly. Use the original float16, bfloat16 or float32 checkpoint of the model."
        )

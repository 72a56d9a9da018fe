"""Reading and writing HF checkpoints: streamed, sharded, total.

Total: every tensor of the checkpoint is known and used, every tensor of the decoder is found, shapes agree and values
are finite, or loading fails with one error that lists everything wrong at once. Only safetensors are read; pickled
weights are refused.
"""

import dataclasses
import itertools
import pathlib
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file
from tqdm import tqdm

from refusal_jax.errors import UserError
from refusal_jax.models.config import ModelConfig, load_config
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.families import TABLES, hf_names, hf_shapes, is_spare, pieces
from refusal_jax.models.hf_attributes import read_json
from refusal_jax.models.weights import weight_table
from refusal_jax.sharding import split_for, weight_place

ROWS = 4096  # of a large tensor, read at a time
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
STORED = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}  # safetensors' names


@dataclasses.dataclass
class TensorFiles:
    """The tensors of a checkpoint folder: which file holds which, with shapes and dtypes from the headers."""

    folder: pathlib.Path
    file_of: dict[str, pathlib.Path]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    handles: dict[pathlib.Path, object]

    @classmethod
    def open(cls, folder: pathlib.Path) -> "TensorFiles":
        """Raises UserError for missing, corrupt or outside files, and for tensors held twice."""
        files, weight_map = checkpoint_files(folder)
        opened = cls(folder, {}, {}, {}, {})
        problems = []
        for path in files:
            try:
                handle = opened.handles[path] = safetensors.safe_open(path, framework="np")
            except (safetensors.SafetensorError, OSError) as error:
                raise UserError(
                    f"{path} is not a readable safetensors file ({error}). It is truncated or damaged "
                    f"({path.stat().st_size:,} bytes): download it again."
                ) from None
            for name in handle.keys():  # noqa: SIM118, a safe_open is no dict
                if name in opened.file_of:
                    problems.append(f"{name} is in both {opened.file_of[name].name} and {path.name}")
                    continue
                part = handle.get_slice(name)
                opened.file_of[name] = path
                opened.shapes[name], opened.dtypes[name] = tuple(part.get_shape()), part.get_dtype()
        for name, file in weight_map.items():
            if opened.file_of.get(name, folder / file) != folder / file or name not in opened.file_of:
                problems.append(f"{INDEX} places {name} in {file}, which does not hold it")
        if problems:
            raise UserError(
                f"The weight files of {folder} contradict each other: {listed(problems)}. Download the "
                "checkpoint again."
            )
        return opened

    def read(self, name: str, index=...) -> np.ndarray:
        """One tensor, or the part of it that `index` (a tuple of slices) selects; only that part is read."""
        if index is ...:
            return self.handles[self.file_of[name]].get_tensor(name)
        return self.handles[self.file_of[name]].get_slice(name)[index]


def checkpoint_files(folder: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, str]]:
    """The safetensors files of a checkpoint and the index's weight map (empty for a single file).

    Raises UserError if there are none, if the index is malformed, or if it names files outside the folder.
    """
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise UserError(f"{folder / INDEX} has no usable weight_map. Download the file again.")
        names = sorted(set(weight_map.values()))
        if (folder / SINGLE).exists() and SINGLE not in names:
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
        missing = [n for n in names if not (folder / n).exists()]
        if missing:
            raise UserError(
                f"{folder} lacks {len(missing)} of the {len(names)} weight files that {INDEX} names: "
                f"{listed(missing)}. The download is incomplete: resume it."
            )
        return [folder / n for n in names], weight_map
    if (folder / SINGLE).exists():
        return [folder / SINGLE], {}
    pickled = [p.name for p in folder.glob("*.bin")] + [p.name for p in folder.glob("*.pt")]
    hint = (
        f" It holds pickled weights ({listed(sorted(pickled))}), which can run code when opened and are never "
        "read: convert them with transformers' save_pretrained(safe_serialization=True)."
        if pickled
        else " Download *.safetensors into it."
    )
    raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}.{hint}")


def listed(items: list[str], most: int = 6) -> str:
    """The first few of many, for an error message."""
    shown = "; ".join(str(item) for item in items[:most])
    return shown if len(items) <= most else f"{shown}; and {len(items) - most} more"


def check_tensors(cfg: ModelConfig, files: TensorFiles) -> None:
    """Raises UserError unless the checkpoint's tensors are exactly those of the config, of the right shapes."""
    _check_not_quantised(files)
    shapes = hf_shapes(cfg)
    missing = sorted(set(shapes) - set(files.file_of))
    extra = sorted(n for n in set(files.file_of) - set(shapes) if not is_spare(cfg, n))
    wrong = [
        f"{n} is {list(files.shapes[n])}, expected {list(shape)}"
        for n, shape in shapes.items()
        if n in files.shapes and files.shapes[n] != shape
    ]
    kinds = [f"{n} is {files.dtypes[n]}" for n in shapes if n in files.dtypes and files.dtypes[n] not in STORED]
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
    if problems:
        raise UserError(
            f"The tensors of {files.folder} do not fit its config.json: {'. '.join(problems)}. Check that "
            "config.json and the weights belong together, or download both again."
        )
    _check_tied(cfg, files)


def _check_tied(cfg: ModelConfig, files: TensorFiles) -> None:
    """Raises UserError if the checkpoint ties its unembedding by its config and stores another one all the same."""
    embed, unembed = (TABLES[cfg.family][path] for path in ("embed", "unembed"))
    if not cfg.tied_embeddings or unembed not in files.file_of:
        return
    same = files.shapes[embed] == files.shapes[unembed]
    for start in range(0, cfg.vocab_size, ROWS):
        rows = (slice(start, min(start + ROWS, cfg.vocab_size)),)
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


def load_decoder(folder: str | pathlib.Path, dtype: str = "float32", mesh=None, progress: bool = False) -> Decoder:
    """The decoder of an HF checkpoint, its weights read slice by slice straight into arrays sharded over `mesh`.

    dtype: "float32", "bfloat16" or "float16", what the weights are cast to. Raises UserError for anything wrong with
    the folder, its config or its tensors (all tensors' problems in one error), and for NaN or infinite weights.
    """
    folder = pathlib.Path(folder)
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    cfg = load_config(folder)
    files = TensorFiles.open(folder)
    check_tensors(cfg, files)
    table, mesh = weight_table(cfg), split_for(mesh, cfg.n_kv_heads)

    places = {(piece.path, piece.index): piece for piece in pieces(cfg)}
    apart = {path: len(index) for path, index in places}  # leading axes that HF stores as tensors of their own

    def read(path: str) -> jax.Array:
        """One weight of the decoder, each device's part of it from the slices of the tensors that it needs."""
        weight, target = table[path], DTYPES[dtype]
        stacked = apart[path]
        shape, sharding = weight_place(mesh, weight)

        def part(index):
            wanted = [range(*i.indices(size)) for i, size in zip(index, shape, strict=True)]
            rows, rest = wanted[stacked], index[stacked + 1 :]
            whole = np.zeros([len(w) for w in wanted], target)
            for place in itertools.product(*wanted[:stacked]):
                piece = places[path, place]
                offsets = tuple(at - axis.start for at, axis in zip(place, wanted, strict=False))
                stop = min(piece.start + rows.stop, piece.stop)
                if stop > piece.start + rows.start:
                    values = files.read(piece.name, (slice(piece.start + rows.start, stop), *rest))
                    whole[offsets][: len(values)] = values.astype(target, copy=False)
            return whole

        return jax.make_array_from_callback(shape, sharding, part)

    try:
        with ThreadPoolExecutor(4) as pool:
            arrays = list(
                tqdm(
                    pool.map(read, table),
                    total=len(table),
                    desc="loading weights",
                    unit="tensor",
                    disable=not progress,
                    leave=False,
                )
            )
    except safetensors.SafetensorError as error:
        raise UserError(
            f"A weight file of {folder} could not be read ({error}). Download the checkpoint again."
        ) from None
    weights = dict(zip(table, arrays, strict=True))
    finite = jax.device_get({path: _all_finite(a) for path, a in weights.items()})
    bad = [f"{path} ({', '.join(hf_names(cfg, path)[:2])}, …)" for path, ok in finite.items() if not ok]
    if bad:
        raise UserError(
            f"{folder} holds NaN or infinite weights (as {dtype}): {listed(bad)}. The checkpoint is damaged, or "
            "its values do not fit this dtype: try bfloat16 or float32."
        )
    return Decoder(cfg, weights, mesh)


@jax.jit
def _all_finite(array):
    return jnp.isfinite(array).all()


def save_weights(decoder: Decoder, folder: pathlib.Path) -> None:
    """Writes `model.safetensors` in HF's names and layout: `load_decoder` backwards, for models of one file."""
    weights, tensors = jax.device_get(decoder.weights()), {}
    for piece in pieces(decoder.cfg):  # of fused tensors, in the order of their rows
        tensors.setdefault(piece.name, []).append(
            np.asarray(weights[piece.path])[piece.index][: piece.stop - piece.start]
        )
    whole = {name: np.ascontiguousarray(np.concatenate(parts)) for name, parts in sorted(tensors.items())}
    save_file(whole, folder / SINGLE, metadata={"format": "pt"})

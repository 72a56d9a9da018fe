"""Reading and writing HF checkpoints: streamed, sharded, total.

Total: every tensor of the checkpoint is known and used, every tensor of the decoder is found, shapes agree and values
are finite, or loading fails with one error that lists everything wrong at once. Only safetensors are read; pickled
weights are refused.
"""

import dataclasses
import json
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
from refusal_jax.models.config import ModelConfig, load_config, read_json
from refusal_jax.models.decoder import Decoder, weight_table
from refusal_jax.models.families import DERIVED, hf_names, hf_slots, optional_names
from refusal_jax.sharding import weight_sharding

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
    slots = hf_slots(cfg)
    missing = sorted(set(slots) - set(files.file_of))
    extra = sorted(n for n in set(files.file_of) - set(slots) - optional_names(cfg) if not DERIVED.search(n))
    wrong = [
        f"{n} is {list(files.shapes[n])}, expected {list(s.shape)}"
        for n, s in slots.items()
        if n in files.shapes and files.shapes[n] != s.shape
    ]
    kinds = [f"{n} is {files.dtypes[n]}" for n in slots if n in files.dtypes and files.dtypes[n] not in STORED]
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
    table = weight_table(cfg)

    def read(path: str) -> jax.Array:
        names, stacked, target = hf_names(cfg, path), path.startswith("blocks."), DTYPES[dtype]

        def part(index):
            if not stacked:
                return files.read(names[0], index).astype(target, copy=False)
            layers = range(*index[0].indices(cfg.n_layers))
            return np.stack([files.read(names[l], index[1:]).astype(target, copy=False) for l in layers])

        weight = table[path]
        return jax.make_array_from_callback(weight.shape, weight_sharding(mesh, weight.axes, weight.shape), part)

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
    return Decoder(cfg, weights)


@jax.jit
def _all_finite(array):
    return jnp.isfinite(array).all()


def save_weights(decoder: Decoder, folder: pathlib.Path) -> None:
    """Writes `model.safetensors` in HF's names and layout: `load_decoder` backwards, for models of one file."""
    tensors = {}
    for path, array in jax.device_get(decoder.weights()).items():
        names = hf_names(decoder.cfg, path)
        for name, tensor in zip(names, array if path.startswith("blocks.") else [array], strict=True):
            tensors[name] = np.ascontiguousarray(tensor)
    save_file(dict(sorted(tensors.items())), folder / SINGLE, metadata={"format": "pt"})


def hf_config(cfg: ModelConfig, dtype: str, **more) -> dict:
    """A `config.json` for a Llama-family `ModelConfig` that this project made itself."""
    rope = {"rope_type": cfg.rope.kind, "rope_theta": cfg.rope.theta}
    if cfg.rope.kind != "default":
        rope["factor"] = cfg.rope.factor
    if cfg.rope.kind == "llama3":
        rope |= {
            "low_freq_factor": cfg.rope.low_freq_factor,
            "high_freq_factor": cfg.rope.high_freq_factor,
            "original_max_position_embeddings": cfg.rope.original_context,
        }
    return json.loads(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": cfg.family,
                "vocab_size": cfg.vocab_size,
                "hidden_size": cfg.d_model,
                "num_hidden_layers": cfg.n_layers,
                "num_attention_heads": cfg.n_heads,
                "num_key_value_heads": cfg.n_kv_heads,
                "head_dim": cfg.head_dim,
                "intermediate_size": cfg.d_mlp,
                "max_position_embeddings": cfg.context_length,
                "hidden_act": cfg.activation,
                "rms_norm_eps": cfg.norm_eps,
                "rope_theta": cfg.rope.theta,
                "rope_parameters": rope,
                "tie_word_embeddings": cfg.tied_embeddings,
                "attention_bias": cfg.attention_bias,
                "mlp_bias": cfg.mlp_bias,
                "torch_dtype": dtype,
                **more,
            }
        )
    )

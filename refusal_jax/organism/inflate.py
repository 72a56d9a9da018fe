"""Makes a bigger checkpoint that computes the same logits: the demo model at the size of a benchmark or of a memory test.

Zero padding widens every axis, and layers that add nothing to the residual come in between. What makes it exact:

* RMS norm over D entries of which only d are not zero sees a mean square smaller by d / D, so eps shrinks by that
  factor and the norms' weights by its square root.
* A query head keeps its key head: group by group, padding heads go to the end of each group.
* Added tokens must not take probability. One of the added residual entries carries a constant, too small to count in
  any norm; the final norm and the added rows of the unembedding turn it into a logit far below all others.

Tensors are written one at a time, so a checkpoint of any size needs the memory of its largest tensor.
"""

import dataclasses
import math
import pathlib
import shutil

import ml_dtypes
import numpy as np
from jaxtyping import Float32

from refusal_jax.checkpoints.check import check_tensors
from refusal_jax.checkpoints.safetensors import framed, header_text
from refusal_jax.checkpoints.tensor_files import INDEX, SINGLE, TensorFiles
from refusal_jax.errors import UserError
from refusal_jax.files import cannot_write, local_path, read_json, to_json
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.families import Piece, hf_shapes, pieces
from refusal_jax.models.hf_config import load_config
from refusal_jax.models.weights import weight_table

DTYPES = {"float32": (np.dtype(np.float32), "F32"), "bfloat16": (np.dtype(ml_dtypes.bfloat16), "BF16")}
NORMS = ("attn_norm", "mlp_norm", "final_norm")
# Powers of two, exact in every dtype, whose product is the added tokens' logit at a residual of unit RMS.
CONSTANT, CONSTANT_NORM, CONSTANT_UNEMBED = 2.0**-14, 2.0**15, -(2.0**12)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The size to inflate to; the head size stays the source's. The default has 127 million parameters."""

    n_layers: int = 12
    d_model: int = 768
    n_heads: int = 24
    n_kv_heads: int = 12
    d_mlp: int = 2048
    vocab_size: int = 32000


def inflate(
    source: str | pathlib.Path,
    target: str | pathlib.Path,
    shape: Shape = Shape(),
    dtype: str = "float32",
    shard_bytes: int = 4 << 30,
) -> ModelConfig:
    """Writes to the new folder `target` a checkpoint of this shape with the logits of the one in `source`.

    dtype: of the written weights, "float32" or "bfloat16". shard_bytes: the most that one weight file holds (one tensor
    at least). Embedding and unembedding are written apart even if the source ties them. Returns the new config. Raises
    UserError for a source that is not a Llama checkpoint, a shape that cannot hold it, or a target that exists.
    """
    source, target = local_path(source), local_path(target)
    old = load_config(source)
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    _check_shape(source, old, shape)
    new = dataclasses.replace(
        old, **dataclasses.asdict(shape), norm_eps=old.norm_eps * old.d_model / shape.d_model, tied_embeddings=False
    )
    files = TensorFiles.open(source)
    check_tensors(old, files)
    try:
        target.mkdir(parents=True)
        for path in sorted(source.iterdir()):
            if path.is_file() and path.name not in ("config.json", INDEX) and path.suffix != ".safetensors":
                shutil.copyfile(path, target / path.name)
        (target / "config.json").write_bytes(to_json(_config(read_json(source / "config.json"), new, dtype)))
        _write_shards(target, new, Padding.of(files, old, new), dtype, shard_bytes)
    except FileExistsError:
        raise UserError(f"{target} exists. Pass a new folder, nothing is overwritten.") from None
    except OSError as error:
        raise cannot_write(target, error) from None
    return new


def _check_shape(source: pathlib.Path, old: ModelConfig, shape: Shape) -> None:
    """Raises UserError that lists every way in which the shape cannot hold the source."""
    if old.family != "llama":
        raise UserError(f"{source} is a {old.family} checkpoint; only Llama checkpoints can be inflated.")
    problems = [
        f"{name} = {value} is under the source's {getattr(old, name)}"
        for name, value in dataclasses.asdict(shape).items()
        if value < getattr(old, name)
    ]
    if shape.n_kv_heads < 1 or shape.n_heads % shape.n_kv_heads:
        problems.append(f"n_heads = {shape.n_heads} is not a multiple of n_kv_heads = {shape.n_kv_heads}")
    elif shape.n_heads // shape.n_kv_heads < old.queries_per_kv:
        problems.append(
            f"{shape.n_heads // shape.n_kv_heads} query heads for each kv head are under the source's "
            f"{old.queries_per_kv}, whose queries would lose their keys"
        )
    if shape.n_heads >= 1 and shape.d_model % shape.n_heads:
        problems.append(f"d_model = {shape.d_model} is not a multiple of n_heads = {shape.n_heads}, as HF demands")
    if shape.vocab_size > old.vocab_size and shape.d_model == old.d_model:
        problems.append("a larger vocab_size needs a larger d_model, by at least 1, for its tokens' logit")
    if problems:
        raise UserError(f"{source} cannot be inflated to this shape: {'; '.join(problems)}. Choose a larger shape.")


def _config(hf: dict, new: ModelConfig, dtype: str) -> dict:
    """Returns the source's config.json with the new shape."""
    hf.pop("torch_dtype", None)
    return hf | {
        "vocab_size": new.vocab_size,
        "hidden_size": new.d_model,
        "num_hidden_layers": new.n_layers,
        "num_attention_heads": new.n_heads,
        "num_key_value_heads": new.n_kv_heads,
        "head_dim": new.head_dim,
        "intermediate_size": new.d_mlp,
        "rms_norm_eps": new.norm_eps,
        "tie_word_embeddings": False,
        "dtype": dtype,
    }


def source_layers(old: int, new: int) -> dict[int, int]:
    """Returns the source layer of target layers, spread so that relative depth is kept; the other target layers add nothing."""
    return {layer * new // old: layer for layer in range(old)}


@dataclasses.dataclass(frozen=True)
class Padding:
    """A way to make the target's tensors out of the source's, one at a time.

    names: the source's tensors by path and index. index: for each logical axis of a weight, where along the target's axis the
    source's entries go.
    """

    files: TensorFiles
    old: ModelConfig
    new: ModelConfig
    names: dict[tuple, str]
    index: dict[str, np.ndarray]

    @classmethod
    def of(cls, files: TensorFiles, old: ModelConfig, new: ModelConfig) -> "Padding":
        """Lays out where the entries of a checkpoint of the config `old` go in one of `new`."""
        group = np.arange(old.n_heads) // old.queries_per_kv * new.queries_per_kv
        heads = group + np.arange(old.n_heads) % old.queries_per_kv
        within = np.arange(old.head_dim)
        index = {
            "embed": np.arange(old.d_model),
            "norm": np.arange(old.d_model),
            "heads": (heads[:, None] * old.head_dim + within).ravel(),
            "kv_heads": np.arange(old.n_kv_heads * old.head_dim),
            "mlp": np.arange(old.d_mlp),
            "vocab": np.arange(old.vocab_size),
        }
        names = {(piece.path, *piece.index): piece.name for piece in pieces(old)}
        if old.tied_embeddings:
            names["unembed",] = names["embed",]
        return cls(files, old, new, names, index)

    def tensor(self, piece: Piece, shape: tuple[int, ...]) -> Float32[np.ndarray, "..."]:
        """Makes one tensor of the target."""
        old, new, name = self.old, self.new, piece.path.removeprefix("blocks.")
        layers = source_layers(old.n_layers, new.n_layers)
        index = tuple(layers.get(layer) for layer in piece.index)
        out = np.zeros(shape, np.float32)
        if None not in index:
            axes = weight_table(new)[piece.path].axes[-len(shape) :]
            source = self.files.read(self.names[piece.path, *index]).astype(np.float32)
            if name in NORMS:
                source *= math.sqrt(old.d_model / new.d_model)
            out[np.ix_(*(self.index[axis] for axis in axes))] = source
        elif name in NORMS:
            out[:] = 1.0
        if new.vocab_size > old.vocab_size:
            constant = old.d_model  # the first added entry of the residual
            if name == "embed":
                out[:, constant] = CONSTANT
            elif name == "final_norm":
                out[constant] = CONSTANT_NORM
            elif name == "unembed":
                out[old.vocab_size :, constant] = CONSTANT_UNEMBED
        return out


def _write_shards(folder: pathlib.Path, new: ModelConfig, padding: Padding, dtype: str, shard_bytes: int) -> None:
    """Writes the weight files, and their index if there is more than one."""
    numpy_dtype, stored = DTYPES[dtype]
    shapes, made = hf_shapes(new), {piece.name: piece for piece in pieces(new)}
    shards, filled = [[]], 0
    for name, shape in shapes.items():
        size = math.prod(shape) * numpy_dtype.itemsize
        if filled and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    count = len(shards)
    files = [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for file, names in zip(files, shards, strict=True):
        header = header_text([(name, stored, shapes[name]) for name in names], {"format": "pt"})
        with open(folder / file, "wb") as out:
            out.write(framed(header))
            for name in names:
                tensor = padding.tensor(made[name], shapes[name]).astype(numpy_dtype)
                out.write(np.ascontiguousarray(tensor).view(np.uint8).data)
    if count > 1:
        total = sum(map(math.prod, shapes.values())) * numpy_dtype.itemsize
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        (folder / INDEX).write_bytes(to_json({"metadata": {"total_size": total}, "weight_map": places}))

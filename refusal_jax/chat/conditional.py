"""Conditional activation steering (CAST, arXiv 2409.05907): a vector is added to the residual stream of those prompts alone that
meet a condition.

The condition is read from the prompt, once, in a pass without any edit. With h the residual stream at the input of a block, as
the mean over the prompt's tokens or at its last one, and P the projection on a condition vector c, it is

    f = 1[cos(h, tanh(P h)) > threshold]

or with < for >, and, of several blocks, it is met where any of them meets it. Where f = 1, the behaviour is added at every token
of prompt and reply. So it is no edit of weights: what is added depends on the prompt as a whole, which no matrix sees.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from safetensors.numpy import save

from refusal_jax.axes import Array
from refusal_jax.chat.padding import TokenBatch, bucket
from refusal_jax.checkpoints.fingerprint import checkpoint_fingerprint
from refusal_jax.checkpoints.remote import checkpoint_folder
from refusal_jax.checkpoints.safetensors import read_tensors
from refusal_jax.edits import Edits
from refusal_jax.errors import UserError, setting, shown
from refusal_jax.files import read_json, to_json, write_atomically
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.finite import check_finite
from refusal_jax.models.sharding import replicate
from refusal_jax.taps import Taps

VECTORS, RECORD = "conditional.safetensors", "conditional.json"
STEERING = "steering"  # its folder in that of the defence that wrote it
SCHEMA = "refusal_jax/conditional/1"
POOLS = ("mean", "last")  # of the residual stream over a prompt's tokens
LEAST = 1e-12  # of a norm
ROWS = 32  # prompts that are read at a time
Put = Callable[[np.ndarray, np.ndarray], tuple[jax.Array, jax.Array, Edits]]


@dataclasses.dataclass(frozen=True, eq=False)
class Condition:
    """A condition on prompts.

    layers: at whose inputs the residual stream is read. vectors_cd: float32 `[c, D]`, one for each of the layers, of any norm.
    threshold: of the cosine. above: whether the condition is met above it, or below. pool: of POOLS. Raises UserError for what
    can be no condition.
    """

    layers: tuple[int, ...]
    vectors_cd: np.ndarray
    threshold: float
    above: bool = True
    pool: str = POOLS[0]

    def __post_init__(self):
        shape, norms = self.vectors_cd.shape, np.linalg.norm(self.vectors_cd, axis=-1)
        fits = self.vectors_cd.ndim == 2 and shape[0] == len(self.layers) == len(set(self.layers)) > 0
        if not fits or not np.isfinite(norms).all() or not (norms > 0).all():
            raise UserError(
                f"A condition needs a vector that is finite and not zero for each of its layers; these are {list(shape)} for "
                f"the layers {shown(list(self.layers))}."
            )
        if self.pool not in POOLS or not np.isfinite(self.threshold) or min(self.layers) < 0:
            raise UserError(
                f"A condition has the pool {shown(self.pool)}, the threshold {self.threshold} and the layers "
                f"{shown(list(self.layers))}; the pools are {', '.join(POOLS)}, thresholds are finite, and layers count from 0."
            )

    def cosines(self, decoder: Decoder, put: Put, tokens: np.ndarray, mask: np.ndarray) -> Float[np.ndarray, "B c"]:
        """Returns cos(h, tanh(P h)) of left-padded prompts at each of the layers, 0 where either is zero.

        put: puts tokens and mask on the decoder's devices, with edits that do nothing, as `ChatModel.put` does. Raises UserError
        for values that are not finite.
        """
        found, layers = np.zeros((len(tokens), len(self.layers)), np.float32), np.asarray(self.layers, np.int32)
        for start in range(0, len(tokens), ROWS):
            part = TokenBatch(np.asarray(tokens[start : start + ROWS]), np.asarray(mask[start : start + ROWS]))
            count, part = len(part.tokens), part.padded_to(min(ROWS, bucket(len(part.tokens))))
            inputs = put(part.tokens, part.mask)
            cosines_bc, finite_b = similarities(decoder, *inputs, np.float32(self.vectors_cd), layers, self.pool)
            check_finite(np.asarray(finite_b), decoder.dtype, "The condition cannot be read from the prompts")
            found[start : start + count] = np.asarray(cosines_bc)[:count]
        return found

    def met(self, cosines_bc: Float[np.ndarray, "B c"]) -> Bool[np.ndarray, " B"]:
        """Returns whether prompts meet the condition. cosines_bc: as of `cosines`."""
        beyond_bc = cosines_bc > self.threshold if self.above else cosines_bc < self.threshold
        return np.asarray(beyond_bc.any(axis=1))

    def met_by(self, decoder: Decoder, put: Put, tokens: np.ndarray, mask: np.ndarray) -> Bool[np.ndarray, " B"]:
        """Returns whether left-padded prompts meet the condition; arguments and errors are those of `cosines`."""
        return self.met(self.cosines(decoder, put, tokens, mask))


@dataclasses.dataclass(frozen=True, eq=False)
class Conditional:
    """A vector that is added to prompts that meet a condition.

    vector_d: float32 `[D]`, the behaviour, with its strength in it. layers: at whose inputs it is added. about: what else its
    file says, in plain values, such as how it was fitted. Wherever `Edits` are asked for of a `ChatModel`, this can be given.
    """

    condition: Condition
    vector_d: np.ndarray
    layers: tuple[int, ...]
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        width = self.condition.vectors_cd.shape[1]
        if self.vector_d.shape != (width,) or not np.isfinite(self.vector_d).all() or not self.layers:
            raise UserError(
                f"A conditional steering adds one finite vector of the condition's width, {width}, at one layer or more; this "
                f"one has the shape {list(self.vector_d.shape)} and the layers {shown(list(self.layers))}."
            )

    @property
    def added(self) -> Edits:
        """Returns the row of a prompt that meets the condition."""
        return Edits.add(self.vector_d, self.layers)

    def rows(self, met_b: Bool[np.ndarray, " B"]) -> Edits:
        """Returns one row for each prompt: the addition where the condition is met, and nothing elsewhere."""
        one = self.added.take(np.zeros(len(met_b), int))
        return dataclasses.replace(one, layer_ra=np.where(met_b[:, None], one.layer_ra, -1).astype(np.int32))

    @property
    def record(self) -> dict[str, Any]:
        """Returns what identifies it in results: the hash of both vectors, and the settings."""
        vectors = np.concatenate([self.condition.vectors_cd, self.vector_d[None]])
        return {"sha256": hashlib.sha256(np.ascontiguousarray(vectors, "<f4").tobytes()).hexdigest(), **self._settings}

    @property
    def _settings(self) -> dict[str, Any]:
        condition = self.condition
        told = {"layers": list(condition.layers), "threshold": condition.threshold, "above": condition.above}
        return {"condition": told | {"pool": condition.pool}, "behaviour": {"layers": list(self.layers)}}

    def check_fits(self, d_model: int, n_layers: int) -> None:
        """Raises UserError for another model's width or number of layers."""
        most = max(*self.condition.layers, *self.layers)
        if len(self.vector_d) != d_model or most >= n_layers:
            raise UserError(
                f"The conditional steering is of width {len(self.vector_d)} and reads or adds at layer {most}; the model's "
                f"residual stream has {d_model} entries and its layers are 0 to {n_layers - 1}. It belongs to another model."
            )

    def write(self, folder: pathlib.Path) -> list[pathlib.Path]:
        """Writes vectors and settings into a folder, as safetensors and JSON, and returns the files. Raises UserError if the disk
        refuses them."""
        record = {"schema": SCHEMA, **self._settings, "about": self.about}
        tensors = {
            "condition": np.ascontiguousarray(self.condition.vectors_cd, np.float32),
            "behaviour": np.ascontiguousarray(self.vector_d, np.float32),
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / VECTORS, save(tensors))
        write_atomically(folder / RECORD, to_json(record))
        return [folder / VECTORS, folder / RECORD]

    @classmethod
    def read(cls, folder: pathlib.Path) -> "Conditional":
        """Reads what `write` has written, also from the folder of the defence that wrote it. Raises UserError for a folder that
        holds none, and for files that are damaged."""
        if (folder / STEERING / RECORD).is_file():
            folder = folder / STEERING
        if not (folder / RECORD).is_file():
            raise UserError(
                f"{folder} holds no {RECORD}, so it is no conditional steering. `refusal-jax defend` writes one into its folder."
            )
        record, tensors = read_json(folder / RECORD), read_tensors(folder / VECTORS)
        try:
            if record["schema"] != SCHEMA:
                raise ValueError(f"its form is {shown(record['schema'])}, and {SCHEMA} is read")
            told, behaviour = record["condition"], record["behaviour"]
            vectors, vector = (np.asarray(tensors[name], np.float32) for name in ("condition", "behaviour"))
            condition = Condition(
                tuple(map(int, told["layers"])),
                vectors,
                float(told["threshold"]),
                bool(told["above"]),
                str(told["pool"]),
            )
            return cls(condition, vector, tuple(map(int, behaviour["layers"])), dict(record.get("about") or {}))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{folder / RECORD} is damaged: {shown(str(error))}. Make it again with `refusal-jax defend`."
            ) from None


def written_for(steering: Conditional) -> pathlib.Path:
    """Returns the checkpoint that a conditional steering was made for. Raises UserError if its file does not name one, or if that
    has changed since."""
    told = steering.about.get("model")
    name, fingerprint = (told.get("name"), told.get("fingerprint")) if isinstance(told, dict) else (None, None)
    if not isinstance(name, str) or not name:
        raise UserError(
            "The file of the conditional steering does not name the model that it was made for. Name it with "
            f"{setting('pretrained', 'FOLDER') or setting('model', 'FOLDER')}."
        )
    folder = checkpoint_folder(name)
    if checkpoint_fingerprint(folder) != fingerprint:
        raise UserError(
            f"{name} is not the checkpoint that the conditional steering was made for: its files have changed since. Give "
            f"{setting('pretrained', 'FOLDER') or setting('model', 'FOLDER')} if it should be used all the same."
        )
    return folder


def is_conditional(folder: pathlib.Path) -> bool:
    """Returns whether a folder is that of a conditional steering, rather than of a checkpoint or a study."""
    return (folder / RECORD).is_file() or (folder / STEERING / RECORD).is_file()


def check_weights(folder: pathlib.Path) -> None:
    """Raises UserError for the folder of a conditional steering, where weights are asked for."""
    if is_conditional(folder):
        raise UserError(
            f"{folder} is a conditional steering, which is no edit of weights: what it adds depends on the prompt as a whole, so "
            "no checkpoint and no adapter holds it, and whoever has the weights is not bound by it. Use it where the model runs, "
            "as the edits of a ChatModel, in `refusal-jax chat` or in a harness; and name the checkpoint here."
        )


@partial(jax.jit, static_argnames="pool")
def similarities(
    decoder: Decoder,
    tokens_bt: Int[Array, "B T"],
    mask_bt: Bool[Array, "B T"],
    edits: Edits,
    vectors_cd: Float[Array, "c D"],
    layers_c: Int[Array, " c"],
    pool: str,
) -> tuple[Float[Array, "B c"], Bool[Array, " B"]]:
    """Returns cos(h, tanh(P h)) of each row at the inputs of layers, 0 where either is zero, and whether rows' values are finite.

    vectors_cd: a condition vector for each of the layers, of any norm.
    """
    pooled_cbd = pooled(decoder, tokens_bt, mask_bt, edits, layers_c, pool)
    units_cd = vectors_cd / jnp.linalg.norm(vectors_cd, axis=-1, keepdims=True)
    cosines_bc = condition_cosines(pooled_cbd, units_cd)
    return replicate(decoder.mesh, (cosines_bc, jnp.isfinite(pooled_cbd).all(axis=(0, 2))))


def pooled(decoder: Decoder, tokens_bt, mask_bt, edits: Edits, layers_c, pool: str) -> Float[jax.Array, "c B D"]:
    """Returns the residual stream at the inputs of layers, as the mean over each row's tokens or at the last one; float32."""
    last = None if pool == "mean" else 1
    tapped_cbpd = decoder.forward(tokens_bt, mask_bt, edits, Taps(("resid_pre",), last)).taps["resid_pre"][layers_c]
    if last:
        return tapped_cbpd[:, :, 0].astype(jnp.float32)
    weights_bt = mask_bt / jnp.sum(mask_bt, axis=1, keepdims=True)
    return jnp.einsum("cbtd,bt->cbd", tapped_cbpd.astype(jnp.float32), weights_bt, precision="highest")


def condition_cosines(pooled_cbd: Float[Array, "c B D"], units_cd: Float[Array, "c D"]) -> Float[jax.Array, "B c"]:
    """Returns cos(h, tanh(P h)) of residuals at some layers, with a unit condition vector for each of these."""
    along_cb = jnp.einsum("cbd,cd->cb", pooled_cbd, units_cd, precision="highest")
    bent_cbd = jnp.tanh(along_cb[..., None] * units_cd[:, None])
    dot_cb = jnp.einsum("cbd,cbd->cb", pooled_cbd, bent_cbd, precision="highest")
    sizes_cb = jnp.linalg.norm(pooled_cbd, axis=-1) * jnp.linalg.norm(bent_cbd, axis=-1)
    return jnp.where(sizes_cb > LEAST, dot_cb / jnp.maximum(sizes_cb, LEAST), 0.0).T

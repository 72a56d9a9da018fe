"""The one decoder: embedding, scanned blocks, unembedding, with edits going in and taps coming out.

Axis letters: B batch, T tokens (query side), C cache slots (key side), D d_model, N heads, K key/value heads,
G queries per kv head, H head dim, F mlp, E experts, V vocab, L layers, P tapped positions, S edit sites. All weights of the
blocks are stacked on a leading L axis and kept `[out, in]` as in HF checkpoints, so loading never transposes. What differs
between architectures is a switch of `ModelConfig`; what differs between layers is an array with an L axis.
Norms, softmax, rotary angles and logits are float32 whatever the weights' dtype.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Int

from refusal_jax.axes import Array, Leaf
from refusal_jax.edits import Edits
from refusal_jax.models.attention import Context
from refusal_jax.models.block import Block, Layer, Stack, Weights
from refusal_jax.models.cache import Cache, map_memory, placed, spread
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.layers import linear, lookup, normed
from refusal_jax.models.sharding import constrain, constrain_residual, split_for, weight_place, weight_spec
from refusal_jax.models.structure import structure
from refusal_jax.models.weight import Weight, factor_names
from refusal_jax.models.weights import names_apart, weight_table
from refusal_jax.taps import NO_TAPS, Taps

Layers = tuple[Block, Layer]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """The residual stream of tokens at the input of a block, and what each layer is told of the tokens besides, if anything."""

    x_btd: Leaf  # [B, T, D]
    told_btlp: Leaf | None = None  # [B, T, L, P]

    def tell(self, layers: Layers) -> Layers:
        """Returns all layers, stacked, with what each is told."""
        if self.told_btlp is None:
            return layers
        return layers[0], dataclasses.replace(layers[1], told_btp=jnp.moveaxis(self.told_btlp, 2, 0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """The results of a pass through all blocks; results that a caller does not use are removed in compilation as dead
    code.

    resid_btd: the last block's output, before the final norm. taps: what was asked for by `Taps`, by site, each with a leading
    L axis. memory: the tokens' keys and values and the states after them, as of `Structure.empty`; () where it was not asked
    for.
    """

    resid_btd: Leaf
    taps: dict[str, Leaf]
    memory: Any = ()


class Decoder(nnx.Module):
    """A decoder-only transformer over a `ModelConfig`; parameters as in `weight_table`, but for a vocabulary that may have
    more rows, of zeros (`sharding.weight_place`), and for low-rank factors beside matrices of blocks (`weight.factor_names`).

    mesh: what the parameters are on, None being one device. remat: whether gradients compute the values of each block anew
    instead of keeping those of all blocks.
    """

    def __init__(
        self, cfg: ModelConfig, weights: Weights, mesh: jax.sharding.Mesh | None = None, *, remat: bool = False
    ):
        mesh = split_for(mesh, cfg.n_kv_heads)
        self.cfg, self.mesh, self.remat = cfg, mesh, remat
        self.embed = nnx.Param(weights["embed"])
        stacked = {p.removeprefix("blocks."): a for p, a in weights.items() if p.startswith("blocks.")}
        # Experts stay out of the scan, which would copy a layer's whole set to use a few. So does what only some layers have.
        names = names_apart(cfg)
        names = [*names, *(factor for name in names for factor in factor_names(name))]
        apart = {name: stacked.pop(name) for name in names if name in stacked}
        self.apart = Stack(cfg, apart, mesh) if apart else None
        self.blocks = Block(cfg, stacked, mesh)
        self.final_norm = nnx.Param(weights["final_norm"])
        if not cfg.tied_embeddings:
            self.unembed = nnx.Param(weights["unembed"])
        if "per_layer_embed" in weights:  # not where a part of a model is run
            self.per_layer_embed = nnx.Param(weights["per_layer_embed"])
            self.per_layer_projection = nnx.Param(weights["per_layer_projection"])
            self.per_layer_norm = nnx.Param(weights["per_layer_norm"])

    @classmethod
    def init(cls, cfg: ModelConfig, key: jax.Array, dtype=jnp.float32) -> "Decoder":
        """Returns a decoder with random weights, for training and tests."""
        table = weight_table(cfg)
        keys = jax.random.split(key, len(table))

        def make(w, k):
            if w.std is None:
                return jnp.full(w.shape, 1 if w.as_is else 1 - cfg.norm_offset, w.stored_as(dtype))
            return w.std * jax.random.normal(k, w.shape, w.stored_as(dtype))

        return cls(cfg, {path: make(w, k) for (path, w), k in zip(table.items(), keys, strict=True)})

    def weights(self) -> dict[str, jax.Array]:
        """Returns every parameter by path, factors merged: the inverse of the constructor where there are none."""

        def find(path: str) -> jax.Array:
            name = path.removeprefix("blocks.")
            if name == path:
                return getattr(self, path)[...]
            return (self.apart if self.apart and name in names_apart(self.cfg) else self.blocks).weight(name)

        return {path: find(path) for path in weight_table(self.cfg)}

    @classmethod
    def abstract(cls, cfg: ModelConfig, dtype, mesh: jax.sharding.Mesh | None) -> "Decoder":
        """Returns a decoder of shapes, dtypes and shardings in place of arrays, which is enough to compile with."""
        mesh = split_for(mesh, cfg.n_kv_heads)

        def shape(weight: Weight):
            place, sharding = weight_place(mesh, weight)
            return jax.ShapeDtypeStruct(place, weight.stored_as(dtype), sharding=sharding)

        return cls(cfg, {path: shape(weight) for path, weight in weight_table(cfg).items()}, mesh)

    @property
    def dtype(self):
        return self.embed[...].dtype

    def embed_tokens(self, tokens_bt: Int[Array, "B T"]) -> Residuals:
        """Returns the first values of the residual stream."""
        x = self._rows("embed", tokens_bt, self.cfg.embed_scale)
        return Residuals(x, self._told(tokens_bt, x) if self.cfg.d_per_layer else None)

    def _rows(self, name: str, tokens_bt: Int[Array, "B T"], scale: float) -> Float[jax.Array, "B T D"]:
        """Returns the rows of an embedding, placed as a residual stream."""
        spec = weight_spec(self.mesh, weight_table(self.cfg)[name])
        x = constrain_residual(self.mesh, lookup(self.mesh, spec, getattr(self, name)[...], tokens_bt))
        return x if scale == 1 else x * jnp.asarray(scale, x.dtype)

    def _told(self, tokens_bt: Int[Array, "B T"], x_btd: Float[jax.Array, "B T D"]) -> Float[jax.Array, "B T L P"]:
        """Returns what each layer is told of tokens: an embedding of its own, and what it reads of the model's."""
        cfg, shape = self.cfg, (*tokens_bt.shape, self.cfg.n_layers, self.cfg.d_per_layer)
        own_btf = self._rows("per_layer_embed", tokens_bt, cfg.d_per_layer**0.5)
        read_btf = linear(constrain(self.mesh, x_btd, "batch"), self.per_layer_projection[...]) * cfg.d_model**-0.5
        read = constrain(self.mesh, normed(cfg, read_btf.reshape(shape), self.per_layer_norm[...]), "batch")
        return (read + constrain(self.mesh, own_btf.reshape(shape), "batch")) * 2**-0.5

    def logits(self, x_btd: Float[jax.Array, "B T D"]) -> Float[jax.Array, "B T V"]:
        """Returns final norm and unembedding in float32, with V as stored: -inf for tokens beyond the vocabulary."""
        cfg = self.cfg
        table = self.embed if cfg.tied_embeddings else self.unembed
        x = constrain(self.mesh, normed(cfg, x_btd, self.final_norm[...]), "batch")
        precision = "highest" if x.dtype == jnp.float32 else None
        logits = jnp.einsum("btd,vd->btv", x, table[...], precision=precision, preferred_element_type=jnp.float32)
        logits = constrain(self.mesh, logits / cfg.logit_divisor, "batch", None, "vocab")
        if cfg.logit_softcap is not None:  # the cap must not hide an overflow
            capped = cfg.logit_softcap * jnp.tanh(logits / cfg.logit_softcap)
            logits = jnp.where(jnp.isfinite(logits), capped, logits)
        beyond = table[...].shape[0] > cfg.vocab_size
        return jnp.where(jnp.arange(logits.shape[-1]) < cfg.vocab_size, logits, -jnp.inf) if beyond else logits

    def finite(self, x_btd: Float[jax.Array, "B T D"], logits_btv: Float[jax.Array, "B T V"]) -> Bool[jax.Array, "B T"]:
        """Returns whether each token's residual, which `logits` was given, and logits are finite.

        A residual whose square overflows counts as infinite: the norm makes zeros of it.
        """
        beyond_v = jnp.arange(logits_btv.shape[-1]) >= self.cfg.vocab_size
        square_bt = jnp.sum(jnp.square(x_btd.astype(jnp.float32)), axis=-1)
        return jnp.isfinite(square_bt) & jnp.all(jnp.isfinite(logits_btv) | beyond_v, axis=-1)

    def layers(self, edits: Edits) -> tuple[Block, Layer]:
        """Returns the weights of the blocks and what else differs between layers, both with a leading L axis."""
        gates_lrs, add_lr = edits.layer_gates(self.cfg.n_layers)
        form = structure(self.cfg)
        kinds = form.mixer_l, form.channel_l, form.places_lg, form.places_lm, self.cfg.layer_kinds
        mixer, channel, places_g, places_m, kind = (jnp.asarray(values, jnp.int32) for values in kinds)
        own = mixer, channel, places_g, places_m, kind, gates_lrs, add_lr, edits.layer_directions()
        return self.blocks, Layer(*own)

    def forward(
        self,
        tokens_bt: Int[Array, "B T"],
        mask_bt: Bool[Array, "B T"],
        edits: Edits,
        taps: Taps = NO_TAPS,
        cache: Cache | None = None,
        keep: bool = False,
    ) -> Output:
        """Runs left-padded rows from the embedding to the last block: whole prompts or, with a cache, what follows it.

        mask_bt: marks real tokens. cache: of as many rows, or of fewer, each for equally many (`cache.spread`). keep: as in
        `run`.
        """
        cache = cache and spread(self.mesh, cache, len(mask_bt))
        ctx = Context.of_prompt(self.cfg, mask_bt, cache)
        return self.run(self.embed_tokens(tokens_bt), ctx, edits, taps, cache, keep=keep)

    def next_logits(self, x_btd: Float[jax.Array, "B T D"]) -> tuple[Float[jax.Array, "B V"], Bool[jax.Array, " B"]]:
        """Returns the logits of each row's next token, float32 with V as stored, and whether they and the last token's residual
        in `x_btd` are finite."""
        logits_b1v = self.logits(x_btd[:, -1:])
        return logits_b1v[:, 0], self.finite(x_btd[:, -1:], logits_b1v)[:, 0]

    def run(
        self,
        residuals: Residuals,
        ctx: Context,
        edits: Edits,
        taps: Taps = NO_TAPS,
        cache: Cache | None = None,
        remat: bool = False,
        keep: bool = False,
    ) -> Output:
        """Runs all blocks on residuals, of whole prompts or, with a cache, of the tokens that follow it.

        remat: as in the constructor, which may ask for it as well. keep: whether the memory of the new tokens is wanted; a
        cache's is always given.
        """
        layers, x_btd = residuals.tell(self.layers(edits)), residuals.x_btd
        past = None if cache is None else cache.memory
        remat, keep = remat or self.remat, keep or cache is not None

        def apply(x, layer: Layers, past, before):
            return layer[0](x, layer[1], ctx, edits, taps, past, self.apart, before)

        apply = jax.checkpoint(apply, static_argnums=2) if remat else apply
        form = structure(self.cfg)
        if len(form.mixers) == 1:

            def alone(x, scanned):
                layer, past = scanned
                x, tapped, new = apply(x, layer, None if past is None else lambda _: past[0], None)
                return x, (tapped, new)

            x, (tapped, new) = jax.lax.scan(alone, x_btd, (layers, past))
            return Output(x, tapped, new)

        fresh = self._fresh(x_btd, past) if keep or form.shares else None
        (x, fresh), tapped = jax.lax.scan(partial(self._among, apply, past), (x_btd, fresh), layers)
        return Output(x, tapped, fresh if keep else ())

    def _fresh(self, x_btd: Float[jax.Array, "B T D"], past) -> Any:
        """Returns room for the memory of new tokens, in all layers; its states are those of `past`, if there is any."""
        batch, length, _ = x_btd.shape
        empty, alone = structure(self.cfg).empty(batch, length, self.dtype), past is not None and length == 1
        fresh = placed(self.mesh, empty, layers=True, decoding=alone)
        return fresh if past is None else map_memory(lambda new, _: new, lambda _, old: old, fresh, past)

    def _among(self, apply, past, carry, layer: Layers):
        """Runs a layer of several kinds. They pass on what they keep, None if nothing: each writes to its own place, which needs
        no copy."""
        (x, fresh), places_m = carry, layer[1].places_m

        def here(memory, k: int):
            return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, places_m[k], keepdims=False), memory[k])

        before = None if fresh is None else tuple(here(fresh, k) for k in range(len(fresh)))
        x, tapped, after = apply(x, layer, None if past is None else partial(here, past), before)
        if fresh is not None:
            fresh = tuple(
                jax.tree.map(lambda a, one, k=k: jax.lax.dynamic_update_index_in_dim(a, one, places_m[k], 0), a, one)
                for k, (a, one) in enumerate(zip(fresh, after, strict=True))
            )
        return (x, fresh), tapped

    def run_layers(
        self, residuals: Residuals, ctx: Context, edits: Edits, start, stop, past=None, keep: bool = False
    ) -> tuple[Residuals, Any]:
        """Runs blocks `start` to `stop - 1`; returns the residuals and, if it is to be kept, the memory of the tokens, zeros in
        other layers. The bounds are traced: one program serves any range.

        past: the memory of the tokens before. Where layers use the memory of others, `start` must be 0.
        """
        layers = residuals.tell(self.layers(edits))

        def apply(x, layer: Layers, past, before):
            return layer[0](x, layer[1], ctx, edits, NO_TAPS, past, self.apart, before)

        def body(index, carry):
            layer = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), layers)
            return self._among(apply, past, carry, layer)[0]

        fresh = self._fresh(residuals.x_btd, past) if keep or structure(self.cfg).shares else None
        x_btd, memory = jax.lax.fori_loop(start, stop, body, (residuals.x_btd, fresh))
        return dataclasses.replace(residuals, x_btd=x_btd), memory

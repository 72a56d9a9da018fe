"""The one decoder: embedding, scanned blocks, unembedding, with edits going in and taps coming out.

Axis letters: B batch, T tokens (query side), C cache slots (key side), D d_model, N heads, K key/value heads,
G queries per kv head, H head dim, F mlp, E experts, V vocab, L layers, P tapped positions, S edit sites. All weights of the
blocks are stacked on a leading L axis and kept `[out, in]` as in HF checkpoints, so loading never transposes. What differs
between architectures is a switch of `ModelConfig`; what differs between layers is an array with an L axis.
Norms, softmax, rotary angles and logits are float32 whatever the weights' dtype.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

from refusal_jax.axes import Array, Leaf
from refusal_jax.edits import SITES, Edits
from refusal_jax.models.attention import Context, Segment, View, attend
from refusal_jax.models.cache import Cache
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.head_taps import Heads, read_heads
from refusal_jax.models.layers import Adapted, linear, lookup, mixture, mlp, normed, row_parallel, sharded_mixture
from refusal_jax.models.sharding import constrain, constrain_residual, split_for, weight_place, weight_spec
from refusal_jax.models.weights import Weight, factor_names, mixture_names, names_apart, weight_table
from refusal_jax.taps import NO_TAPS, Taps

# Parameters by path, or their shapes.
Weights = Mapping[str, Any]
# Keys and values of the tokens of one layer, `[B, K, T, H]` each, and of all: stacked on an L axis, or a list of layers.
LayerKV = tuple[jax.Array, jax.Array]
KV = LayerKV | list[LayerKV]


def unstacked(tree, n_layers: int) -> list:
    """Returns a pytree with a leading L axis as a list of L pytrees; the slices are made here and not later."""
    return jax.lax.optimization_barrier(
        [jax.tree.map(lambda a, layer=layer: a[layer], tree) for layer in range(n_layers)]
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
    """Values that differ between layers, besides their weights: one layer's, or all layers' on a leading L axis."""

    sparse: Leaf  # bool, whether it has experts
    place: Leaf  # int32, its number among the layers that have experts, or among those that have none
    kind: Leaf  # int32, index into the context's views
    gate_rs: Leaf  # float32 [R, S], the ablation gates of `Edits`, or [R, S, T], one for each token
    add_r: Leaf  # float32 [R], its addition gates
    ablate_rjd: Leaf | None  # float32 [R, J, D], its directions, where each layer has its own


class Stack(nnx.Module):
    """Weights of the blocks by name, and the mesh that they are on."""

    def __init__(self, cfg: ModelConfig, weights: Weights, mesh: jax.sharding.Mesh | None):
        self.cfg, self.mesh = cfg, mesh
        for name, value in weights.items():
            setattr(self, name, nnx.Param(value))

    def weight(self, name: str) -> Any:
        """Returns the array of a parameter, low-rank factors merged into it, or None where the architecture has none of that
        name."""
        found = self.factored(name)
        return found.merged() if isinstance(found, Adapted) else found

    def factored(self, name: str) -> Any:
        """Returns what `linear` multiplies with: the array of a parameter as `weight` does, or it and its factors apart."""
        left, right, param = (getattr(self, full, None) for full in (*factor_names(name), name))
        if param is None or left is None or right is None:
            return None if param is None else param[...]
        return Adapted(param[...], left[...], right[...])


class Block(Stack):
    """One layer, or all of them stacked on a leading L axis (then `jax.lax.scan` slices it)."""

    def norm(self, name: str, x):
        """Returns `x` through the norm of that name, or as it is where the architecture has none."""
        scale = self.weight(name)
        return x if scale is None else normed(self.cfg, x, scale)

    @property
    def post_norm_d(self) -> jax.Array | None:
        """Returns what a norm after attention multiplies with besides dividing by its input's norm, `[D]`; None without one."""
        scale = self.weight("attn_post_norm")
        return None if scale is None else self.cfg.norm_offset + scale.astype(jnp.float32)

    def spec(self, name: str) -> jax.sharding.PartitionSpec:
        """Returns how a weight is placed on the mesh, its layer axis included; of no axes without a mesh."""
        return weight_spec(self.mesh, weight_table(self.cfg)[f"blocks.{name}"])

    def out(self, name: str, x_btf: Float[jax.Array, "B T F"], weight=None) -> Float[jax.Array, "B T D"]:
        """Returns `x_btf` through the weight of that name, which writes to the residual stream, plus its bias; placed as rows.

        weight: gives weights by name in place of `self.factored`.
        """
        weight = weight or self.factored
        spec = jax.sharding.PartitionSpec(*self.spec(name)[1:])
        return row_parallel(self.mesh, spec, x_btf, weight(name), weight(f"{name}_bias"))

    def attention(self, h_btd: Float[jax.Array, "B T D"], view: View, past: LayerKV | None) -> tuple[Heads, LayerKV]:
        """Returns attention on the input `[B, T, D]`, and the tokens' keys and values, `[B, K, T, H]` each."""
        cfg, w = self.cfg, self.weight

        def heads(name: str, count: int):
            # Without the barrier, the order of axes that attention likes makes a TPU copy the weights first.
            x = jax.lax.optimization_barrier(linear(h_btd, self.factored(name), w(f"{name}_bias")))
            x = self.norm(f"{name}_norm", x) if cfg.qk_norm == "all" else x
            x = x if cfg.qkv_clip is None else jnp.clip(x, -cfg.qkv_clip, cfg.qkv_clip)
            return x.reshape(*x.shape[:2], count, cfg.head_dim)

        def placed(name: str, x):
            """Returns queries or keys with their norm and rope."""
            if cfg.norm_after_rope:
                return self.norm(f"{name}_norm", view.rotate(x))
            return view.rotate(self.norm(f"{name}_norm", x) if cfg.qk_norm in ("head", "each") else x)

        q, k, v = heads("q", cfg.n_heads), heads("k", cfg.n_kv_heads), heads("v", cfg.n_kv_heads)
        k, v = (constrain(self.mesh, a.swapaxes(1, 2), "batch", "kv_heads") for a in (placed("k", k), v))
        segments: list[Segment] = [(k, v, view.allowed_btt)]
        if past is not None and view.allowed_btc is not None:
            segments.insert(0, (*past, view.allowed_btc))
        q = view.scaled(placed("q", q))
        z = attend(q, segments, w("sinks"), cfg.query_scale, cfg.attention_softcap)
        return Heads(q, segments, w("sinks"), z, self.out("o", z), w("o"), w("o_bias"), self.post_norm_d), (k, v)

    def mlp(self, h_btd: Float[jax.Array, "B T D"], layer: Layer, apart: Stack | None) -> Float[jax.Array, "B T D"]:
        """Returns the MLP of its input, which may be a mixture of experts. apart: as in `__call__`."""
        cfg = self.cfg

        def here(name: str):
            """Returns this layer's weight of that name, which is sliced only where it is used."""
            stack = None if apart is None else apart.weight(name)
            return (
                self.factored(name)
                if stack is None
                else jax.lax.dynamic_index_in_dim(stack, layer.place, keepdims=False)
            )

        def dense(h_btd, kind: str = "dense_"):
            return mlp(cfg, here, h_btd, partial(self.out, weight=here), kind)

        def sparse(h_btd):
            assert apart is not None, "the config has experts, and no weights of theirs were given"
            stacks = {name: apart.weight(name) for name in mixture_names(cfg, per_expert=True)}
            if self.mesh is None:
                h_td = h_btd.reshape(-1, h_btd.shape[-1])
                return mixture(cfg, here, stacks.get, layer.place, h_td).reshape(h_btd.shape)
            weights = {name: here(name) for name in mixture_names(cfg, per_expert=False)}
            specs = {name: self.spec(name) for name in stacks}
            specs |= {name: jax.sharding.PartitionSpec(*self.spec(name)[1:]) for name in weights}
            return sharded_mixture(self.mesh, specs, cfg, weights, stacks, layer.place, h_btd)

        if not cfg.n_experts:
            return dense(h_btd, "")
        if not cfg.dense_layers:
            return sparse(h_btd)
        return jax.lax.cond(layer.sparse, sparse, dense, h_btd) if cfg.sparse_layers else dense(h_btd)

    def __call__(self, x_btd, layer: Layer, ctx: Context, edits: Edits, taps: Taps, past=None, apart=None):
        """Returns the block's output `[B, T, D]`, its taps, and the keys and values of its tokens, each `[B, K, T, H]`.

        past: keys and values of the tokens before, from a cache. apart: the weights of all layers that are not among the block's
        own, if there are any (`Decoder.apart`).
        """
        cfg = self.cfg
        gates = {name: layer.gate_rs[:, i] for i, name in enumerate(SITES)}
        edits = edits.with_directions(layer.ablate_rjd)

        def own(x):
            return constrain_residual(self.mesh, x)

        def read(x, norm: str):
            """Returns the input of attention or MLP, whose every part needs all of its rows."""
            return constrain(self.mesh, self.norm(norm, own(x)), "batch")

        def added(out, norm: str, site: str):
            """Returns what is added to the residual: after any post-norm, scaled, edited."""
            out = self.norm(norm, own(out))
            out = out if cfg.residual_scale == 1 else out * jnp.asarray(cfg.residual_scale, out.dtype)
            return edits.ablated(out, gates[site])

        resid_pre = edits.added(edits.ablated(own(x_btd), gates["resid_pre"]), layer.add_r)
        attn_in = read(resid_pre, "attn_norm")
        heads, new = self.attention(attn_in, ctx.view(layer.kind), past)
        attn_out = added(heads.out_btd, "attn_post_norm", "attn_out")
        resid_mid = resid_pre + attn_out
        mlp_in = attn_in if cfg.parallel else read(resid_mid, "mlp_norm")
        mlp_out = added(self.mlp(mlp_in, layer, apart), "mlp_post_norm", "mlp_out")
        resid_post = own(resid_mid + mlp_out)  # placed after the last edit: else what a tap wants spreads backwards
        tapped = taps.read(
            resid_pre=resid_pre, attn_out=attn_out, resid_mid=resid_mid, mlp_out=mlp_out, resid_post=resid_post
        ) | read_heads(cfg, self.mesh, heads, edits, gates["attn_out"], taps)
        return resid_post, tapped, new


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """The results of a pass through all blocks; results that a caller does not use are removed in compilation as dead
    code.

    resid_btd: the last block's output, before the final norm. taps: what was asked for by `Taps`, by site, each with a leading
    L axis. kv: the tokens' keys and values, a pair of `[L, B, K, T, H]`, or a list of L pairs of `[B, K, T, H]` where layers
    were unstacked.
    """

    resid_btd: Leaf
    taps: dict[str, Leaf]
    kv: KV


class Decoder(nnx.Module):
    """A decoder-only transformer over a `ModelConfig`; parameters as in `weight_table`, but for a vocabulary that may have
    more rows, of zeros (`sharding.weight_place`), and for low-rank factors beside matrices of blocks (`weights.factor_names`).

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
        self.apart = Stack(cfg, {name: stacked.pop(name) for name in names_apart(cfg)}, mesh) if cfg.n_experts else None
        self.blocks = Block(cfg, stacked, mesh)
        self.final_norm = nnx.Param(weights["final_norm"])
        if not cfg.tied_embeddings:
            self.unembed = nnx.Param(weights["unembed"])

    @classmethod
    def init(cls, cfg: ModelConfig, key: jax.Array, dtype=jnp.float32) -> "Decoder":
        """Returns a decoder with random weights, for training and tests."""
        table = weight_table(cfg)
        keys = jax.random.split(key, len(table))

        def make(w, k):
            neutral = jnp.full(w.shape, 1 - cfg.norm_offset, dtype)
            return neutral if w.std is None else w.std * jax.random.normal(k, w.shape, w.stored_as(dtype))

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

    def embed_tokens(self, tokens_bt: Int[Array, "B T"]) -> Float[jax.Array, "B T D"]:
        """Returns the first values of the residual stream."""
        spec = weight_spec(self.mesh, weight_table(self.cfg)["embed"])
        x = constrain_residual(self.mesh, lookup(self.mesh, spec, self.embed[...], tokens_bt))
        return x if self.cfg.embed_scale == 1 else x * jnp.asarray(self.cfg.embed_scale, x.dtype)

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
        sparse_l = np.isin(np.arange(self.cfg.n_layers), self.cfg.sparse_layers)
        place_l = np.where(sparse_l, np.cumsum(sparse_l), np.cumsum(~sparse_l)) - 1
        kind_l = jnp.asarray(self.cfg.layer_kinds, jnp.int32)
        places = jnp.asarray(sparse_l), jnp.asarray(place_l, jnp.int32), kind_l
        return self.blocks, Layer(*places, gates_lrs, add_lr, edits.layer_directions())

    def forward(
        self,
        tokens_bt: Int[Array, "B T"],
        mask_bt: Bool[Array, "B T"],
        edits: Edits,
        taps: Taps = NO_TAPS,
        cache: Cache | None = None,
        layers=None,
    ) -> Output:
        """Runs whole, left-padded prompts or, with a cache, the tokens that follow it, from the embedding to the last block.

        mask_bt: marks real tokens. layers: as in `run`.
        """
        if cache is None:
            ctx = Context.of_prompt(self.cfg, mask_bt)
        else:
            ctx = Context.build(self.cfg, cache.position_b[:, None] + jnp.arange(mask_bt.shape[1]), mask_bt, cache)
        return self.run(self.embed_tokens(tokens_bt), ctx, edits, taps, cache, layers)

    def next_logits(self, x_btd: Float[jax.Array, "B T D"]) -> tuple[Float[jax.Array, "B V"], Bool[jax.Array, " B"]]:
        """Returns the logits of each row's next token, float32 with V as stored, and whether they and the last token's residual
        in `x_btd` are finite."""
        logits_b1v = self.logits(x_btd[:, -1:])
        return logits_b1v[:, 0], self.finite(x_btd[:, -1:], logits_b1v)[:, 0]

    def run(
        self,
        x_btd: Float[jax.Array, "B T D"],
        ctx: Context,
        edits: Edits,
        taps: Taps = NO_TAPS,
        cache: Cache | None = None,
        layers=None,
        remat: bool = False,
    ) -> Output:
        """Runs all blocks on residuals `x_btd`, of whole prompts or, with a cache, of the tokens that follow it.

        layers: `self.layers(edits)`, or that `unstacked`, which the cache must then be too. remat: as in the constructor, which
        may ask for it as well.
        """

        def body(x, layer):
            (block, own), past = layer
            x, tapped, new = block(x, own, ctx, edits, taps, past, self.apart)
            return x, (tapped, new)

        body = jax.checkpoint(body) if remat or self.remat else body
        layers = self.layers(edits) if layers is None else layers
        past = None if cache is None else cache.kv
        if not isinstance(layers, list):
            x, (tapped, new) = jax.lax.scan(body, x_btd, (layers, past))
            return Output(x, tapped, new)
        x, tapped, new = x_btd, [], []
        for layer in zip(layers, past if isinstance(past, list) else [None] * len(layers), strict=True):
            x, (tapped_here, new_here) = body(x, layer)
            tapped.append(tapped_here)
            new.append(new_here)
        return Output(x, jax.tree.map(lambda *a: jnp.stack(a), *tapped), new)

    def run_layers(
        self, x_btd: Float[jax.Array, "B T D"], ctx: Context, edits: Edits, start, stop
    ) -> Float[jax.Array, "B T D"]:
        """Runs blocks `start` to `stop - 1` and returns the residual; the bounds are traced: one program serves any range."""
        layers = self.layers(edits)

        def body(index, x):
            block, own = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), layers)
            return block(x, own, ctx, edits, NO_TAPS, None, self.apart)[0]

        return jax.lax.fori_loop(start, stop, body, x_btd)

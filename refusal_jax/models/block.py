"""One layer of the decoder: a sequence mixer and a channel mixer that write to the residual stream, with edits and taps.

Axis letters: as in the decoder. All weights of the blocks are stacked on a leading L axis; those that only some layers have, and
those of experts, stand apart (`Stack`) and are sliced where they are used.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Float

from refusal_jax.axes import Array, Leaf
from refusal_jax.edits import SITES, Edits
from refusal_jax.models.attention import Context
from refusal_jax.models.cache import map_memory
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.head_taps import no_heads as shapes_without
from refusal_jax.models.head_taps import read_heads
from refusal_jax.models.layers import (
    ACTIVATE,
    Adapted,
    linear,
    mixture,
    mlp,
    normed,
    row_parallel,
    sharded_mixture,
)
from refusal_jax.models.sharding import constrain, constrain_residual, weight_spec
from refusal_jax.models.structure import structure
from refusal_jax.models.weight import factor_names
from refusal_jax.models.weights import EXPERTS, mixture_names, weight_table
from refusal_jax.taps import HEAD_SITES, Taps

Weights = Mapping[str, Any]  # parameters by path, or their shapes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
    """Values that differ between layers, besides their weights: one layer's, or all layers' on a leading L axis."""

    mixer: Leaf  # int32, index into `Structure.mixers`
    channel: Leaf  # int32, index into `Structure.channels`
    places_g: Leaf  # int32 [G], its place in each of `Structure.sets`
    places_m: Leaf  # int32 [M], its place in the memory of each of `Structure.memories`
    kind: Leaf  # int32, index into the context's views
    gate_rs: Leaf  # float32 [R, S], the ablation gates of `Edits`, or [R, S, T], one for each token
    add_r: Leaf  # float32 [R], its addition gates
    ablate_rjd: Leaf | None  # float32 [R, J, D], its directions, where each layer has its own
    told_btp: Leaf | None = None  # [B, T, P], what it is told of the tokens themselves


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


@dataclasses.dataclass(frozen=True)
class Given:
    """Holds what a pass gives to the sequence mixer of a layer besides its weights: `ctx`, `taps`, `past` and `before` as in
    `Block.__call__`, the layer's edits and its gate at "attn_out", and the normed input."""

    ctx: Context
    edits: Edits
    gate_r: jax.Array
    taps: Taps
    past: Any
    before: tuple | None
    attn_in_btd: jax.Array

    def recalled(self, k: int):
        """Returns the memory of index k of `Structure.memories` for a mixer: tokens from the cache, and the state before; None
        where there is neither."""
        if self.past is None:
            return None if self.before is None else self.before[k]
        if self.before is None:
            return self.past(k)
        return map_memory(lambda old, _: old, lambda _, state: state, self.past(k), self.before[k])


@dataclasses.dataclass(frozen=True)
class Here:
    """One layer's weights, wherever they stand.

    layer: what else is the layer's own. shared: `Tokens` of the new tokens, of the layer whose memory it uses, if it does. kinds:
    those of `ModelConfig.kinds` that layers with its sequence mixer are of.
    """

    block: "Block"
    apart: Stack | None
    layer: Layer
    shared: Any = None
    kinds: tuple[int, ...] | None = None

    @property
    def cfg(self) -> ModelConfig:
        return self.block.cfg

    @property
    def mesh(self) -> jax.sharding.Mesh | None:
        return self.block.mesh

    def factored(self, name: str) -> Any:
        """Returns what `linear` multiplies with, as `Stack.factored` does; it is sliced only where it is used."""
        stack = None if self.apart is None else self.apart.factored(name)
        if stack is None:
            return self.block.factored(name)
        place = self.place(name)
        return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, place, keepdims=False), stack)

    def place(self, name: str) -> jax.Array:
        """Returns the layer's place among those that have the weight of that name, which not all layers have."""
        return self.layer.places_g[structure(self.cfg).set_of[name]]

    def weight(self, name: str) -> Any:
        """Returns the array of a parameter, factors merged, or None where the architecture has none of that name."""
        found = self.factored(name)
        return found.merged() if isinstance(found, Adapted) else found

    def norm(self, name: str, x):
        """Returns `x` through the norm of that name, or as it is where the architecture has none."""
        scale = self.weight(name)
        return x if scale is None else normed(self.cfg, x, scale)

    @property
    def post_norm_d(self) -> jax.Array | None:
        """Returns what a norm after the sequence mixer multiplies with besides dividing by its input's norm, `[D]`; None without
        one."""
        scale = self.weight("attn_post_norm")
        return None if scale is None else self.cfg.norm_offset + scale.astype(jnp.float32)

    def out(self, name: str, x_btf: Float[jax.Array, "B T F"]) -> Float[jax.Array, "B T D"]:
        """Returns `x_btf` through the weight of that name, which writes to the residual stream, plus its bias; placed as rows."""
        return row_parallel(self.mesh, self.spec(name), x_btf, self.factored(name), self.weight(f"{name}_bias"))

    def spec(self, name: str) -> PartitionSpec:
        """Returns how the weight of one layer is placed on the mesh; of no axes without a mesh."""
        return PartitionSpec(*self.block.spec(name)[1:])

    def own(self, x_btd: Float[Array, "B T D"]) -> Float[jax.Array, "B T D"]:
        """Returns a residual, or what is added to it, placed as residuals are."""
        return constrain_residual(self.mesh, jnp.asarray(x_btd))

    def read(self, x_btd: Float[Array, "B T D"], norm: str) -> Float[jax.Array, "B T D"]:
        """Returns the input of a mixer, whose every part needs all of its rows."""
        return constrain(self.mesh, self.norm(norm, self.own(x_btd)), "batch")

    def added(self, out_btd: Float[jax.Array, "B T D"], norm: str) -> Float[jax.Array, "B T D"]:
        """Returns what is added to the residual, before edits: after any post-norm, scaled."""
        out, scale = self.norm(norm, self.own(out_btd)), self.cfg.residual_scale
        return out if scale == 1 else out * jnp.asarray(scale, out.dtype)

    def sequence(self, given: Given, index: int) -> tuple[jax.Array, tuple, dict[str, jax.Array]]:
        """Returns what a sequence mixer adds, the memory after it, and the taps of its heads. index: of `Structure.mixers`."""
        form, before = structure(self.cfg), given.before
        mixer = form.mixers[index]
        if mixer is None:
            return jnp.zeros_like(given.attn_in_btd), before or (), self.no_heads(given)
        k = form.memories.index(index if mixer.reads is None else mixer.reads)
        shared = before[k] if before and mixer.reads is not None else None
        this = dataclasses.replace(self, shared=shared, kinds=form.kinds(index))
        mixed = mixer.mix(this, given.attn_in_btd, given.ctx, given.recalled(k))
        new = (mixed.memory,) if before is None and len(form.mixers) == 1 else before or ()
        if before is not None and mixer.reads is None:
            new = (*before[:k], mixed.memory, *before[k + 1 :])
        out = self.added(mixed.out_btd, "attn_post_norm")
        if mixed.heads is None:
            return out, new, self.no_heads(given, out)
        return out, new, read_heads(self.cfg, self.mesh, mixed.heads, given.edits, given.gate_r, given.taps)

    def no_heads(self, given: Given, out=None) -> dict[str, jax.Array]:
        """Returns the taps of a layer without heads, in the shapes of those of layers with heads: zeros, but for what it adds
        along the direction, all of which counts as a bias. out: what it adds, None for nothing."""
        if not given.taps.asks(*HEAD_SITES):
            return {}
        headed = [i for i, mixer in enumerate(structure(self.cfg).mixers) if mixer is not None and mixer.has_heads]
        if headed:
            shapes = jax.eval_shape(lambda: self.sequence(given, headed[0])[2])
        else:
            shapes = shapes_without(self.cfg, given.taps, given.attn_in_btd)
        found = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        if out is not None and "o_bias_along" in found:
            out_bpd = given.taps.cut(given.edits.ablated(out, given.gate_r)).astype(jnp.float32)
            found["o_bias_along"] = jnp.einsum("bpd,bd->bp", out_bpd, given.taps.along, precision="highest")
        return found

    def channel(self, h_btd: Float[jax.Array, "B T D"], resid_btd: Float[Array, "B T D"], index: int):
        """Returns what a channel mixer adds. index: of `Structure.channels`; the rest as in `mixed_channels`."""
        kind = structure(self.cfg).channels[index]
        if kind is None:
            return jnp.zeros_like(h_btd)
        return self.added(self.mixed_channels(kind, h_btd, self.own(resid_btd)), "mlp_post_norm")

    def mixed_channels(
        self, kind: str, h_btd: Float[jax.Array, "B T D"], resid_btd: Float[jax.Array, "B T D"]
    ) -> Float[jax.Array, "B T D"]:
        """Returns what the channel mixer makes of its input: an MLP, a mixture of experts, or both. kind: of
        `Structure.channels`. resid_btd: what `h_btd` is the norm of."""
        if kind != EXPERTS:
            return mlp(self.cfg, self.factored, h_btd, self.out, kind)
        if not self.cfg.d_beside:
            return self.mixture(h_btd)
        resid_btd = constrain(self.mesh, resid_btd, "batch")
        both = ("beside", mlp(self.cfg, self.factored, h_btd, self.out)), ("expert", self.mixture(resid_btd))
        beside, experts = (self.norm(f"{name}_post_norm", constrain_residual(self.mesh, y)) for name, y in both)
        return beside + experts

    def told(self, x_btd: Float[jax.Array, "B T D"]) -> Float[jax.Array, "B T D"]:
        """Returns what the layer makes of what it is told of the tokens: a gate of the residual lets it through."""
        gate_btp = ACTIVATE[self.cfg.activation](linear(x_btd, self.factored("per_layer_gate")))
        return self.out("per_layer_out", gate_btp * self.layer.told_btp)

    def mixture(self, h_btd: Float[jax.Array, "B T D"]) -> Float[jax.Array, "B T D"]:
        """Returns what a mixture of experts makes of its input."""
        cfg, apart = self.cfg, self.apart
        assert apart is not None, "the config has experts, and no weights of theirs were given"
        stacks = {name: apart.weight(name) for name in mixture_names(cfg, per_expert=True)}
        place = self.place(f"{cfg.expert_prefix}down")
        if self.mesh is None:
            h_td = h_btd.reshape(-1, h_btd.shape[-1])
            return mixture(cfg, self.factored, stacks.get, place, h_td).reshape(h_btd.shape)
        weights = {name: self.weight(name) for name in mixture_names(cfg, per_expert=False)}
        specs = {name: self.block.spec(name) for name in stacks} | {name: self.spec(name) for name in weights}
        return sharded_mixture(self.mesh, specs, cfg, weights, stacks, place, h_btd)


class Block(Stack):
    """One layer, or all of them stacked on a leading L axis (then `jax.lax.scan` slices it)."""

    @property
    def post_norm_d(self) -> jax.Array | None:
        """Returns `Here.post_norm_d` of a block whose weights are all its own."""
        scale = self.weight("attn_post_norm")
        return None if scale is None else self.cfg.norm_offset + scale.astype(jnp.float32)

    def spec(self, name: str) -> PartitionSpec:
        """Returns how a weight is placed on the mesh, its layer axis included; of no axes without a mesh."""
        return weight_spec(self.mesh, weight_table(self.cfg)[f"blocks.{name}"])

    def __call__(self, x_btd, layer: Layer, ctx: Context, edits: Edits, taps: Taps, past=None, apart=None, before=None):
        """Returns the block's output `[B, T, D]`, its taps, and its memory: a tuple that has for each of `Structure.memories` one
        layer's, which is new for the memory that the layer has; () where layers differ and `before` is not given.

        past: a function of an index into `Structure.memories`, which gives one layer's memory of the tokens before, from a cache;
        None without one. before: the states before as such a tuple, in which `Tokens` are those of the new tokens where an
        earlier layer has made them. apart: the weights of all layers that are not among the block's own, if there are any
        (`Decoder.apart`).
        """
        cfg, form, here = self.cfg, structure(self.cfg), Here(self, apart, layer)
        gates = {name: layer.gate_rs[:, i] for i, name in enumerate(SITES)}
        edits = edits.with_directions(layer.ablate_rjd)
        resid_pre = edits.added(edits.ablated(here.own(x_btd), gates["resid_pre"]), layer.add_r)
        given = Given(ctx, edits, gates["attn_out"], taps, past, before, here.read(resid_pre, "attn_norm"))
        attn_out, new, of_heads = _choose("mixer", form.mixer_l, layer.mixer, partial(here.sequence, given))
        attn_out = edits.ablated(attn_out, gates["attn_out"])
        resid_mid = resid_pre + attn_out
        mlp_in = given.attn_in_btd if cfg.parallel else here.read(resid_mid, "mlp_norm")
        mlp_out = _choose("channel", form.channel_l, layer.channel, partial(here.channel, mlp_in, resid_mid))
        mlp_out = edits.ablated(mlp_out, gates["mlp_out"])
        if cfg.d_per_layer:
            told = here.told(constrain(self.mesh, here.own(resid_mid + mlp_out), "batch"))
            mlp_out = mlp_out + edits.ablated(here.added(told, "per_layer_post_norm"), gates["mlp_out"])
        resid_post = resid_mid + mlp_out
        if cfg.layer_scale:
            resid_post = resid_post * here.weight("layer_scale")
        resid_post = here.own(resid_post)  # placed after the last edit: else what a tap wants spreads backwards
        tapped = taps.read(
            resid_pre=resid_pre, attn_out=attn_out, resid_mid=resid_mid, mlp_out=mlp_out, resid_post=resid_post
        )
        return resid_post, tapped | of_heads, new


def _choose(name: str, kind_l: tuple[int, ...], kind, function):
    """Returns a function of the layer's kind, an int: known where all layers are alike, or else a traced one.

    name: of the choice in the compiled program, as in `Structure.taken`."""
    if len(set(kind_l)) == 1:
        return function(kind_l[0])
    with jax.named_scope(name):
        return jax.lax.switch(kind, [partial(function, index) for index in range(max(kind_l) + 1)])

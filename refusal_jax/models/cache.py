"""Keeps what decoding needs of the tokens so far: keys and values, or states."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Bool, Int

from refusal_jax.axes import Leaf
from refusal_jax.models.sharding import constrain, kept_sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Arrays `[..., B, K, C, H]` with an entry for each token, such as keys and values; K is divided over the mesh as key/value
    heads are and, for decoding, B as `sharding.kept_axes` says."""

    parts: tuple[Leaf, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Arrays `[..., B, N, ...]` of a row as a whole, which each token changes; N is divided over the mesh as heads are."""

    parts: tuple[Leaf, ...]


def map_memory(of_tokens, of_state, tree, *rest):
    """Returns a pytree of `Tokens` and `State` with a function applied to the arrays of each; `rest` as in `jax.tree.map`."""

    def one(node, *others):
        function = of_tokens if isinstance(node, Tokens) else of_state
        return jax.tree.map(function, node, *others)

    return jax.tree.map(one, tree, *rest, is_leaf=lambda node: isinstance(node, Tokens | State))


def _in_order(a: jax.Array) -> jax.Array:
    """Returns an array whose axes keep their order in memory."""
    return with_layout_constraint(a, Layout(major_to_minor=tuple(range(a.ndim))))


def kept(mesh, a: jax.Array) -> jax.Array:
    """Returns an array of `Tokens`, inside a jitted function, where decoding keeps it."""
    return a if mesh is None else jax.lax.with_sharding_constraint(a, kept_sharding(mesh, a.shape))


def placed(mesh, tree, layers: bool, decoding: bool = False):
    """Returns memory, inside a jitted function, divided over the mesh.

    layers: whether its arrays have a leading L axis. decoding: whether single tokens attend to it.
    """
    lead = [None] * layers
    return map_memory(
        lambda a: kept(mesh, a) if decoding else constrain(mesh, a, *lead, "batch", "kv_heads"),
        lambda a: constrain(mesh, a, *lead, "batch", "heads"),
        tree,
    )


def spread(mesh, cache: "Cache", rows: int) -> "Cache":
    """Returns a cache, inside a jitted function, as that of more rows, of which each of its own serves equally many, one after
    another."""
    times = rows // len(cache.mask_bc)
    if times == 1:
        return cache
    memory = placed(mesh, jax.tree.map(lambda a: jnp.repeat(a, times, axis=1), cache.memory), layers=True)
    mask_bc, position_b = (jnp.repeat(a, times, axis=0) for a in (cache.mask_bc, cache.position_b))
    return Cache(memory, mask_bc, cache.filled, position_b)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """A ring of C slots a row; all rows write to the same slot at the same time, and `mask_bc` marks real tokens.

    Rows are left-padded, and a row may begin at any time (`models.generate.admit`): its prompt then lies in the slots
    before the next one. With C at least a row's prompt, padding included, and reply, nothing that it needs is overwritten.
    In memory the axes keep their order: programs would otherwise choose one of their own, and copy the whole cache to it and
    back.
    """

    memory: Any  # `Tokens` of C slots and `State`, in the form of `structure.Structure.empty`
    mask_bc: Leaf  # bool [B, C]
    filled: Any  # int32 scalar, slots written since the start
    position_b: Leaf  # int32 [B], the position of each row's next token

    @property
    def slots(self) -> int:
        return self.mask_bc.shape[1]

    @property
    def positions_bc(self) -> Int[jax.Array, "B C"]:
        """Returns the position of the token in each slot; meaningless where there is none."""
        ago_c = (self.filled - 1 - jnp.arange(self.slots)) % self.slots
        return self.position_b[:, None] - 1 - ago_c

    @classmethod
    def of_prompt(cls, new, mask_bt: Bool[jax.Array, "B T"], slots: int, filled=None) -> "Cache":
        """Returns a ring of `slots` with a prompt's memory (`Output.memory`) and mask.

        filled: slots written once the prompt is there; default, the prompt's length: then it begins at slot 0.
        """
        spare = slots - mask_bt.shape[1]
        filled = jnp.int32(mask_bt.shape[1]) if filled is None else filled
        shift = filled - mask_bt.shape[1]

        def ring(a):
            return jnp.roll(jnp.pad(a, ((0, 0),) * (a.ndim - 2) + ((0, spare), (0, 0))), shift, -2)

        mask_bc = jnp.roll(jnp.pad(mask_bt, ((0, 0), (0, spare))), shift, 1)
        memory = map_memory(ring, lambda a: a, new)
        return cls(memory, mask_bc, filled, jnp.sum(mask_bt, axis=1, dtype=jnp.int32))

    def append(self, new, mask_b1: Bool[jax.Array, "B 1"]) -> "Cache":
        """Returns the cache with the memory of one more token (`Output.memory`) in the next slot; states are replaced."""
        slot = self.filled % self.slots

        def write(old, new):
            ring = jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis=-2)
            # Off TPUs a constraint on the layout is not divided over a mesh: every chip would gather the whole cache to meet it.
            return jax.lax.platform_dependent(ring, tpu=_in_order, default=lambda a: a)

        return Cache(
            map_memory(write, lambda old, new: new, self.memory, new),
            jax.lax.dynamic_update_slice_in_dim(self.mask_bc, mask_b1, slot, axis=1),
            self.filled + 1,
            self.position_b + jnp.sum(mask_b1, axis=1, dtype=jnp.int32),
        )

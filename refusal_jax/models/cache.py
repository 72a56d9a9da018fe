"""Keys and values of the tokens so far, for decoding."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Bool, Int

from refusal_jax.axes import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """A ring of C slots a row; all rows write to the same slot at the same time, and `mask_bc` marks real tokens.

    Rows are left-padded, and a row may begin at any time (`models.generate.admit`): its prompt then lies in the slots
    before the next one. With C at least a row's prompt, padding included, and reply, nothing that it needs is overwritten.
    In memory the axes keep their order: programs would otherwise choose one of their own, and copy the whole cache to it and
    back.
    """

    kv: Any  # keys and values: a pair of [L, B, K, C, H], or a list of L pairs of [B, K, C, H]
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
        """Returns a ring of `slots` with a prompt's keys and values (`Output.kv`) and mask.

        filled: slots written once the prompt is there; default, the prompt's length: then it begins at slot 0.
        """
        spare = slots - mask_bt.shape[1]
        filled = jnp.int32(mask_bt.shape[1]) if filled is None else filled
        shift = filled - mask_bt.shape[1]
        kv = jax.tree.map(
            lambda a: jnp.roll(jnp.pad(a, ((0, 0),) * (a.ndim - 2) + ((0, spare), (0, 0))), shift, -2), new
        )
        mask_bc = jnp.roll(jnp.pad(mask_bt, ((0, 0), (0, spare))), shift, 1)
        return cls(kv, mask_bc, filled, jnp.sum(mask_bt, axis=1, dtype=jnp.int32))

    def append(self, new, mask_b1: Bool[jax.Array, "B 1"]) -> "Cache":
        """Returns the cache with the keys and values of one more token written to the next slot."""
        slot = self.filled % self.slots

        def write(old, new):
            kv = jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis=-2)
            return with_layout_constraint(kv, Layout(major_to_minor=tuple(range(kv.ndim))))

        return Cache(
            jax.tree.map(write, self.kv, new),
            jax.lax.dynamic_update_slice_in_dim(self.mask_bc, mask_b1, slot, axis=1),
            self.filled + 1,
            self.position_b + jnp.sum(mask_b1, axis=1, dtype=jnp.int32),
        )

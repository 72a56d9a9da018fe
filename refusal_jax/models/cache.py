"""Keys and values of the tokens so far, for decoding."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """A fixed number of slots C a row; slots are filled in order and `mask_bc` marks those that hold real tokens.

    Rows are left-padded, so all rows fill the same slot at the same time.
    """

    kv: object  # keys and values: a pair of [L, B, K, C, H], or a list of L pairs of [B, K, C, H]
    mask_bc: jax.Array  # bool [B, C]
    filled: jax.Array  # int32 scalar, slots used, padding included
    position_b: jax.Array  # int32 [B], the position of each row's next token

    @property
    def positions_bc(self) -> jax.Array:
        """The position of the token in each slot, int32 `[B, C]`; negative for padding."""
        return jnp.arange(self.mask_bc.shape[1]) - (self.filled - self.position_b)[:, None]

    @classmethod
    def of_prompt(cls, new, mask_bt: jax.Array, slots: int) -> "Cache":
        """From a prompt's keys and values (`Decoder.run`'s third result) and mask, with room for `slots` tokens."""
        spare = slots - mask_bt.shape[1]
        kv = jax.tree.map(lambda a: jnp.pad(a, ((0, 0),) * (a.ndim - 2) + ((0, spare), (0, 0))), new)
        mask_bc = jnp.pad(mask_bt, ((0, 0), (0, spare)))
        return cls(kv, mask_bc, jnp.int32(mask_bt.shape[1]), jnp.sum(mask_bt, axis=1, dtype=jnp.int32))

    def append(self, new, mask_bt: jax.Array) -> "Cache":
        """With the keys and values of T more tokens written to the next slots."""
        write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=self.filled, axis=-2)
        return Cache(
            jax.tree.map(write, self.kv, new),
            jax.lax.dynamic_update_slice_in_dim(self.mask_bc, mask_bt, self.filled, axis=1),
            self.filled + mask_bt.shape[1],
            self.position_b + jnp.sum(mask_bt, axis=1, dtype=jnp.int32),
        )

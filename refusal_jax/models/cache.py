"""Keys and values of the tokens so far, for decoding."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """A fixed number of slots C a row; slots are filled in order and `mask_bc` marks those that hold real tokens.

    Rows are left-padded, so all rows fill the same slot at the same time.
    """

    k_lbkch: jax.Array  # [L, B, K, C, H]
    v_lbkch: jax.Array  # [L, B, K, C, H]
    mask_bc: jax.Array  # bool [B, C]
    filled: jax.Array  # int32 scalar, slots used, padding included
    position_b: jax.Array  # int32 [B], the position of each row's next token

    @classmethod
    def of_prompt(cls, new, mask_bt: jax.Array, slots: int) -> "Cache":
        """From a prompt's keys and values (`Decoder.run`'s third result) and mask, with room for `slots` tokens."""
        spare = slots - mask_bt.shape[1]
        k, v = (jnp.pad(a, ((0, 0),) * 3 + ((0, spare), (0, 0))) for a in new)
        return cls(
            k,
            v,
            jnp.pad(mask_bt, ((0, 0), (0, spare))),
            jnp.int32(mask_bt.shape[1]),
            jnp.sum(mask_bt, axis=1, dtype=jnp.int32),
        )

    def append(self, new, mask_bt: jax.Array) -> "Cache":
        """With the keys and values of T more tokens written to the next slots."""
        at = (0, 0, 0, self.filled, 0)
        return Cache(
            jax.lax.dynamic_update_slice(self.k_lbkch, new[0], at),
            jax.lax.dynamic_update_slice(self.v_lbkch, new[1], at),
            jax.lax.dynamic_update_slice(self.mask_bc, mask_bt, (0, self.filled)),
            self.filled + mask_bt.shape[1],
            self.position_b + jnp.sum(mask_bt, axis=1, dtype=jnp.int32),
        )

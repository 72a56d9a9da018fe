"""Attention and a state space side by side, as in Falcon-H1: both read the same input, and their outputs are added."""

import dataclasses

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from refusal_jax.models.attention import Context
from refusal_jax.models.cache import State, Tokens
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.mixers.attention import Attention
from refusal_jax.models.mixers.mixer import Mixed
from refusal_jax.models.mixers.state_space import StateSpace
from refusal_jax.models.weight import Weight


@dataclasses.dataclass(frozen=True)
class Both:
    """The two mixers. in_scale, out_scale: multiply what attention reads, and what it adds; a state space has its own scales.

    Its heads are those of attention, and what they add to the residual is a part of what the layer adds.
    """

    attention: Attention
    space: StateSpace
    in_scale: float = 1.0
    out_scale: float = 1.0

    reads: int | None = None

    has_heads = True

    def weights(self, cfg: ModelConfig) -> dict[str, Weight]:
        """Returns each weight of one layer by its name."""
        return self.attention.weights(cfg) | self.space.weights(cfg)

    def memory(self, cfg: ModelConfig, rows: int, tokens: int, dtype) -> tuple[Tokens, State]:
        """Returns the memory of both, zeros."""
        return self.attention.memory(cfg, rows, tokens, dtype), self.space.memory(cfg, rows, tokens, dtype)

    def mix(self, here, h_btd: Float[Array, "B T D"], ctx: Context, past: tuple[Tokens, State] | None) -> Mixed:
        """Returns the sum of both, as `Mixer.mix` does."""
        tokens, state = past or (None, None)
        attention = self.attention.mix(here, scaled(h_btd, self.in_scale), ctx, tokens)
        space = self.space.mix(here, h_btd, ctx, state)
        assert attention.heads is not None
        heads = dataclasses.replace(
            attention.heads,
            out_btd=scaled(attention.out_btd, self.out_scale) + space.out_btd,
            o_df=scaled(attention.heads.o_df, self.out_scale),
            o_bias_d=scaled(attention.heads.o_bias_d, self.out_scale),
            beside_btd=space.out_btd,
        )
        return Mixed(heads.out_btd, (attention.memory, space.memory), heads)


def scaled(x, scale: float):
    """Returns the product in the dtype of x, None for None."""
    return x if x is None or scale == 1 else x * jnp.asarray(scale, x.dtype)

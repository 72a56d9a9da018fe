"""The sequence mixer of a layer: what it has to say for itself, so that the decoder can run any.

A mixer reads the normed residuals of all tokens and writes to the residual stream at the site "attn_out", whatever it is. It
is data of a `ModelConfig`: a frozen dataclass with its sizes, whose methods say its weights, what it keeps of the tokens so far,
and what it computes.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Float

from refusal_jax.models.head_taps import Heads


@dataclasses.dataclass(frozen=True)
class Mixed:
    """The results of a mixer.

    out_btd: what it adds to the residual, before any post-norm. memory: as `Mixer.memory`, of the new tokens (`cache.Tokens`) or
    after them (`cache.State`); None if it has none of its own. heads: its attention heads, None if it has none.
    """

    out_btd: jax.Array
    memory: Any = None
    heads: Heads | None = None


@runtime_checkable
class Mixer(Protocol):
    """A kind of sequence mixer and its sizes.

    reads: the index in `ModelConfig.mixers` of the mixer whose last layer's memory its layers use in place of one of their own;
    None: each has its own. has_heads: whether it has attention heads.
    """

    @property
    def reads(self) -> int | None: ...

    @property
    def has_heads(self) -> bool: ...

    def weights(self, cfg) -> dict[str, Any]:
        """Returns each `Weight` of one layer by its name."""
        ...

    def memory(self, cfg, rows: int, tokens: int, dtype) -> Any:
        """Returns what one layer keeps of rows that have not begun, all zeros: a pytree of `cache.Tokens` with room for so many
        tokens, and of `cache.State`."""
        ...

    def mix(self, here, h_btd: Float[jax.Array, "B T D"], ctx, past) -> Mixed:
        """Returns what the layer makes of new tokens, which are left-padded.

        here: the layer's weights (`block.Here`). ctx: a `Context`, which says which tokens are real and what each may attend
        to. past: memory of the tokens before, None for none. A token that is not real must change no memory.
        """
        ...

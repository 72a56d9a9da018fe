"""The forward pass as one jitted program, which returns predictions and taps."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

from refusal_jax.axes import Array, Leaf
from refusal_jax.edits import Edits
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.sharding import replicate
from refusal_jax.taps import Taps


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prediction:
    """Logits, float32 `[B, V]` of the next token or `[B, T, V]` of the one after each; taps by site; and whether all of them
    are finite where a row has tokens, bool `[B]`."""

    logits: Leaf
    taps: dict[str, Leaf]
    finite_b: Leaf


@partial(jax.jit, static_argnames="last")
def predict(
    decoder: Decoder, tokens_bt: Int[Array, "B T"], mask_bt: Bool[Array, "B T"], edits: Edits, *, taps: Taps, last: bool
) -> Prediction:
    """Runs left-padded prompts, of which `mask_bt` marks the real tokens.

    taps: as from `Taps.for_batch`. last: whether logits are of the last token only.
    """
    out = decoder.forward(tokens_bt, mask_bt, edits, taps)
    x, real_bt = (out.resid_btd[:, -1:], mask_bt[:, -1:]) if last else (out.resid_btd, mask_bt)
    logits = decoder.logits(x)
    finite_b = jnp.all(decoder.finite(x, logits) | ~real_bt, axis=1) & taps.finite(out.taps, mask_bt)
    logits = (logits[:, 0] if last else logits)[..., : decoder.cfg.vocab_size]
    return Prediction(logits, out.taps, replicate(decoder.mesh, finite_b))

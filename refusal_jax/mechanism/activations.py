"""Reads the residual stream of single prompts at a few places, under an edit if there is one."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from refusal_jax.axes import Array
from refusal_jax.chat.batches import length_batches
from refusal_jax.chat.messages import Prompt
from refusal_jax.chat.model import ChatModel
from refusal_jax.edits import Edits
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.finite import check_finite
from refusal_jax.models.sharding import replicate
from refusal_jax.taps import Taps


@partial(jax.jit, static_argnames="taps")
def residuals_at(
    decoder: Decoder,
    tokens_bt: Int[Array, "B T"],
    mask_bt: Bool[Array, "B T"],
    edits: Edits,
    layers: Int[Array, " n"],
    tokens: Int[Array, " n"],
    taps: Taps,
) -> Float[Array, "B n D"]:
    """Returns the residuals at the inputs of n blocks, at one token each of those that `taps` reads, float32."""
    tapped_lbpd = decoder.forward(tokens_bt, mask_bt, edits, taps).taps["resid_pre"]
    return replicate(decoder.mesh, jnp.moveaxis(tapped_lbpd[layers, :, tokens], 0, 1).astype(jnp.float32))


def activations(
    model: ChatModel,
    prompts: Sequence[Prompt],
    places: Sequence[tuple[int, int]],
    rows: int,
    edits: Edits | None = None,
) -> Float[np.ndarray, "m n D"]:
    """Returns the residuals of m prompts at n places, float32.

    places: (position counted from the prompts' end, layer at whose input it is read). rows: of a batch. edits: one row. Raises
    UserError for values that are not finite.
    """
    cfg, last = model.config, -min(position for position, _ in places)
    found, taps = np.zeros((len(prompts), len(places), cfg.d_model), np.float32), Taps(("resid_pre",), last)
    layers, tokens = np.array([[layer, last + position] for position, layer in places], np.int32).T
    for index, batch in length_batches(model, prompts, rows):
        inputs = model.put(batch.tokens, batch.mask, edits)
        found[index] = np.asarray(residuals_at(model.decoder, *inputs, layers, tokens, taps))[: len(index)]
    finite, edited = np.isfinite(found).all(axis=(1, 2)), edits is not None and bool(edits.in_force_r.any())
    check_finite(finite, model.decoder.dtype, "The activations of prompts cannot be read", edited)
    return found

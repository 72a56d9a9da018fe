"""Reads prompts in one pass: the refusal score of each, and the mean residual stream of those that a filter keeps (paper,
section 2.3)."""

import dataclasses
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
from refusal_jax.chat.padding import Padding
from refusal_jax.chat.prefix import begin, shared_prefix
from refusal_jax.edits import Edits
from refusal_jax.models.cache import Cache
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.finite import check_finite
from refusal_jax.models.scores import refusal_score
from refusal_jax.models.sharding import replicate
from refusal_jax.progress import each
from refusal_jax.taps import Taps


@dataclasses.dataclass(frozen=True)
class Extraction:
    """The result of one pass over a set of prompts: the score of each, which were kept, and their mean residual at
    block inputs.

    scores: float64 `[n]`; kept: bool `[n]`; mean_lpd: float64 `[L, P, D]`, NaN if no prompt was kept.
    """

    scores: Float[np.ndarray, " n"]
    kept: Bool[np.ndarray, " n"]
    mean_lpd: Float[np.ndarray, "L P D"]


@partial(jax.jit, static_argnames="taps")
def extract_batch(
    decoder: Decoder,
    before: Cache | None,
    tokens_bt: Int[Array, "B T"],
    mask_bt: Bool[Array, "B T"],
    edits: Edits,
    valid_b: Bool[Array, " B"],
    sign: Int[Array, ""],
    refusal_ids: Int[Array, " n"],
    taps: Taps,
) -> tuple[Float[Array, " B"], Bool[Array, " B"], Float[Array, "L P D"], Float[Array, "L P D"], Bool[Array, " B"]]:
    """Returns scores `[B]`, which rows are kept `[B]`, the residual sums of these, float32 `[L, P, D]`, the first row's
    residual, and whether each row's values are finite `[B]`.

    Sums are of differences to the batch's first row: positions where all prompts agree (the
    template's tokens at layer 0) then cancel exactly instead of leaving rounding noise.
    before: the memory of tokens that all rows begin with and that `tokens_bt` leaves out, None for none.
    sign: +1 keeps scores above 0, -1 those below, 0 keeps all valid rows.
    """
    out = decoder.forward(tokens_bt, mask_bt, edits, taps, before)
    logits_bv, finite_b = decoder.next_logits(out.resid_btd)
    scores_b = refusal_score(logits_bv, refusal_ids)
    kept_b = valid_b & jnp.where(sign == 0, True, sign * scores_b > 0)
    resid_lbpd = out.taps["resid_pre"].astype(jnp.float32)
    finite_b &= jnp.all(jnp.isfinite(resid_lbpd), axis=(0, 2, 3))
    first_lpd = resid_lbpd[:, 0]
    offsets = jnp.where(kept_b[None, :, None, None], resid_lbpd - first_lpd[:, None], 0.0)
    return replicate(decoder.mesh, (scores_b, kept_b, jnp.sum(offsets, axis=1), first_lpd, finite_b))


def extract(
    model: ChatModel,
    instructions: Sequence[Prompt],
    refusal_ids,
    positions: int,
    sign: int,
    size: int | Padding,
    title: str,
) -> Extraction:
    """Returns scores, filter and mean residuals of one prompt set; sign as in `extract_batch`, size as in `length_batches`.

    Means end in NumPy float64. Raises UserError for values that are not finite.
    """
    n, cfg = len(instructions), model.config
    scores, kept = np.zeros(n), np.zeros(n, bool)
    total = np.zeros((cfg.n_layers, positions, cfg.d_model))
    taps, ids = Taps(("resid_pre",), positions), np.asarray(refusal_ids, np.int32)
    prefix = shared_prefix(model, instructions, size.reads if isinstance(size, Padding) else n, positions)
    before, batches = begin(model, prefix), list(length_batches(model, instructions, size, len(prefix)))
    for index, batch in each(batches, title, "batch"):
        valid = np.arange(len(batch.tokens)) < len(index)
        out = extract_batch(model.decoder, before, *model.put(batch.tokens, batch.mask), valid, sign, ids, taps)
        scores_b, kept_b, offsets, first, finite_b = (np.asarray(a) for a in jax.device_get(out))
        check_finite(finite_b[: len(index)], model.decoder.dtype, f"No residuals can be read from '{title}'")
        scores[index], kept[index] = scores_b[: len(index)], kept_b[: len(index)]
        total += offsets.astype(np.float64) + kept_b.sum() * first.astype(np.float64)
    return Extraction(scores, kept, total / kept.sum() if kept.any() else np.full_like(total, np.nan))


@partial(jax.jit, static_argnames="positions")
def project(
    decoder: Decoder,
    tokens_bt: Int[Array, "B T"],
    mask_bt: Bool[Array, "B T"],
    edits: Edits,
    units_jld: Float[Array, "J n D"],
    positions: int = 1,
) -> Float[Array, "B L P J"]:
    """Returns the residual at each block's input, at the last `positions` tokens, projected on directions; float32.

    units_jld: unit directions, each one for all layers, `[J, 1, D]`, or with one of its own for each layer, `[J, L, D]`.
    """
    tapped = decoder.forward(tokens_bt, mask_bt, edits, Taps(("resid_pre",), positions)).taps["resid_pre"]
    units = jnp.broadcast_to(units_jld, (len(units_jld), len(tapped), units_jld.shape[-1]))
    along_blpj = jnp.einsum("lbpd,jld->blpj", tapped.astype(jnp.float32), units, precision="highest")
    return replicate(decoder.mesh, along_blpj)

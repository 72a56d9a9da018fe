"""One pass over the prompts: refusal scores for the filter, and mean residuals of the prompts that pass it."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from refusal_jax.chat.model import ChatModel
from refusal_jax.chat.prompts import bucket
from refusal_jax.edits import Edits
from refusal_jax.errors import UserError, setting
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.finite import check_finite
from refusal_jax.models.scores import refusal_score
from refusal_jax.models.sharding import replicate
from refusal_jax.progress import each
from refusal_jax.taps import Taps


@dataclasses.dataclass(frozen=True)
class Extraction:
    """Of one set of prompts: score of each, which were kept, and the kept ones' mean residual at block inputs.

    scores: float64 `[n]`; kept: bool `[n]`; mean_lpd: float64 `[L, P, D]`.
    """

    scores: np.ndarray
    kept: np.ndarray
    mean_lpd: np.ndarray


def length_batches(model: ChatModel, instructions: list[str], size: int):
    """Yields (indices into `instructions`, TokenBatch of `size` rows), like lengths together, few distinct shapes."""
    rows = [model.chat.prompt_ids(text) for text in instructions]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    model.chat.encode([instructions[order[-1]]])  # the longest: refuses what exceeds the context
    for start in range(0, len(order), size):
        index = order[start : start + size]
        length = min(bucket(len(rows[index[-1]])), model.config.context_length)
        yield np.asarray(index), model.chat.pad([rows[i] for i in index], length).padded_to(size)


@partial(jax.jit, static_argnames="taps")
def extract_batch(decoder: Decoder, tokens_bt, mask_bt, edits: Edits, valid_b, sign, refusal_ids, taps: Taps):
    """Scores `[B]`, which rows are kept `[B]`, of those the residual sums, float32 `[L, P, D]`, the first row's residual, and
    whether each row's values are finite `[B]`.

    Sums are of differences to the batch's first row: positions where all prompts agree (the
    template's tokens at layer 0) then cancel exactly instead of leaving rounding noise.
    sign: +1 keeps scores above 0, -1 those below, 0 keeps all valid rows.
    """
    out = decoder.forward(tokens_bt, mask_bt, edits, taps)
    logits_bv, finite_b = decoder.next_logits(out.resid_btd)
    scores_b = refusal_score(logits_bv, refusal_ids)
    kept_b = valid_b & jnp.where(sign == 0, True, sign * scores_b > 0)
    resid_lbpd = out.taps["resid_pre"].astype(jnp.float32)
    finite_b &= jnp.all(jnp.isfinite(resid_lbpd), axis=(0, 2, 3))
    first_lpd = resid_lbpd[:, 0]
    offsets = jnp.where(kept_b[None, :, None, None], resid_lbpd - first_lpd[:, None], 0.0)
    return replicate(decoder.mesh, (scores_b, kept_b, jnp.sum(offsets, axis=1), first_lpd, finite_b))


def extract(
    model: ChatModel, instructions: list[str], refusal_ids, positions: int, sign: int, batch_size: int, title: str
) -> Extraction:
    """Scores, filter and mean residuals of one prompt set; sign as in `extract_batch`. Means end in NumPy float64.

    Raises UserError if the filter keeps no prompt, and for values that are not finite.
    """
    n, cfg = len(instructions), model.config
    scores, kept = np.zeros(n), np.zeros(n, bool)
    total = np.zeros((cfg.n_layers, positions, cfg.d_model))
    taps, ids = Taps(("resid_pre",), positions), np.asarray(refusal_ids, np.int32)
    batches = each(list(length_batches(model, instructions, batch_size)), title, "batch")
    for index, batch in batches:
        valid = np.arange(batch_size) < len(index)
        out = extract_batch(model.decoder, *model.put(batch.tokens, batch.mask), valid, sign, ids, taps)
        scores_b, kept_b, offsets, first, finite_b = (np.asarray(a) for a in jax.device_get(out))
        check_finite(finite_b[: len(index)], model.decoder.dtype, f"No residuals can be read from '{title}'")
        scores[index], kept[index] = scores_b[: len(index)], kept_b[: len(index)]
        total += offsets.astype(np.float64) + kept_b.sum() * first.astype(np.float64)
    if not kept.any():
        settable = setting("config.refusal_tokens"), setting("config.filter", False)
        ways = (
            [f"set {settable[0]}", f"switch the filter off with {settable[1]}"]
            if all(settable)
            else ["take another model"]
        )
        ways.append("check the prompts")
        side, why = ("harmful", "is refused") if sign > 0 else ("harmless", "is complied with")
        raise UserError(
            f"The filter kept none of the {n} prompts of '{title}': no {side} prompt {why} (scores from "
            f"{scores.min():.2f} to {scores.max():.2f}, the {side} side needs {'> 0' if sign > 0 else '< 0'}). The model "
            f"may not refuse at all, or refuses with other words: {' or '.join(ways)}."
        )
    return Extraction(scores, kept, total / kept.sum())

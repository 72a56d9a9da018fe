"""Chooses the first tokens of a reply among the likeliest ones, so that it does not begin as a refusal (after 2512.05518).

A model that is trained to refuse at any depth still has tokens that go on complying among its likeliest next ones. At each of
the first tokens of a reply, the rule looks at the TOP likeliest tokens, leaves out those that end the reply or begin a
refusal, and takes the one that a guide finds likeliest: the model itself, or the model under an edit, such as the ablation of
a direction. Where nothing is left, all TOP are looked at. An opening ends before the token at which the model would most
likely end its reply. Every row is guided at once, in one program.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from refusal_jax.axes import Array
from refusal_jax.chat.model import ChatModel
from refusal_jax.chat.padding import TokenBatch
from refusal_jax.chat.prompts import Chat
from refusal_jax.edits import Edits
from refusal_jax.models.cache import Cache
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.finite import check_finite
from refusal_jax.models.sharding import replicate

TOP = 20  # tokens among which one is chosen, as in the paper


@dataclasses.dataclass(frozen=True)
class Guided:
    """Openings of replies, int32: their tokens, the place of each among the model's likeliest, 0 the first, and how many of
    the tokens belong to each."""

    ids_bo: Int[np.ndarray, "B O"]
    ranks_bo: Int[np.ndarray, "B O"]
    lengths_b: Int[np.ndarray, " B"]


def barred_ids(chat: Chat, refusal_ids: Sequence[int]) -> tuple[int, ...]:
    """Returns the tokens that the rule leaves out: those that end replies, and those that refusals begin with, at the start
    of a line and within one."""
    found = {*chat.eos_ids}
    for token in refusal_ids:
        word = chat.tokenizer.decode([token]).strip()
        found |= {token, *(chat.ids(text)[0] for text in (word, f" {word}") if word)}
    return tuple(sorted(token for token in found if token < chat.vocab_size))


def guided_openings(
    model: ChatModel, batch: TokenBatch, guide: Edits | None, barred: Sequence[int], steps: int, top: int = TOP
) -> Guided:
    """Returns the first tokens of a reply to each prompt, by the rule above.

    guide: one row, the edit under which the guide reads the same tokens; None is the model itself. barred: tokens that are
    left out. steps: tokens of each opening. Raises UserError for values that are not finite.
    """
    rows, cfg = len(batch.tokens), model.config
    guide = guide or Edits.none(cfg.d_model)
    edits = Edits.concat([Edits.none(cfg.d_model, rows), guide.take(np.zeros(rows, np.int32))])
    tokens, mask = (np.concatenate([array, array]) for array in (batch.tokens, batch.mask))
    inputs, barred_n = model.put(tokens, mask, edits), np.asarray(barred, np.int32)
    ends_n = np.asarray(model.chat.eos_ids, np.int32)
    out = guided_tokens(model.decoder, *inputs, barred_n, ends_n, steps=steps, top=min(top, cfg.vocab_size))
    ids_bo, ranks_bo, over_bo, finite_b = map(np.array, jax.device_get(out))
    check_finite(finite_b, model.decoder.dtype, "Openings cannot be chosen", bool(guide.in_force_r.any()))
    over_bo[:, 0] = False  # an opening has a token at least
    lengths_b = np.where(over_bo.any(axis=1), over_bo.argmax(axis=1), steps)
    return Guided(ids_bo, ranks_bo, lengths_b.astype(np.int32))


@partial(jax.jit, static_argnames=("steps", "top"))
def guided_tokens(
    decoder: Decoder,
    tokens_bt: Int[jax.Array, "B T"],
    mask_bt: Bool[jax.Array, "B T"],
    edits: Edits,
    barred_n: Int[Array, " _"],
    ends_n: Int[Array, " _"],
    *,
    steps: int,
    top: int,
) -> tuple[Int[Array, "_ O"], Int[Array, "_ O"], Bool[Array, "_ O"], Bool[Array, " _"]]:
    """Returns, for the first half of the rows, the chosen tokens, their ranks, whether the model would most likely have ended
    the reply in place of each, and whether all values of a row were finite.

    The second half holds the same prompts, as the guide reads them. ends_n: tokens that end a reply.
    """
    half, one_b = len(tokens_bt) // 2, jnp.ones((len(tokens_bt), 1), bool)

    def chosen(x_btd):
        logits_bv, finite_b = decoder.next_logits(x_btd)
        likely_nk, places_nk = jax.lax.top_k(logits_bv[:half], top)
        guide_nk = jnp.take_along_axis(jax.nn.log_softmax(logits_bv[half:], axis=-1), places_nk, axis=1)
        possible_nk = jnp.isfinite(likely_nk)
        left_nk = possible_nk & ~jnp.isin(places_nk, barred_n)
        among_nk = jnp.where(left_nk.any(axis=1, keepdims=True), left_nk, possible_nk)
        rank_n = jnp.argmax(jnp.where(among_nk, guide_nk, -jnp.inf), axis=1).astype(jnp.int32)
        token_n = jnp.take_along_axis(places_nk, rank_n[:, None], axis=1)[:, 0].astype(jnp.int32)
        return (token_n, rank_n, jnp.isin(places_nk[:, 0], ends_n)), finite_b[:half] & finite_b[half:]

    read = decoder.forward(tokens_bt, mask_bt, edits, keep=True)
    cache = Cache.of_prompt(read.memory, mask_bt, tokens_bt.shape[1] + steps)

    def step(carry, _):
        cache, picked, finite_n = carry
        out = decoder.forward(jnp.tile(picked[0], 2)[:, None], one_b, edits, cache=cache)
        after, fine_n = chosen(out.resid_btd)
        return (cache.append(out.memory, one_b), after, finite_n & fine_n), picked

    (_, last, finite_n), picked_on = jax.lax.scan(step, (cache, *chosen(read.resid_btd)), None, length=steps - 1)
    ids_no, ranks_no, over_no = (jnp.concatenate([o_n, n[None]]).T for o_n, n in zip(picked_on, last, strict=True))
    return replicate(decoder.mesh, (ids_no, ranks_no, over_no, finite_n))

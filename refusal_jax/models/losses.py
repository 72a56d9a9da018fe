"""Measures edits on rows of text whose next tokens are known: cross-entropy, and divergence from the unedited model."""

import dataclasses

import jax
import jax.numpy as jnp

from refusal_jax.edits import Edits
from refusal_jax.models.attention import Context
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.sharding import replicate


@jax.jit
def loss_batch(decoder: Decoder, tokens_bt, mask_bt, edits: Edits, counted_bt) -> tuple[jax.Array, jax.Array]:
    """Returns the summed cross-entropy (nats) and number of counted tokens of each row; `counted_bt` marks predicted tokens.

    The sum of a row whose values are not finite is NaN. A scan over rows keeps one row's logits alive at a time instead of
    `[B, T, V]`.
    """
    x = decoder.forward(tokens_bt, mask_bt, edits).resid_btd

    def row(_, inputs):
        x_td, tokens_t, counted_t = inputs
        logits_1tv = decoder.logits(x_td[None, :-1])
        logp = jax.nn.log_softmax(logits_1tv[0], axis=-1)
        nll = -jnp.take_along_axis(logp, tokens_t[1:, None], axis=-1)[:, 0]
        nll = jnp.where(decoder.finite(x_td[None, :-1], logits_1tv)[0], nll, jnp.nan)
        return None, (jnp.sum(jnp.where(counted_t[1:], nll, 0.0)), jnp.sum(counted_t[1:], dtype=jnp.int32))

    return replicate(decoder.mesh, jax.lax.scan(row, None, (x, tokens_bt, counted_bt))[1])


@jax.jit
def kl_batch(decoder: Decoder, tokens_bt, mask_bt, edits: Edits, counted_bt) -> tuple[jax.Array, jax.Array]:
    """Returns for each row the summed KL divergence (nats) of the edited next-token distribution from the unedited one,
    and the number of counted tokens; `counted_bt` as in `loss_batch`, and like there one row's logits are alive at a
    time."""
    ctx, embedded = Context.of_prompt(decoder.cfg, mask_bt), decoder.embed_tokens(tokens_bt)
    none = jax.tree.map(jnp.zeros_like, edits)
    none = dataclasses.replace(none, layer_ra=jnp.full_like(edits.layer_ra, -1))
    base, edited = (decoder.run(embedded, ctx, one).resid_btd for one in (none, edits))

    def row(_, inputs):
        base_td, edited_td, counted_t = inputs
        both = base_td[None, :-1], edited_td[None, :-1]
        logits = [decoder.logits(x_1td) for x_1td in both]
        logp, logq = (jax.nn.log_softmax(logits_1tv[0].astype(jnp.float32), axis=-1) for logits_1tv in logits)
        terms = jnp.where(logp == -jnp.inf, 0.0, jnp.exp(logp) * (logp - logq))  # padded columns of the vocabulary
        finite_t = jnp.stack([decoder.finite(*pair)[0] for pair in zip(both, logits, strict=True)]).all(axis=0)
        kl_t = jnp.where(finite_t, terms.sum(axis=-1), jnp.nan)
        return None, (jnp.sum(jnp.where(counted_t[1:], kl_t, 0.0)), jnp.sum(counted_t[1:], dtype=jnp.int32))

    return replicate(decoder.mesh, jax.lax.scan(row, None, (base, edited, counted_bt))[1])

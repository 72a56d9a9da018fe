"""Refusal score and KL divergence of next-token logits, in float32 but computed so that nothing cancels."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from refusal_jax.axes import Array

SCORE_EPS = 1e-8
KL_EPS = 1e-6


def refusal_score(logits_bv: Float[Array, "B V"], refusal_ids: Int[Array, " n"]) -> Float[jax.Array, " B"]:
    """Returns log p - log(1 - p) of the refusal tokens' total probability (paper, section 2.3, with its epsilons).

    1 - p is summed over the other tokens instead of subtracted, which keeps float64 quality for p near 1.
    """
    logp = jax.nn.log_softmax(logits_bv.astype(jnp.float32), axis=-1)
    refusing = jnp.zeros(logits_bv.shape[-1], bool).at[refusal_ids].set(True)
    p = jnp.sum(jnp.where(refusing, jnp.exp(logp), 0.0), axis=-1)
    rest = jnp.sum(jnp.where(refusing, 0.0, jnp.exp(logp)), axis=-1)
    return jnp.log(p + SCORE_EPS) - jnp.log(rest + SCORE_EPS)


def kl_divergence(base_bv: Float[Array, "B V"], edited_bv: Float[Array, "B V"]) -> Float[jax.Array, " B"]:
    """Returns sum p (log(p + eps) - log(q + eps)) of baseline p against edited q, both given as logits."""
    p, q = (jax.nn.softmax(x.astype(jnp.float32), axis=-1) for x in (base_bv, edited_bv))
    return jnp.sum(p * (jnp.log(p + KL_EPS) - jnp.log(q + KL_EPS)), axis=-1)

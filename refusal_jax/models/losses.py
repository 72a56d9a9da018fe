"""Measures edits on rows of text whose next tokens are known: cross-entropy, and divergence from the first edit."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from refusal_jax.axes import Array
from refusal_jax.edits import Edits
from refusal_jax.models.cache import Cache
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.prefix import run_layers_after, taken
from refusal_jax.models.sharding import replicate


@partial(jax.jit, static_argnames="compared")
def loss_batch(
    decoder: Decoder,
    before: Cache | None,
    tokens_bt: Int[Array, "B T"],
    mask_bt: Bool[Array, "B T"],
    edits: Edits,
    counted_bt: Bool[Array, "B T"],
    compared: bool = False,
) -> tuple[Float[Array, "R B"], Float[Array, "R B"] | None]:
    """Returns the summed cross-entropy of each of B rows under each of R edits, nats; and, if they are to be compared, the summed
    KL divergence of each edit's next-token distributions from the first one's.

    before: the memory of tokens that all rows begin with under each edit, as from `prefix.begun`; None for none. counted_bt:
    marks predicted tokens. The sums of a row whose values are not finite are NaN. One row's logits under two edits are alive at a
    time instead of `[R, B, T, V]`.
    """
    embedded = decoder.embed_tokens(tokens_bt)

    def under(number):
        own = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, number, 1), edits)
        start = None if before is None else taken(before, number, 1)
        return run_layers_after(decoder, start, embedded, mask_bt, own, 0, decoder.cfg.n_layers).x_btd

    def row(_, inputs):
        x_rtd, tokens_t, counted_t = inputs

        def read(x_td):
            logits_1tv = decoder.logits(x_td[None, :-1])
            return jax.nn.log_softmax(logits_1tv[0], axis=-1), decoder.finite(x_td[None, :-1], logits_1tv)[0]

        def summed(values_t, finite_t):
            return jnp.sum(jnp.where(counted_t[1:], jnp.where(finite_t, values_t, jnp.nan), 0.0))

        def loss(logp_tv, finite_t):
            return summed(-jnp.take_along_axis(logp_tv, tokens_t[1:, None], axis=-1)[:, 0], finite_t)

        if not compared:
            return None, (jax.lax.map(lambda x_td: loss(*read(x_td)), x_rtd), None)
        base_tv, base_t = read(x_rtd[0])

        def both(x_td):
            logq_tv, finite_t = read(x_td)
            terms = jnp.where(base_tv == -jnp.inf, 0.0, jnp.exp(base_tv) * (base_tv - logq_tv))  # padded vocabulary
            return loss(logq_tv, finite_t), summed(terms.sum(axis=-1), finite_t & base_t)

        first = loss(base_tv, base_t)
        later = jax.lax.map(both, x_rtd[1:])
        return None, tuple(jnp.concatenate([x[None], y]) for x, y in zip((first, 0 * first), later, strict=True))

    x_rbtd = jax.lax.map(under, jnp.arange(edits.rows))
    sums = jax.lax.scan(row, None, (jnp.moveaxis(x_rbtd, 1, 0), tokens_bt, counted_bt))[1]
    return replicate(decoder.mesh, jax.tree.map(jnp.transpose, sums))

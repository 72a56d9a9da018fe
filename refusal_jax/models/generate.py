"""Greedy generation: prefill and cached decode in one jitted loop."""

from functools import partial

import jax
import jax.numpy as jnp

from refusal_jax.edits import Edits
from refusal_jax.models.attention import Context
from refusal_jax.models.cache import Cache
from refusal_jax.models.decoder import Decoder, unstacked

# A scan on the CPU copies every layer's weights at every step. Up to this many layers, slices made once before the
# loop save that, at the price of a longer compile.
CPU_UNROLL = 16


@partial(jax.jit, static_argnames=("max_new_tokens", "eos_ids", "pad_id"))
def generate(
    decoder: Decoder, tokens_bt, mask_bt, edits: Edits, *, max_new_tokens: int, eos_ids: tuple[int, ...], pad_id: int
) -> jax.Array:
    """Greedy replies, int32 `[B, max_new_tokens]`, `pad_id` after a row's end token.

    Edits apply to prompt and generated tokens alike. The loop ends as soon as every row has ended.
    """
    cfg, (batch, length) = decoder.cfg, tokens_bt.shape
    eos = jnp.asarray(eos_ids)
    one = jnp.ones((batch, 1), bool)
    layers = decoder.layers(edits)
    x, _, new = decoder.run(decoder.embed_tokens(tokens_bt), Context.of_prompt(cfg, mask_bt), edits, layers=layers)
    if jax.default_backend() == "cpu" and cfg.n_layers <= CPU_UNROLL:
        layers, new = unstacked(layers, cfg.n_layers), unstacked(new, cfg.n_layers)

    def pick(x):
        return jnp.argmax(decoder.logits(x[:, -1:])[:, 0], axis=-1).astype(jnp.int32)

    def write(step, token, ended, out):
        out = out.at[:, step].set(jnp.where(ended, pad_id, token))
        return ended | jnp.isin(token, eos), out

    def advance(state):
        step, token, ended, out, cache = state
        ctx = Context.build(cfg, cache.position_b[:, None], one, cache)
        x, _, new = decoder.run(decoder.embed_tokens(token[:, None]), ctx, edits, cache=cache, layers=layers)
        token = pick(x)
        return step + 1, token, *write(step, token, ended, out), cache.append(new, one)

    token = pick(x)
    ended, out = write(0, token, jnp.zeros(batch, bool), jnp.full((batch, max_new_tokens), pad_id, jnp.int32))
    state = (jnp.int32(1), token, ended, out, Cache.of_prompt(new, mask_bt, length + max_new_tokens))
    return jax.lax.while_loop(lambda s: (s[0] < max_new_tokens) & ~jnp.all(s[2]), advance, state)[3]

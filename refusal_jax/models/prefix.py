"""Rows that begin with the same tokens, such as a chat template's, which are computed once for each edit and not for each row.

Keys and values of the shared tokens depend on the edit and not on what follows them, so that every row of an edit attends to
the same ones.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

from refusal_jax.axes import Array
from refusal_jax.edits import Edits
from refusal_jax.models.attention import Context
from refusal_jax.models.cache import Cache, map_memory, placed
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.decoder import Decoder, Residuals
from refusal_jax.models.structure import structure
from refusal_jax.taps import NO_TAPS

WHOLE_ROWS = ("longrope", "dynamic")  # kinds of rope whose angles depend on how long a whole row is


def shareable(cfg: ModelConfig) -> bool:
    """Returns whether tokens have the same keys and values whatever follows them."""
    return not structure(cfg).shares and not any(kind.rope.kind in WHOLE_ROWS for kind in cfg.kinds)


def context_after(cfg: ModelConfig, length: int, mask_bt: Bool[jax.Array, "B T"]) -> Context:
    """Returns the context of left-padded tokens that follow `length` shared ones, to all of which they may attend."""
    rows = len(mask_bt)
    shared = Cache(None, jnp.ones((rows, length), bool), jnp.int32(length), jnp.full(rows, length, jnp.int32))
    positions_bt = length + jnp.maximum(jnp.cumsum(mask_bt, axis=1) - 1, 0)
    return Context.build(cfg, positions_bt, mask_bt, shared)


def embed_shared(decoder: Decoder, tokens_rt: Int[Array, "R _"]) -> Residuals:
    """Returns the first residuals of shared tokens, of which there may be none."""
    if not tokens_rt.shape[1]:
        return Residuals(jnp.zeros((*tokens_rt.shape, decoder.cfg.d_model), decoder.dtype))
    return decoder.embed_tokens(tokens_rt)


def run_layers_after(
    decoder: Decoder,
    shared: Residuals,
    residuals: Residuals,
    mask_bt: Bool[jax.Array, "B T"],
    edits: Edits,
    start,
    stop,
) -> tuple[Residuals, Residuals]:
    """Runs blocks `start` to `stop - 1` on rows that follow shared tokens; returns the residuals of both.

    shared: of the shared tokens under each of R edits; there may be none. residuals: of the rows, of which each edit has equally
    many, one edit's after another's. The bounds are traced, so that one program serves any range; `start` is as in
    `Decoder.run_layers`.
    """
    cfg, many = decoder.cfg, len(mask_bt) // edits.rows
    of_rows = jax.tree.map(lambda a: jnp.repeat(a, many, axis=0), edits)
    shared_rtd, x_btd = shared.x_btd, residuals.x_btd
    if not shared_rtd.shape[1]:
        return shared, decoder.run_layers(residuals, Context.of_prompt(cfg, mask_bt), of_rows, start, stop)
    layers_r, layers_b = shared.tell(decoder.layers(edits)), residuals.tell(decoder.layers(of_rows))[1]
    before = Context.of_prompt(cfg, jnp.ones(shared_rtd.shape[:2], bool))
    after = context_after(cfg, shared_rtd.shape[1], mask_bt)

    form = structure(cfg)
    empty_r, empty_b = (
        tuple(jax.tree.map(lambda a: a[0], memory) for memory in form.empty(len(x), x.shape[1], decoder.dtype))
        for x in (shared_rtd, x_btd)
    )

    def of_rows_of(memory):
        return placed(decoder.mesh, jax.tree.map(lambda a: jnp.repeat(a, many, axis=0), memory), layers=False)

    def body(index, carried):
        shared, x = carried
        picked = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), (*layers_r, layers_b))
        block, own_r, own_b = picked
        shared, _, new = block(shared, own_r, before, edits, NO_TAPS, None, decoder.apart, empty_r)
        past = of_rows_of(new)
        states = map_memory(lambda empty, _: empty, lambda _, state: state, empty_b, past)
        return shared, block(x, own_b, after, of_rows, NO_TAPS, past.__getitem__, decoder.apart, states)[0]

    shared_rtd, x_btd = jax.lax.fori_loop(start, stop, body, (shared_rtd, x_btd))
    return dataclasses.replace(shared, x_btd=shared_rtd), dataclasses.replace(residuals, x_btd=x_btd)

"""Rows that begin with the same tokens, such as a chat template's, which are computed once for each edit and not for each row.

Keys, values and states of the shared tokens depend on the edit and not on what follows them. So they are a `Cache` with a row for
each edit, which all rows of that edit go on from.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

from refusal_jax.axes import Array
from refusal_jax.edits import Edits
from refusal_jax.models.attention import Context
from refusal_jax.models.cache import Cache, map_memory, placed, spread
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.decoder import Decoder, Residuals

WHOLE_ROWS = ("longrope", "dynamic")  # kinds of rope whose angles depend on how long a whole row is


def shareable(cfg: ModelConfig) -> bool:
    """Returns whether tokens have the same keys and values whatever follows them."""
    return not any(kind.rope.kind in WHOLE_ROWS for kind in cfg.kinds)


@jax.jit
def begun(decoder: Decoder, shared: Residuals, edits: Edits, start) -> Cache:
    """Returns the memory of tokens that rows begin with, under each of R edits.

    shared: their residuals at the input of block `start`, one row for all edits. Of blocks before `start` there is no memory.
    """
    shared = jax.tree.map(lambda a: jnp.repeat(a, edits.rows, axis=0), shared)
    mask_rt = jnp.ones(shared.x_btd.shape[:2], bool)
    ctx, stop = Context.of_prompt(decoder.cfg, mask_rt), decoder.cfg.n_layers
    memory = decoder.run_layers(shared, ctx, edits, start, stop, keep=True)[1]
    return Cache.of_prompt(memory, mask_rt, mask_rt.shape[1])


@partial(jax.jit, static_argnames="count")
def taken(cache: Cache, first, count: int) -> Cache:
    """Returns `count` rows of a cache, from the row `first` on."""

    def rows(a, axis: int):
        return jax.lax.dynamic_slice_in_dim(a, first, count, axis)

    memory = jax.tree.map(lambda a: rows(a, 1), cache.memory)
    return Cache(memory, rows(cache.mask_bc, 0), cache.filled, rows(cache.position_b, 0))


def picked(mesh, cache: Cache, row_r: Int[Array, " R"]) -> Cache:
    """Returns, inside a jitted function, a cache whose rows are these rows of another."""
    memory = placed(mesh, jax.tree.map(lambda a: jnp.take(a, row_r, axis=1), cache.memory), layers=True)
    return Cache(memory, cache.mask_bc[row_r], cache.filled, cache.position_b[row_r])


def joined(before: Cache, memory, mask_rt: Bool[jax.Array, "R T"]):
    """Returns the memory of whole, left-padded rows from that of what they begin with and that of what follows, which are padded
    on the left, too. mask_rt: of the whole rows."""
    count, at_t = before.slots, jnp.arange(mask_rt.shape[1])
    padding_r1 = jnp.sum(~mask_rt, axis=1, keepdims=True)
    first_rt = (at_t >= padding_r1) & (at_t < padding_r1 + count)
    # Where there is padding, anything may stand.
    from_rt = jnp.where(first_rt, at_t - padding_r1, jnp.maximum(at_t, count))

    def join(first, rest):
        return jnp.take_along_axis(jnp.concatenate([first, rest], axis=-2), from_rt[None, :, None, :, None], axis=-2)

    return map_memory(join, lambda _, state: state, before.memory, memory)


def run_layers_after(
    decoder: Decoder,
    before: Cache | None,
    residuals: Residuals,
    mask_bt: Bool[Array, "B T"],
    edits: Edits,
    start,
    stop,
) -> Residuals:
    """Runs blocks `start` to `stop - 1` on rows that follow shared tokens, and returns their residuals.

    before: the shared tokens under each of R edits, as from `begun`; None if there are none. Each edit has equally many rows, one
    edit's after another's. The bounds are traced, so that one program serves any range; `start` is as in `Decoder.run_layers`.
    """
    rows = len(mask_bt)
    of_rows = jax.tree.map(lambda a: jnp.repeat(a, rows // edits.rows, axis=0), edits)
    cache = before and spread(decoder.mesh, before, rows)
    ctx, past = Context.of_prompt(decoder.cfg, mask_bt, cache), cache and cache.memory
    return decoder.run_layers(residuals, ctx, of_rows, start, stop, past)[0]

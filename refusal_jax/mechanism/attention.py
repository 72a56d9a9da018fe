"""Tells what chosen heads read from the template's tokens: attention, and what they write along a direction, by region.

A head may read an instruction directly, or at a template token to which heads of earlier layers moved it. Both are measured, each
in two currencies: attention (paper, section 5.2), which says where a head looks, and attribution, which says where what it writes
along the direction comes from. Attention over two hops is the rollout of Abnar and Zuidema (2020) through the template's tokens
alone; attribution over two hops follows the values themselves (`origins`). docs/mechanism.md has the formulas.

Everything is reduced to regions layer by layer inside one compiled program, so that its memory does not grow with the layers, nor
with heads times the square of the tokens: only the queries of the template's tokens are kept.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from refusal_jax.axes import Array, Leaf
from refusal_jax.chat.batches import length_batches
from refusal_jax.chat.model import ChatModel
from refusal_jax.edits import Edits
from refusal_jax.mechanism.origins import Moved, first_origins, moved, reading_mixer, with_mlp
from refusal_jax.mechanism.regions import ATTENDED, NOTHING, ORIGINS, PADDING, TEMPLATE, regions_of
from refusal_jax.mechanism.suffixes import Row
from refusal_jax.models.attention import Context
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.finite import check_finite
from refusal_jax.models.sharding import batch_sharding, constrain, put, replicate
from refusal_jax.progress import each
from refusal_jax.taps import Taps

Head = tuple[int, int]  # layer, head
SUMMING = 2e-4  # relative error of long sums in float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reading:
    """Holds what chosen heads read, of n prompts, float32. Queries Q are the template's tokens after the instruction, of which
    the last is the one that the model answers from; P are the same tokens as keys.

    attention: to each of `regions.ATTENDED`, `[n, X, Q, W]`, which sum to 1. along: what the head writes along the direction, by
    the region of the token that it reads, `[n, X, Q, W]` with W as in `regions.ORIGINS`; its last entry is 0. attention_via,
    along_via: the "template" entry of either, by template token and by where what is read there came from, `[n, X, Q, P, W]`.
    source_attention, source_along: of the last token, by source token from the row's end, `[n, X, T]`. off: how far the parts of
    the residual stream are from summing to it, relative to its norm, `[n]`.
    """

    attention: Leaf
    along: Leaf
    attention_via: Leaf
    along_via: Leaf
    source_attention: Leaf
    source_along: Leaf
    off: Leaf

    @classmethod
    def zeros(cls, rows: int, heads: int, queries: int, width: int) -> "Reading":
        """Returns a reading of nothing."""
        regions, via = (rows, heads, queries, len(ORIGINS)), (rows, heads, queries, queries, len(ORIGINS))
        shapes = regions, regions, via, via, (rows, heads, width), (rows, heads, width), (rows,)
        return cls(*(jnp.zeros(shape, jnp.float32) for shape in shapes))

    @property
    def finite_b(self) -> Bool[jax.Array, " B"]:
        """Returns whether all values of a row are finite."""
        leaves = [jnp.isfinite(leaf).reshape(len(leaf), -1).all(axis=1) for leaf in jax.tree.leaves(self)]
        return jnp.stack(leaves).all(axis=0)

    @property
    def attention_two_hops(self) -> Float[np.ndarray, "n X Q W"]:
        """Returns the attention to each of `regions.ATTENDED` over one hop and two together, float64; they sum to 1."""
        return self._over_two_hops(self.attention, self.attention_via)

    @property
    def along_two_hops(self) -> Float[np.ndarray, "n X Q W"]:
        """Returns what a head writes along the direction by origin (`regions.ORIGINS`) over one hop and two, float64."""
        return self._over_two_hops(self.along, self.along_via)

    @staticmethod
    def _over_two_hops(once: Array, via: Array) -> np.ndarray:
        direct = np.array(once, np.float64)
        direct[..., TEMPLATE] = 0.0
        return direct + np.asarray(via, np.float64).sum(axis=-2)


@partial(jax.jit, static_argnames="taps")
def read_batch(
    decoder: Decoder,
    tokens_bt: Int[Array, "B T"],
    mask_bt: Bool[Array, "B T"],
    edits: Edits,
    regions_bt: Int[Array, "B T"],
    unit_d: Float[Array, " D"],
    layers_x: Int[Array, " X"],
    heads_x: Int[Array, " X"],
    taps: Taps,
) -> tuple[Reading, Bool[Array, " B"]]:
    """Returns what heads read of B prompts, and whether their values are finite `[B]`.

    regions_bt: as from `regions_of`. unit_d: the unit direction. layers_x, heads_x: where the heads are. taps: from `taps_of`.
    Edits must do nothing.
    """
    cfg, (rows, width), last = decoder.cfg, tokens_bt.shape, taps.last
    assert last is not None, "the queries are the last tokens"
    along_bd = jnp.broadcast_to(unit_d.astype(jnp.float32), (rows, cfg.d_model))
    taps, ctx = dataclasses.replace(taps, along=along_bd), Context.of_prompt(cfg, mask_bt)
    regions_btw = jax.nn.one_hot(regions_bt, len(ORIGINS)).at[..., PADDING].set(0.0)

    def layer(carry, scanned):
        x_btd, parts_bpwd, rolled_bpw, found = carry
        (block, own), number = scanned
        x_btd, tapped, (kept,) = block(x_btd, own, ctx, edits, taps, None, decoder.apart)
        values_bkth = reading_mixer(cfg).values(block, kept)
        now = moved(block, parts_bpwd, tapped["resid_pre"], tapped["pattern"], values_bkth, regions_btw, along_bd)
        here_xn = (layers_x == number)[:, None] * jax.nn.one_hot(heads_x, cfg.n_heads)
        read = _read_layer(tapped, now, rolled_bpw, regions_btw, here_xn)
        off_b = jnp.maximum(found.off, _off(parts_bpwd, tapped["resid_pre"]))
        found = dataclasses.replace(jax.tree.map(jnp.add, found, read), off=off_b)
        found = jax.tree.map(lambda a: constrain(decoder.mesh, a, "batch"), found)
        rolled_bpw = rolled(rolled_bpw, tapped["pattern"], regions_btw, cfg.sinks)
        parts_bpwd = with_mlp(parts_bpwd + now.parts_bqwd, tapped["mlp_out"])
        return (x_btd, parts_bpwd, rolled_bpw, found), None

    x_btd, nothing = decoder.embed_tokens(tokens_bt).x_btd, Reading.zeros(rows, len(layers_x), last, width)
    own_bpw = jnp.broadcast_to(jax.nn.one_hot(TEMPLATE, len(ATTENDED)), (rows, last, len(ATTENDED)))
    start = x_btd, first_origins(x_btd[:, -last:]), own_bpw, nothing
    (_, _, _, found), _ = jax.lax.scan(layer, start, (decoder.layers(edits), jnp.arange(cfg.n_layers)))
    if cfg.sinks:
        none_bxq = 1 - found.attention.sum(axis=-1)
        attention = found.attention.at[..., ATTENDED.index(NOTHING)].set(none_bxq)
        found = dataclasses.replace(found, attention=attention)
    return replicate(decoder.mesh, (found, found.finite_b))


def _read_layer(tapped: dict, now: Moved, rolled_bpw, regions_btw, here_xn) -> Reading:
    """Returns what those of the chosen heads read that are in this layer, 0 for the others. here_xn: 1 where a chosen head is a
    head of this layer."""
    last = rolled_bpw.shape[1]
    source_bxqt = _einsum("bnqt,xn->bxqt", tapped["pattern"], here_xn)
    written_bxqt = _einsum("bqnt,xn->bxqt", tapped["result_along_by_source"], here_xn)
    along_via = _einsum("bxqp,bpwn,xn->bxqpw", source_bxqt[..., -last:], now.along_bpwn, here_xn)
    return Reading(
        attention=_einsum("bxqt,btw->bxqw", source_bxqt, regions_btw),
        along=_einsum("bxqt,btw->bxqw", written_bxqt, regions_btw),
        attention_via=source_bxqt[..., -last:, None] * rolled_bpw[:, None, None],
        along_via=along_via * now.scale_bq[:, None, :, None, None],
        source_attention=source_bxqt[:, :, -1],
        source_along=written_bxqt[:, :, -1],
        off=jnp.zeros(len(rolled_bpw)),
    )


def rolled(
    rolled_bpw: Float[jax.Array, "B P W"],
    pattern_bnqt: Float[jax.Array, "B N Q T"],
    regions_btw: Float[jax.Array, "B T W"],
    sinks: bool,
) -> Float[jax.Array, "B P W"]:
    """Returns the rollout of attention at the template's tokens after a layer: half of what it was before the layer, and half the
    mean over its heads of what their attention brings, which is what is at a template token, and elsewhere the token's region."""
    mean_bqt = pattern_bnqt.mean(axis=1)
    last = rolled_bpw.shape[1]
    through_bqw = _einsum("bqp,bpw->bqw", mean_bqt[..., -last:], rolled_bpw)
    direct_bqw = _einsum("bqt,btw->bqw", mean_bqt, regions_btw.at[..., TEMPLATE].set(0.0))
    brought_bqw = through_bqw + direct_bqw
    if sinks:
        brought_bqw = brought_bqw.at[..., ATTENDED.index(NOTHING)].add(1 - mean_bqt.sum(axis=-1))
    return 0.5 * (rolled_bpw + brought_bqw)


def _einsum(axes: str, *arrays) -> jax.Array:
    return jnp.einsum(axes, *arrays, precision="highest")


def _off(parts_bpwd, resid_bpd) -> Float[jax.Array, " B"]:
    """Returns how far parts are from summing to the residual stream, relative to its norm: the largest of a row's tokens."""
    resid_bpd = resid_bpd.astype(jnp.float32)
    off_bp = jnp.linalg.norm(parts_bpwd.sum(axis=2) - resid_bpd, axis=-1)
    return jnp.max(off_bp / (jnp.linalg.norm(resid_bpd, axis=-1) + 1e-30), axis=-1)


def taps_of(positions: int) -> Taps:
    """Returns what `read_batch` reads of each layer, at the last `positions` tokens."""
    return Taps(("resid_pre", "pattern", "result_along_by_source", "mlp_out"), positions)


def read_attention(
    model: ChatModel,
    rows: Sequence[Row],
    heads: Sequence[Head],
    direction_d: Float[np.ndarray, " D"],
    batch_size: int,
    title: str,
) -> Reading:
    """Returns what heads read of rows, in their order, and write along a direction of any norm.

    title: of the progress bar. Raises UserError for values that are not finite, and ArithmeticError if attention or the parts of
    what is written do not sum to the whole, within what the model's dtype rounds.
    """
    unit_d = np.asarray(direction_d, np.float64) / np.linalg.norm(direction_d)
    chosen = np.asarray(heads, np.int32).reshape(-1, 2).T
    taps = taps_of(len(model.chat.post_instruction_ids))
    found, order = [], []
    for index, batch in each(list(length_batches(model, [row.text for row in rows], batch_size)), title, "batch"):
        shown = [rows[i] for i in index] + [rows[index[-1]]] * (batch_size - len(index))
        regions = put(regions_of(shown, batch.mask), batch_sharding(model.mesh, batch_size))
        inputs = *model.put(batch.tokens, batch.mask), regions, unit_d.astype(np.float32), *chosen
        part, finite_b = jax.device_get(read_batch(model.decoder, *inputs, taps))
        check_finite(np.asarray(finite_b)[: len(index)], model.decoder.dtype, "Attention cannot be read")
        found.append(jax.tree.map(lambda a, index=index: np.asarray(a)[: len(index)], part))
        order.append(index)
    width = max(part.source_along.shape[-1] for part in found)
    place = np.argsort(np.concatenate(order))
    whole = jax.tree.map(lambda *parts: np.concatenate(parts)[place], *(_widened(part, width) for part in found))
    check_sums(whole, model.decoder.dtype, model.config.n_layers)
    return whole


def _widened(found: Reading, width: int) -> Reading:
    """Returns a reading with so many source tokens; those before a row's first are 0."""
    by_source = {
        name: np.pad(values, ((0, 0), (0, 0), (width - values.shape[-1], 0)))
        for name in ("source_attention", "source_along")
        if (values := getattr(found, name)) is not None
    }
    return dataclasses.replace(found, **by_source)


def check_sums(found: Reading, dtype, layers: int) -> None:
    """Raises ArithmeticError where attention does not sum to 1, where two hops do not sum to what is read at the template's
    tokens, or where the parts of the residual stream do not sum to it, within what rounding to `dtype` in so many layers
    explains."""
    allowed = SUMMING + 2 * float(jnp.finfo(dtype).eps) * (2 * layers) ** 0.5
    attention, along, via = (np.asarray(a, np.float64) for a in (found.attention, found.along, found.along_via))
    # What a head reads may nearly cancel at one token, so its rounding is seen against the most that it reads at any.
    size = np.abs(along).sum(axis=-1) + np.abs(via).sum(axis=(-2, -1))
    size = size.max(axis=(0, 2), keepdims=True, initial=0.0)
    rolled_out = np.asarray(found.attention_via, np.float64).sum(axis=(-2, -1))
    for what, off in (
        ("Attention does not sum to 1", np.maximum(np.abs(attention.sum(axis=-1) - 1), -attention.min(axis=-1))),
        ("Attention over two hops does not sum to that to the template", np.abs(rolled_out - attention[..., TEMPLATE])),
        (
            "The parts that heads write of the template's tokens do not sum to the whole",
            np.abs(via.sum(axis=(-2, -1)) - along[..., TEMPLATE]) / np.maximum(size, 1e-30),
        ),
        ("The parts of the residual stream do not sum to it", np.asarray(found.off)),
    ):
        if off.size and off.max() > allowed:
            raise ArithmeticError(
                f"{what}: it is off by {off.max():.3g}, more than the {allowed:.3g} that rounding in {dtype} explains. Attention "
                "of this architecture is read wrongly: please report it."
            )

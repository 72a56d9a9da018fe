"""Attention, and what all blocks share: rotary tables, and the mask of which tokens may attend to which.

Layers of one kind (`ModelConfig.kinds`) share one `View`; a layer picks its own by index, so that layers which look back
differently run through the same scanned body.
"""

import dataclasses
import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from refusal_jax.axes import Array, Leaf
from refusal_jax.models.cache import Cache
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.rope import rotate
from refusal_jax.models.sharding import constrain, constrain_queries


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """Rotary tables of the new tokens and what these may attend to, for layers of one kind."""

    cos_btr: Leaf  # float32 [B, T, rotated pairs]
    sin_btr: Leaf  # float32 [B, T, rotated pairs]
    allowed_btt: Leaf  # bool [B, T, T], of the new tokens among themselves
    allowed_btc: Leaf | None  # bool [B, T, C], of the new tokens to the cache's slots, if there is one
    query_bt: Leaf | None  # float32 [B, T], multiplies the queries, if anything does
    unit: Leaf | None  # bool, whether queries and keys are divided by their root mean square, if any layer's are
    interleaved: bool = dataclasses.field(metadata={"static": True})
    unit_eps: float = dataclasses.field(metadata={"static": True})

    def rotate(self, x_btnh: Float[jax.Array, "B T N H"]) -> Float[jax.Array, "B T N H"]:
        """Returns queries or keys with their leading entries turned, and then of equal length where that is so; float32 inside,
        the dtype of x outside."""
        x_btnh = rotate(x_btnh, self.cos_btr, self.sin_btr, self.interleaved)
        if self.unit is None:
            return x_btnh
        x32 = x_btnh.astype(jnp.float32)
        root = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.unit_eps)
        return jnp.where(self.unit, x32 * root, x32).astype(x_btnh.dtype)

    def scaled(self, q_btnh: Float[jax.Array, "B T N H"]) -> Float[jax.Array, "B T N H"]:
        """Returns queries with the scale of their positions."""
        return q_btnh if self.query_bt is None else q_btnh * self.query_bt[..., None, None].astype(q_btnh.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """A `View` for each kind of layer, and which of the new tokens are real."""

    views: tuple[View, ...]
    mask_bt: Leaf  # bool [B, T]

    @classmethod
    def build(
        cls,
        cfg: ModelConfig,
        positions_bt: Int[Array, "B T"],
        mask_bt: Bool[Array, "B T"],
        cache: Cache | None = None,
    ) -> "Context":
        """Returns the views of consecutive tokens at these positions, which follow those of `cache`; `mask_bt` marks the real
        ones."""
        t = mask_bt.shape[1]
        back_tt = jnp.arange(t)[:, None] - jnp.arange(t)[None, :]  # how far back each token is of each other
        near_btt = (back_tt >= 0) & mask_bt[:, None, :]
        near_btc, back_btc = None, None
        if cache is not None:
            near_btc = jnp.broadcast_to(cache.mask_bc[:, None], (*mask_bt.shape, cache.mask_bc.shape[1]))
            back_btc = positions_bt[..., None] - cache.positions_bc[:, None]
        grown = any(kind.rope.query_growth for kind in cfg.kinds)
        eps = max((kind.unit_eps for kind in cfg.kinds if kind.unit_eps is not None), default=None)

        def seen(near, back, kind, positions_bc):
            """Returns which keys, of those that are real and not ahead, queries may attend to."""
            near = near if kind.window is None else near & (back < kind.window)
            if kind.chunk is None:
                return near
            return near & (positions_bt[:, :, None] // kind.chunk == positions_bc[:, None] // kind.chunk)

        def view(kind) -> View:
            cos_btr, sin_btr = kind.rope.tables(positions_bt)
            queries_bt = kind.rope.query_scales(positions_bt)
            if grown and queries_bt is None:
                queries_bt = jnp.ones(positions_bt.shape, jnp.float32)
            return View(
                cos_btr,
                sin_btr,
                seen(near_btt, back_tt, kind, positions_bt),
                None if cache is None else seen(near_btc, back_btc, kind, cache.positions_bc),
                queries_bt,
                None if eps is None else jnp.asarray(kind.unit_eps is not None),
                kind.rope.interleaved,
                eps or 0.0,
            )

        return cls(tuple(map(view, cfg.kinds)), jnp.asarray(mask_bt))

    @classmethod
    def of_prompt(cls, cfg: ModelConfig, mask_bt: Bool[Array, "B T"], cache: Cache | None = None) -> "Context":
        """Returns the views of left-padded rows: of whole prompts, or of what follows the tokens of `cache`."""
        positions_bt = jnp.maximum(jnp.cumsum(mask_bt, axis=1) - 1, 0)
        if cache is not None:
            positions_bt = cache.position_b[:, None] + positions_bt
        return cls.build(cfg, positions_bt, mask_bt, cache)

    def view(self, kind: jax.Array, among: tuple[int, ...] | None = None) -> View:
        """Returns the view of one layer.

        kind: int32 scalar, the layer's entry of `ModelConfig.layer_kinds`. among: the entries it may have, sorted; None: all.
        """
        among = tuple(range(len(self.views))) if among is None else among
        views = [self.views[index] for index in among]
        place = jnp.searchsorted(jnp.asarray(among, jnp.int32), kind) if len(views) > 1 else 0
        return views[0] if len(views) == 1 else jax.tree.map(lambda *cases: jax.lax.select_n(place, *cases), *views)


# Keys `[B, K, C, H]`, values `[B, K, C, V]`, and which of them each query may attend to, bool `[B, T, C]`.
Segment = tuple[jax.Array, jax.Array, jax.Array]


def _probabilities(
    q_btnh, segments: Sequence[Segment], sinks_n, scale: float, softcap: float | None
) -> list[jax.Array]:
    """Returns the softmax over all segments together, float32 `[B, K, G, T, C]` for each; as in `attend`."""
    b, t, n, h = q_btnh.shape
    kv_heads = segments[0][0].shape[1]
    precision = "highest" if q_btnh.dtype == jnp.float32 else None
    q_bkgth = q_btnh.reshape(b, t, kv_heads, n // kv_heads, h).transpose(0, 2, 3, 1, 4)

    def score(k_bkch, allowed_btc):
        scores = scale * jnp.einsum(
            "bkgth,bkch->bkgtc", q_bkgth, k_bkch, precision=precision, preferred_element_type=jnp.float32
        )
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        # A finite floor: a padding query attends to nothing, and softmax over all -inf would be NaN.
        return jnp.where(allowed_btc[:, None, None], scores, jnp.finfo(jnp.float32).min)

    scores = [score(k, allowed) for k, _, allowed in segments]
    sinks = [] if sinks_n is None else [sinks_n.astype(jnp.float32).reshape(1, kv_heads, n // kv_heads, 1, 1)]
    highest = functools.reduce(jnp.maximum, [*(jnp.max(s, axis=-1, keepdims=True) for s in scores), *sinks])
    weights = [jnp.exp(s - highest) for s in scores]
    totals = [*(jnp.sum(w, axis=-1, keepdims=True) for w in weights), *(jnp.exp(s - highest) for s in sinks)]
    total = functools.reduce(operator.add, totals)
    return [w / total for w in weights]


def attend(
    q_btnh: Float[jax.Array, "B T N H"],
    segments: Sequence[Segment],
    sinks_n: Float[jax.Array, " N"] | None,
    scale: float,
    softcap: float | None,
) -> Float[jax.Array, "B T F"]:
    """Returns grouped-query attention over one or more segments of keys and values, softmax in float32.

    F: the values of the heads, side by side. Scores of all segments share one softmax. Cached and new keys stay separate arrays:
    to attend, a decode step need not copy the cache. scale multiplies the scores, which `softcap` then bends. sinks_n: a score of
    each head that takes part in the softmax and has no value, so that a head need not attend to anything.
    """
    b, t = q_btnh.shape[:2]
    precision = "highest" if q_btnh.dtype == jnp.float32 else None
    probabilities = _probabilities(q_btnh, segments, sinks_n, scale, softcap)
    parts = [
        jnp.einsum("bkgtc,bkch->bkgth", p.astype(v.dtype), v, precision=precision)
        for p, (_, v, _) in zip(probabilities, segments, strict=True)
    ]
    out = functools.reduce(operator.add, parts)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, -1)


def attend_where_kept(
    mesh, q_btnh: Float[jax.Array, "B T N H"], segments: Sequence[Segment], sinks_n, scale: float, softcap: float | None
) -> Float[jax.Array, "B T F"]:
    """Returns what `attend` does, on a mesh whose chips may share out the rows of the cache: the queries of single tokens go to
    where keys and values are kept, and what they find comes back."""
    if q_btnh.shape[1] != 1:
        return attend(q_btnh, segments, sinks_n, scale, softcap)
    kv_heads = segments[0][0].shape[1]
    z_btf = attend(constrain_queries(mesh, q_btnh, kv_heads), segments, sinks_n, scale, softcap)
    found_btnv = constrain_queries(mesh, z_btf.reshape(*q_btnh.shape[:3], -1), kv_heads)
    n_heads = q_btnh.shape[2]
    z_btnv = constrain(mesh, found_btnv, "batch", None, ("heads", (kv_heads, n_heads // kv_heads)))
    return z_btnv.reshape(z_btf.shape)


def pattern(
    q_bqnh: Float[jax.Array, "B Q N H"],
    segments: Sequence[Segment],
    sinks_n: Float[jax.Array, " N"] | None,
    scale: float,
    softcap: float | None,
) -> Float[jax.Array, "B N Q C"]:
    """Returns the probabilities with which `attend` weighs the values of all segments, one after the other, for these queries
    alone; exactly 0 where a query may not attend. With sinks they sum to less than 1."""
    b, q, n, _ = q_bqnh.shape
    found = [
        jnp.where(allowed_bqc[:, None, None], p_bkgqc, 0.0)
        for p_bkgqc, (_, _, allowed_bqc) in zip(
            _probabilities(q_bqnh, segments, sinks_n, scale, softcap), segments, strict=True
        )
    ]
    return jnp.concatenate(found, axis=-1).reshape(b, n, q, -1)

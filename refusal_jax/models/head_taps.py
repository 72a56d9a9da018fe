"""Taps of single attention heads: their outputs, their attention patterns, and their contributions along a direction.

A head's part of attn_out . d needs no head's output in the width of the residual stream. All that follows the heads (output
projection, post-norm, residual multiplier, edits) is linear once the norm's denominator of a token is known: so the direction is
pulled back through it to the width of a head, once a row, and each head's output is multiplied with that.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float

from refusal_jax.axes import Array
from refusal_jax.edits import Edits
from refusal_jax.models.attention import Segment, pattern
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.sharding import constrain
from refusal_jax.taps import ALONG_SITES, HEAD_SITES, Taps


@dataclasses.dataclass(frozen=True)
class Heads:
    """One layer's attention on the way from its queries to the residual stream.

    q_btnh: queries, `[B, T, N, H]`. segments, sinks_n: what they attend to, as in `attend`. z_btf: outputs of the heads, side by
    side, `[B, T, N * V]`. out_btd: their output projection with its bias, and all that the layer's mixer adds besides,
    `[B, T, D]`, before any post-norm. o_df, o_bias_d: the weight and bias of the projection, the latter None without one. norm_d:
    what a post-norm multiplies its input with besides dividing it by its norm, None without a post-norm. gate_btf: what
    multiplied the outputs of the heads, None for nothing. widest: the width of the widest heads of any layer, to which taps are
    filled up with zeros. beside_btd: what the mixer adds besides, None for nothing.
    """

    q_btnh: jax.Array
    segments: list[Segment]
    sinks_n: jax.Array | None
    z_btf: jax.Array
    out_btd: jax.Array
    o_df: jax.Array
    o_bias_d: jax.Array | None
    norm_d: jax.Array | None
    gate_btf: jax.Array | None = None
    widest: int = 0
    beside_btd: jax.Array | None = None

    @property
    def split(self) -> tuple[int, int]:
        """Returns the number of key/value heads, and that of the queries of each."""
        kv_heads = self.segments[0][0].shape[1]
        return kv_heads, self.q_btnh.shape[2] // kv_heads


def read_heads(cfg: ModelConfig, mesh, heads: Heads, edits: Edits, gate_r, taps: Taps) -> dict[str, jax.Array]:
    """Returns the requested ones of `HEAD_SITES` for one layer, with axes as in `taps.TAP_AXES` less L, divided over the mesh as
    the heads are. gate_r: how far `edits` ablate what attention adds, of each row."""
    if not taps.asks(*HEAD_SITES):
        return {}
    divided = "heads", heads.split
    z_bpf = taps.cut(heads.z_btf)
    z_bpnh = constrain(mesh, z_bpf.reshape(*z_bpf.shape[:2], cfg.n_heads, -1), "batch", None, divided)
    read = {"z": jnp.pad(z_bpnh, ((0, 0),) * 3 + ((0, max(heads.widest - z_bpnh.shape[-1], 0)),))}
    if taps.asks("pattern", "result_along_by_source"):
        segments = [(k, v, taps.cut(allowed)) for k, v, allowed in heads.segments]
        q_bqnh = taps.cut(heads.q_btnh)
        pattern_bnqt = pattern(q_bqnh, segments, heads.sinks_n, cfg.query_scale, cfg.attention_softcap)
        read["pattern"] = constrain(mesh, pattern_bnqt, "batch", divided)
    if taps.asks(*ALONG_SITES):
        # An ablation is symmetric: it acts on either side of a product alike.
        ablated_bd = edits.ablated(jnp.asarray(taps.along)[:, None], gate_r)[:, 0]
        along_bd = before_norm(cfg, ablated_bd, heads.norm_d)
        along_bnh = constrain(mesh, to_heads(cfg, along_bd, heads.o_df), "batch", divided)
        scale_bp = constrain(mesh, norm_scale(cfg, taps.cut(heads.out_btd), heads.norm_d), "batch")
        along_bpn = jnp.einsum("bpnh,bnh->bpn", z_bpnh.astype(jnp.float32), along_bnh, precision="highest")
        read["result_along"] = along_bpn * scale_bp[..., None]
        bias_d = jnp.zeros_like(along_bd[0]) if heads.o_bias_d is None else heads.o_bias_d.astype(jnp.float32)
        read["o_bias_along"] = scale_bp * jnp.einsum("bd,d->b", along_bd, bias_d, precision="highest")[:, None]
        if heads.beside_btd is not None:
            beside_bpd = taps.cut(heads.beside_btd).astype(jnp.float32)
            read["o_bias_along"] += scale_bp * jnp.einsum("bpd,bd->bp", beside_bpd, along_bd, precision="highest")
        if taps.asks("result_along_by_source"):
            gate_bpf = None if heads.gate_btf is None else taps.cut(heads.gate_btf)
            by_source_bnqt = _values_along(cfg, heads, along_bnh, gate_bpf) * read["pattern"]
            read["result_along_by_source"] = by_source_bnqt.swapaxes(1, 2) * scale_bp[..., None, None]
    return {site: read[site] for site in taps.sites if site in read}


def no_heads(cfg: ModelConfig, taps: Taps, out_btd: Float[jax.Array, "B T D"]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of the requested ones of `HEAD_SITES` in a model none of whose layers has heads: of no heads."""
    (b, p), t = taps.cut(out_btd).shape[:2], out_btd.shape[1]
    shapes = {
        "z": ((b, p, 0, cfg.head_dim), out_btd.dtype),
        "pattern": ((b, 0, p, t), jnp.float32),
        "result_along": ((b, p, 0), jnp.float32),
        "result_along_by_source": ((b, p, 0, t), jnp.float32),
        "o_bias_along": ((b, p), jnp.float32),
    }
    return {site: jax.ShapeDtypeStruct(*shapes[site]) for site in taps.sites if site in shapes}


def before_norm(
    cfg: ModelConfig, along_bd: Float[Array, "B D"], norm_d: Float[jax.Array, " D"] | None
) -> Float[jax.Array, "B D"]:
    """Returns the direction before residual multiplier and a post-norm's weights, whose product with the projected heads, times
    `norm_scale`, is that of `along_bd` with what is added to the residual. norm_d: as in `Heads`."""
    along_bd = jnp.asarray(along_bd) * cfg.residual_scale
    return along_bd if norm_d is None else along_bd * norm_d


def to_heads(
    cfg: ModelConfig, along_bd: Float[jax.Array, "B D"], o_df: Float[jax.Array, "D F"]
) -> Float[jax.Array, "B N H"]:
    """Returns the direction, one from `before_norm`, before the output projection `o_df`, as each head sees it."""
    along_bf = jnp.einsum("bd,df->bf", along_bd, o_df.astype(jnp.float32), precision="highest")
    return along_bf.reshape(len(along_bf), cfg.n_heads, -1)


def norm_scale(
    cfg: ModelConfig, out_bpd: Float[jax.Array, "B P D"], norm_d: Float[jax.Array, " D"] | None
) -> Float[jax.Array, "B P"]:
    """Returns what a post-norm multiplies each token of the projected heads with, besides `norm_d`; 1 without one."""
    out_bpd = out_bpd.astype(jnp.float32)
    if norm_d is None:
        return jnp.ones(out_bpd.shape[:2], jnp.float32)
    return jax.lax.rsqrt(jnp.mean(out_bpd * out_bpd, axis=-1) + cfg.norm_eps)


def _values_along(cfg: ModelConfig, heads: Heads, along_bnh, gate_bpf) -> Float[jax.Array, "B N P T"]:
    """Returns the product of each token's value, as each query head reads it, with that head's direction, for each tapped
    position or, without gates, for all alike."""
    along_bpnh = along_bnh[:, None]
    if gate_bpf is not None:
        along_bpnh = along_bpnh * gate_bpf.astype(jnp.float32).reshape(*gate_bpf.shape[:2], *along_bnh.shape[1:])
    along_bpkgh = along_bpnh.reshape(*along_bpnh.shape[:2], *heads.split, -1)
    along_bkgpt = [
        jnp.einsum("bkth,bpkgh->bkgpt", v.astype(jnp.float32), along_bpkgh, precision="highest")
        for _, v, _ in heads.segments
    ]
    along = jnp.concatenate(along_bkgpt, axis=-1)
    return along.reshape(len(along), cfg.n_heads, *along.shape[3:])

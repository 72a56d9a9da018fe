"""Divides the residual stream at a prompt's template tokens into parts by where it came from, which sum to it.

The residual at a token is a sum: its embedding, what heads moved there from other tokens, and what MLPs added. Each part keeps
the name of its origin (`regions.ORIGINS`): what a head moves from an instruction's token is the instruction's, and what it moves
from one template token to another has the origins that it had there. With attention and the denominators of norms as they are,
all this is linear, so the parts are exact. What an MLP computes is an origin of its own, because it is no sum over the parts of
what it reads.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Float

from refusal_jax.mechanism.regions import MLPS, ORIGINS, REGIONS, TEMPLATE
from refusal_jax.models.block import Block
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.head_taps import before_norm, norm_scale, to_heads
from refusal_jax.models.layers import normed, row_parallel
from refusal_jax.models.mixers.attention import Attention
from refusal_jax.models.mixers.latent import Latent
from refusal_jax.models.sharding import constrain
from refusal_jax.models.weights import mixers_of


@dataclasses.dataclass(frozen=True)
class Moved:
    """Holds what a layer's heads move to the template's tokens.

    parts_bqwd: what is added to the residual stream, by origin, float32 `[B, Q, W, D]`. along_bpwn: product of each template
    token's value with what a head writes of it along the direction, by the value's origin, `[B, P, W, N]`; its product with
    a query's attention and `scale_bq`, `[B, Q]`, is what the head adds along the direction.
    """

    parts_bqwd: jax.Array
    along_bpwn: jax.Array
    scale_bq: jax.Array


def first_origins(x_bpd: Float[jax.Array, "B P D"]) -> Float[jax.Array, "B P W D"]:
    """Returns the parts of the template tokens' embeddings, which are the template's own, float32."""
    own_w = jax.nn.one_hot(TEMPLATE, len(ORIGINS))
    return x_bpd.astype(jnp.float32)[:, :, None] * own_w[:, None]


def with_mlp(parts_bpwd: Float[jax.Array, "B P W D"], mlp_out_bpd) -> Float[jax.Array, "B P W D"]:
    """Returns the parts once an MLP has added to them."""
    return parts_bpwd.at[:, :, ORIGINS.index(MLPS)].add(mlp_out_bpd.astype(jnp.float32))


def moved(
    block: Block,
    parts_bpwd: Float[jax.Array, "B P W D"],
    resid_bpd: Float[jax.Array, "B P D"],
    pattern_bnqt: Float[jax.Array, "B N Q T"],
    values_bkth: Float[jax.Array, "B K T H"],
    regions_btw: Float[jax.Array, "B T W"],
    along_bd: Float[jax.Array, "B D"],
) -> Moved:
    """Returns what one layer's heads move to the template's tokens, which are a row's last P, and the queries of `pattern_bnqt`.

    parts_bpwd: origins of the residual `resid_bpd` at the block's input. values_bkth: of all tokens. regions_btw: 1 where a token
    is in a region of `REGIONS`, else 0.
    """
    cfg, mesh = block.cfg, block.mesh
    b, p, w = parts_bpwd.shape[:3]
    split = cfg.n_kv_heads, cfg.queries_per_kv
    own_bpwkh = _values(block, parts_bpwd, resid_bpd).reshape(b, p, w, cfg.n_kv_heads, -1)
    pattern_bkgqt = pattern_bnqt.reshape(b, *split, *pattern_bnqt.shape[2:])
    values_bkth = values_bkth.astype(jnp.float32)
    shape = b, p, cfg.n_heads, own_bpwkh.shape[-1]
    z_bqwnh = _einsum("bkgqp,bpwkh->bqwkgh", pattern_bkgqt[..., -p:], own_bpwkh).reshape(b, p, w, *shape[2:])
    for place, name in enumerate(REGIONS):
        if place != TEMPLATE:
            masked_bkgqt = pattern_bkgqt * regions_btw[:, None, None, None, :, place]
            from_bqkgh = _einsum("bkgqt,bkth->bqkgh", masked_bkgqt, values_bkth)
            z_bqwnh = z_bqwnh.at[:, :, ORIGINS.index(name)].add(from_bqkgh.reshape(shape))
    z_bqwnh = constrain(mesh, z_bqwnh, "batch", None, None, ("heads", split))
    out_bqwd, whole_bqd = _written(block, z_bqwnh)
    norm_d = block.post_norm_d
    if norm_d is not None:
        out_bqwd = normed(cfg, whole_bqd[:, :, None], block.weight("attn_post_norm"), out_bqwd)
    along_bnh = to_heads(cfg, before_norm(cfg, along_bd, norm_d), block.weight("o"))
    along_bpwkg = _einsum("bpwkh,bkgh->bpwkg", own_bpwkh, along_bnh.reshape(b, *split, -1))
    parts_bqwd = constrain(mesh, cfg.residual_scale * out_bqwd, "batch")
    return Moved(parts_bqwd, along_bpwkg.reshape(b, p, w, -1), norm_scale(cfg, whole_bqd, norm_d))


def _einsum(axes: str, *arrays) -> jax.Array:
    return jnp.einsum(axes, *arrays, precision="highest")


def reading_mixer(cfg: ModelConfig) -> Attention | Latent:
    """Returns the mixer of a model all of whose layers have the same attention, whose values can be followed."""
    (mixer,) = mixers_of(cfg)
    assert isinstance(mixer, Attention | Latent), "layers without attention are not read by region"
    return mixer


def _values(block: Block, parts_bpwd, resid_bpd) -> Float[jax.Array, "B P W F"]:
    """Returns the values of the template's tokens by origin, all key/value heads side by side.

    A bias is the template's own. So is a value that is clipped, since no part of its input changes it.
    """
    scale = block.weight("attn_norm")
    read_bpwd = parts_bpwd if scale is None else normed(block.cfg, resid_bpd[:, :, None], scale, parts_bpwd)
    values_bpwf, constant_bpf = reading_mixer(block.cfg).value_parts(block, read_bpwd)
    return values_bpwf.at[:, :, TEMPLATE].add(constant_bpf)


def _written(block: Block, z_bqwnh) -> tuple[Float[jax.Array, "B Q W D"], Float[jax.Array, "B Q D"]]:
    """Returns the heads' projected output before any post-norm, by origin and in whole; the bias is the template's own."""
    b, q, w = z_bqwnh.shape[:3]
    z_bqf, spec = z_bqwnh.reshape(b, q * w, -1), PartitionSpec(*block.spec("o")[1:])
    out_bqwd = row_parallel(block.mesh, spec, z_bqf, block.weight("o").astype(jnp.float32)).reshape(b, q, w, -1)
    out_bqwd = constrain(block.mesh, out_bqwd, "batch")
    if (bias := block.weight("o_bias")) is not None:
        out_bqwd = out_bqwd.at[:, :, TEMPLATE].add(bias.astype(jnp.float32))
    return out_bqwd, out_bqwd.sum(axis=2)

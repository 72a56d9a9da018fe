"""Multi-head latent attention (DeepSeek V2, arXiv:2405.04434, section 2.1): keys and values of all heads are made of one short
vector of each token, its latent, and only that is kept.

A prompt makes keys and values of its latents for every head, which is the cheaper way for many queries. Where a single token
follows others, queries go to the latents instead: for a head whose keys are K c and whose values are V c, a score is (K^T q) . c
and the output V (sum of p c). So a decode step reads one vector of each token, however many heads there are.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float

from refusal_jax.models.attention import Context, Segment, View, attend, attend_where_kept
from refusal_jax.models.cache import Tokens, placed
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.head_taps import Heads
from refusal_jax.models.layers import linear, normed
from refusal_jax.models.mixers.mixer import Mixed
from refusal_jax.models.sharding import constrain
from refusal_jax.models.weight import Weight, growth


@dataclasses.dataclass(frozen=True)
class Latent:
    """Sizes of latent attention.

    kv_rank: width of a token's latent. q_rank: of what queries are made from, None: the layer's input itself. plain_dim,
    rope_dim: entries of a query or key without a rope, and of those that follow with one, which the keys of all heads share.
    v_dim: width of a head's values. bias: whether what makes latents, and what writes to the residual, has one. norm_eps: of the
    norms of latents, whatever the config says of others.
    """

    kv_rank: int
    q_rank: int | None
    plain_dim: int
    rope_dim: int
    v_dim: int
    bias: bool = False
    norm_eps: float = 1e-6
    reads = None
    has_heads = True

    def weights(self, cfg: ModelConfig) -> dict[str, Weight]:
        """Returns the weights of one layer. Rows of a head stay together; every chip makes all latents."""
        d, n, heads = cfg.d_model, cfg.n_heads, (cfg.n_kv_heads, cfg.queries_per_kv)
        q, kv, v = n * (self.plain_dim + self.rope_dim), n * (self.plain_dim + self.v_dim), n * self.v_dim
        made = {"latent_kv": (self.kv_rank, self.rope_dim)}
        block = {
            "latent_kv_up": Weight((kv, self.kv_rank), ("heads", "latent"), self.kv_rank**-0.5, heads),
            "o": Weight((d, v), ("embed", "heads"), growth(cfg) * v**-0.5, heads),
        }
        if self.q_rank is None:
            block["latent_q"] = Weight((q, d), ("heads", "embed"), d**-0.5, heads)
        else:
            block["latent_q_up"] = Weight((q, self.q_rank), ("heads", "latent"), self.q_rank**-0.5, heads)
            made["latent_q"] = (self.q_rank, 0)
        for name, (rank, more) in made.items():
            block[f"{name}_down"] = Weight((rank + more, d), ("norm", "embed"), d**-0.5)
            block[f"{name}_norm"] = Weight((rank,), ("norm",), None)
            if self.bias:
                block[f"{name}_down_bias"] = Weight((rank + more,), ("norm",), 0.0)
        return block | ({"o_bias": Weight((d,), ("norm",), 0.0)} if self.bias else {})

    def memory(self, cfg: ModelConfig, rows: int, tokens: int, dtype) -> Tokens:
        """Returns room for latents, each with the part of its keys that has a rope behind it; zeros."""
        return Tokens((jnp.zeros((rows, 1, tokens, self.kv_rank + self.rope_dim), dtype),))

    def mix(self, here, h_btd: Float[jax.Array, "B T D"], ctx: Context, past: Tokens | None) -> Mixed:
        """Returns attention on the input, as `Mixer.mix` does; its memory is the tokens' latents.

        Heads have queries, keys and values in full width; for a single token that follows others, these are computed only where a
        tap asks for them.
        """
        cfg, view = here.cfg, ctx.view(here.layer.kind)
        up_nwr, q_btnh = self._up(here), self._queries(here, h_btd, view)
        alone = past is not None and h_btd.shape[1] == 1
        new = placed(here.mesh, Tokens((self._latents(here, h_btd, view),)), layers=False, decoding=alone)
        kept: list[tuple[jax.Array, jax.Array]] = [(new.parts[0], view.allowed_btt)]
        if past is not None and view.allowed_btc is not None:
            kept.insert(0, (past.parts[0], view.allowed_btc))
        segments: list[Segment] = [(*self.expanded(here.mesh, up_nwr, c), allowed) for c, allowed in kept]
        if len(kept) > 1 and alone:
            z_btf = self.absorbed(here.mesh, up_nwr, q_btnh, kept, cfg.query_scale)
        else:
            z_btf = attend(q_btnh, segments, None, cfg.query_scale, None)
        out_btd, o, bias = here.out("o", z_btf), here.weight("o"), here.weight("o_bias")
        found = Heads(q_btnh, segments, None, z_btf, out_btd, o, bias, here.post_norm_d)
        return Mixed(out_btd, new, found)

    def values(self, here, kept: Tokens) -> Float[jax.Array, "B N T V"]:
        """Returns the values of tokens of which `kept` is the memory."""
        return self.expanded(here.mesh, self._up(here), kept.parts[0])[1]

    def value_parts(
        self, here, read_bpwd: Float[jax.Array, "B P W D"]
    ) -> tuple[Float[jax.Array, "B P W F"], Float[jax.Array, "B P F"]]:
        """Returns which values the parts of an input make that sum to it, of all heads side by side, and what these have besides;
        float32. The norm of latents is linear once its denominator is known, which is that of the whole."""
        down, bias = (here.weight(f"latent_kv_down{kind}") for kind in ("", "_bias"))
        c_bpwr = linear(read_bpwd, down[: self.kv_rank].astype(jnp.float32))
        constant_bpr = jnp.zeros_like(c_bpwr[:, :, 0])
        if bias is not None:
            constant_bpr = constant_bpr + bias[: self.kv_rank].astype(jnp.float32)
        parts_bpxr = jnp.concatenate([c_bpwr, constant_bpr[:, :, None]], axis=2)
        whole_bp1r = jnp.sum(parts_bpxr, axis=2, keepdims=True)
        parts_bpxr = self._normed(here.cfg, whole_bp1r, here.weight("latent_kv_norm"), parts_bpxr)
        up_fr = self._up(here)[:, self.plain_dim :].reshape(-1, self.kv_rank)
        values_bpxf = linear(parts_bpxr, up_fr.astype(jnp.float32))
        return values_bpxf[:, :, :-1], values_bpxf[:, :, -1]

    def _up(self, here) -> Float[jax.Array, "N W R"]:
        """Returns of each head what makes keys of a latent, then what makes values."""
        return here.weight("latent_kv_up").reshape(here.cfg.n_heads, self.plain_dim + self.v_dim, self.kv_rank)

    def _normed(self, cfg: ModelConfig, x, scale, part=None):
        return normed(dataclasses.replace(cfg, norm_eps=self.norm_eps), x, scale, part)

    def _queries(self, here, h_btd: Float[jax.Array, "B T D"], view: View) -> Float[jax.Array, "B T N H"]:
        """Returns the queries, rotated."""
        if self.q_rank is None:
            q_btf = linear(h_btd, here.factored("latent_q"))
        else:
            c_btr = linear(h_btd, here.factored("latent_q_down"), here.weight("latent_q_down_bias"))
            c_btr = self._normed(here.cfg, c_btr, here.weight("latent_q_norm"))
            q_btf = linear(c_btr, here.factored("latent_q_up"))
        # Without the barrier, the order of axes that attention likes makes a TPU copy the weights first.
        q_btnh = jax.lax.optimization_barrier(q_btf).reshape(*q_btf.shape[:2], here.cfg.n_heads, -1)
        plain, rotated = q_btnh[..., : self.plain_dim], view.rotate(q_btnh[..., self.plain_dim :])
        return view.scaled(jnp.concatenate([plain, rotated], axis=-1))

    def _latents(self, here, h_btd: Float[jax.Array, "B T D"], view: View) -> Float[jax.Array, "B 1 T R"]:
        """Returns each token's latent, normed, and the rotated part of its keys behind it."""
        c_btr = linear(h_btd, here.factored("latent_kv_down"), here.weight("latent_kv_down_bias"))
        latent_btr = self._normed(here.cfg, c_btr[..., : self.kv_rank], here.weight("latent_kv_norm"))
        rotated_btr = view.rotate(c_btr[:, :, None, self.kv_rank :])[:, :, 0]
        return constrain(here.mesh, jnp.concatenate([latent_btr, rotated_btr], axis=-1)[:, None], "batch")

    def expanded(
        self, mesh, up_nwr: Float[jax.Array, "N W R"], kept_b1cr: Float[jax.Array, "B 1 C S"]
    ) -> tuple[Float[jax.Array, "B N C H"], Float[jax.Array, "B N C V"]]:
        """Returns the keys and values of every head. kept_b1cr: as in `memory`."""
        kept_bcr = kept_b1cr[:, 0]
        kv_bncw = _einsum("bcr,nwr->bncw", kept_bcr[..., : self.kv_rank], up_nwr)
        shared = jnp.broadcast_to(kept_b1cr[..., self.kv_rank :], (*kv_bncw.shape[:3], self.rope_dim))
        k_bnch = jnp.concatenate([kv_bncw[..., : self.plain_dim], shared], axis=-1)
        k, v = (constrain(mesh, a, "batch", "kv_heads") for a in (k_bnch, kv_bncw[..., self.plain_dim :]))
        return k, v

    def absorbed(
        self, mesh, up_nwr: Float[jax.Array, "N W R"], q_btnh: Float[jax.Array, "B T N H"], kept, scale: float
    ) -> Float[jax.Array, "B T F"]:
        """Returns what `attend` does of the `expanded` segments, without these. kept: latents as in `memory`, and which of them
        each query may attend to."""
        plain, rotated = q_btnh[..., : self.plain_dim], q_btnh[..., self.plain_dim :]
        q_btnr = _einsum("btnh,nhr->btnr", plain, up_nwr[:, : self.plain_dim])
        # Latents count as values with the keys' part behind them, which is cut off later: a slice of the cache would be a copy.
        segments = [(c, c, allowed) for c, allowed in kept]
        c_btf = attend_where_kept(mesh, jnp.concatenate([q_btnr, rotated], axis=-1), segments, None, scale, None)
        c_btnr = c_btf.reshape(*q_btnr.shape[:3], -1)[..., : self.kv_rank]
        z_btnv = _einsum("btnr,nvr->btnv", c_btnr, up_nwr[:, self.plain_dim :])
        return z_btnv.reshape(*z_btnv.shape[:2], -1)


def _einsum(axes: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """Returns a product in x's dtype; float32 inputs are multiplied in float32."""
    return jnp.einsum(axes, x, w, precision="highest" if x.dtype == jnp.float32 else None)

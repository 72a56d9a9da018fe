"""State-space layers as Mamba-2 has them (Dao and Gu, 2024): a recurrence over tokens with a state for each head.

Each token makes of a head's input x `[H]`, a time step dt, and its group's B and C `[Z]` each:

    state = exp(-rate * dt) * state + dt * x (outer) B        output = state C + skip * x

Prompts are computed in chunks: within one, the recurrence is products of matrices as in attention without a softmax; a scan
over chunks carries the state. One token is computed as it stands above. Time steps, decays and states are float32.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Float

from refusal_jax.axes import Array
from refusal_jax.models.attention import Context
from refusal_jax.models.cache import State
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.layers import ACTIVATE, linear
from refusal_jax.models.mixers.convolution import windowed
from refusal_jax.models.mixers.mixer import Mixed
from refusal_jax.models.sharding import constrain
from refusal_jax.models.weight import Weight, growth

CHUNK = 128  # tokens, at most 128 (`_sums`); a chunk's decays take as much memory as so many numbers for each token and head
PARTS = ("z", "x", "b", "c", "dt")  # of the input projection, in the order of its rows in HF's files
CONVOLVED = ("x", "b", "c")


@dataclasses.dataclass(frozen=True)
class StateSpace:
    """Sizes and switches of a Mamba-2 layer.

    Of its weights, `ssm_z` … `ssm_dt` are the rows of HF's `in_proj`, and `ssm_conv_x` … those of `conv1d`; `ssm_step_bias` is
    its `dt_bias`, `ssm_rate_log` its `A_log`, `ssm_skip` its `D`. Heads are divided over a mesh as those of attention are, by
    groups first.
    """

    heads: int
    head_dim: int
    state: int  # entries of the state for each entry of a head
    groups: int = 1  # heads of one group share B and C
    width: int = 4  # tokens that the convolution sees
    activation: str = "silu"  # of the convolution
    conv_bias: bool = True
    in_bias: bool = False
    out_bias: bool = False
    norm: str = "gated"  # of each group's heads: "gated" norms what is gated, "before" gates what is normed; "": none
    step_limits: tuple[float, float] = (0.0, math.inf)  # of dt, after its softplus
    in_scale: float = 1.0  # multiplies the input
    part_scales: tuple[float, ...] = (1.0,) * 5  # multiply what `in_proj` makes of it, each of `PARTS`
    out_scale: float = 1.0  # multiplies the output
    reads = None
    has_heads = False

    @property
    def heads_by_group(self) -> tuple[int, int]:
        return self.groups, self.heads // self.groups

    def rows(self, part: str) -> tuple[int, tuple[int, int]]:
        """Returns how many entries one of `PARTS` has, and the heads or groups that they belong to, as in `Weight.heads`."""
        if part in ("b", "c"):
            return self.groups * self.state, (self.groups, 1)
        return self.heads * (1 if part == "dt" else self.head_dim), self.heads_by_group

    def weights(self, cfg: ModelConfig) -> dict[str, Weight]:
        """Returns the weights of one layer, by name."""
        d, inner, heads = cfg.d_model, self.heads * self.head_dim, self.heads_by_group
        table = {}
        for part in PARTS:
            rows, of = self.rows(part)
            table[f"ssm_{part}"] = Weight((rows, d), ("heads", "embed"), d**-0.5, of)
            if self.in_bias:
                table[f"ssm_{part}_bias"] = Weight((rows,), ("heads",), 0.0, of)
        for part in CONVOLVED:
            rows, of = self.rows(part)
            shape, axes = (rows, 1, self.width), ("heads", "norm", "norm")
            table[f"ssm_conv_{part}"] = Weight(shape, axes, self.width**-0.5, of)
            if self.conv_bias:
                table[f"ssm_conv_{part}_bias"] = Weight((rows,), ("heads",), 0.0, of)
        for name, std in (("step_bias", 0.0), ("rate_log", 0.0), ("skip", None)):
            table[f"ssm_{name}"] = Weight((self.heads,), ("heads",), std, heads, exact=True, as_is=True)
        if self.norm:
            table["ssm_norm"] = Weight((inner,), ("heads",), None, heads, as_is=True)
        table["ssm_o"] = Weight((d, inner), ("embed", "heads"), growth(cfg) * inner**-0.5, heads)
        if self.out_bias:
            table["ssm_o_bias"] = Weight((d,), ("norm",), 0.0)
        return table

    def memory(self, cfg: ModelConfig, rows: int, tokens: int, dtype) -> State:
        """Returns zeros for the last inputs of the convolution, of each of `CONVOLVED`, and for the state."""
        wide, narrow = (self.heads, self.head_dim), (self.groups, self.state)
        windows = (jnp.zeros((rows, *sizes, self.width - 1), dtype) for sizes in (wide, narrow, narrow))
        return State((*windows, jnp.zeros((rows, *wide, self.state), jnp.float32)))

    def mix(self, here, h_btd: Float[jax.Array, "B T D"], ctx: Context, past: State | None) -> Mixed:
        """Returns the layer's output and its state after the tokens, as `Mixer.mix` does."""
        b, t, _ = h_btd.shape
        *windows, state_bnhz = (past or self.memory(here.cfg, b, t, h_btd.dtype)).parts
        projected = dict(zip(PARTS, self._projected(here, h_btd), strict=True))
        convolved, ends = [], []
        for part, window in zip(CONVOLVED, windows, strict=True):
            x_btc, end_bcw = self._convolved(here, part, projected[part], ctx.mask_bt, window)
            convolved.append(x_btc)
            ends.append(end_bcw)
        counts = self.heads, self.groups, self.groups
        x_btnh, b_btkz, c_btkz = (a.reshape(b, t, n, -1) for a, n in zip(convolved, counts, strict=True))
        dt_btn = time_steps(projected["dt"], here.weight("ssm_step_bias"), self.step_limits, ctx.mask_bt)
        rate_n = jnp.exp(here.weight("ssm_rate_log").astype(jnp.float32))
        run = recurrent if t == 1 else chunked
        y_btnh, state_bnhz = run(x_btnh, dt_btn, rate_n, b_btkz, c_btkz, state_bnhz)
        y_btnh = y_btnh + here.weight("ssm_skip").astype(jnp.float32)[:, None] * x_btnh.astype(jnp.float32)
        y_btf, scale_f = y_btnh.reshape(b, t, -1), here.weight("ssm_norm")
        y_btf = gated_norm(y_btf, projected["z"], scale_f, self.groups, here.cfg.norm_eps, self.norm)
        out_btd = here.out("ssm_o", y_btf)
        return Mixed(out_btd if self.out_scale == 1 else out_btd * self.out_scale, State((*ends, state_bnhz)))

    def _projected(self, here, h_btd) -> list[jax.Array]:
        """Returns each of `PARTS` of the input projection, its last axis divided over the mesh by heads."""
        h_btd, parts = h_btd if self.in_scale == 1 else h_btd * self.in_scale, []
        for part, scale in zip(PARTS, self.part_scales, strict=True):
            x_btc = linear(h_btd, here.factored(f"ssm_{part}"), here.weight(f"ssm_{part}_bias"))
            x_btc = constrain(here.mesh, x_btc, "batch", None, ("heads", self.rows(part)[1]))
            parts.append(x_btc if scale == 1 else x_btc * scale)
        return parts

    def _convolved(self, here, part: str, x_btc, mask_bt, window):
        """Returns one of `CONVOLVED` through the convolution and its activation, and the last inputs of the convolution."""
        x_btc, end_bcw = windowed(
            x_btc, here.weight(f"ssm_conv_{part}")[:, 0], mask_bt, window.reshape(len(window), -1, self.width - 1)
        )
        bias = here.weight(f"ssm_conv_{part}_bias")
        return ACTIVATE[self.activation](x_btc if bias is None else x_btc + bias), end_bcw.reshape(window.shape)


def time_steps(
    dt_btn: Float[Array, "B T N"], bias_n: Float[Array, " N"], limits: tuple[float, float], mask_bt
) -> Float[jax.Array, "B T N"]:
    """Returns the time step of each token and head: a softplus, within `limits`; 0 for padding, which so leaves states alone."""
    dt_btn = jax.nn.softplus(dt_btn.astype(jnp.float32) + bias_n.astype(jnp.float32))
    return jnp.where(mask_bt[..., None], jnp.clip(dt_btn, *limits), 0.0)


def gated_norm(
    y_btf: Float[jax.Array, "B T F"], z_btf: Float[jax.Array, "B T F"], scale_f, groups: int, eps: float, kind: str
) -> Float[jax.Array, "B T F"]:
    """Returns the heads' outputs, gated by silu(z), and normed over the entries of each group; float32 inside, the dtype of z
    outside.

    scale_f: weights of the norm. kind: as `StateSpace.norm`.
    """
    gate_btf = jax.nn.silu(z_btf.astype(jnp.float32))
    y_btf = y_btf.astype(jnp.float32) * (1.0 if kind == "before" else gate_btf)
    if kind:
        y_btkf = y_btf.reshape(*y_btf.shape[:2], groups, -1)
        root = jax.lax.rsqrt(jnp.mean(y_btkf * y_btkf, axis=-1, keepdims=True) + eps)
        y_btf = (y_btkf * root).reshape(y_btf.shape) * scale_f.astype(jnp.float32)
    return (y_btf * gate_btf if kind == "before" else y_btf).astype(z_btf.dtype)


def recurrent(x_btnh, dt_btn, rate_n, b_btkz, c_btkz, state_bnhz) -> tuple[jax.Array, jax.Array]:
    """Returns what `chunked` does, for one token (T is 1)."""
    b, _, n, h = x_btnh.shape
    groups, size = b_btkz.shape[2:]
    b_bkz, c_bkz = b_btkz[:, 0].astype(jnp.float32), c_btkz[:, 0].astype(jnp.float32)
    dt_bkg = dt_btn.reshape(b, groups, n // groups)
    inputs_bkgh = x_btnh.reshape(b, groups, n // groups, h).astype(jnp.float32) * dt_bkg[..., None]
    decay_bkg = jnp.exp(-dt_bkg * rate_n.reshape(groups, -1))
    state_bkghz = state_bnhz.reshape(b, groups, n // groups, h, size) * decay_bkg[..., None, None]
    state_bkghz = state_bkghz + inputs_bkgh[..., None] * b_bkz[:, :, None, None]
    y_bkgh = jnp.sum(state_bkghz * c_bkz[:, :, None, None], axis=-1)
    return y_bkgh.reshape(b, 1, n, h), state_bkghz.reshape(state_bnhz.shape)


def chunked(
    x_btnh: Float[Array, "B T N H"],
    dt_btn: Float[Array, "B T N"],
    rate_n: Float[Array, " N"],
    b_btkz: Float[Array, "B T K Z"],
    c_btkz: Float[Array, "B T K Z"],
    state_bnhz: Float[jax.Array, "B N H Z"],
) -> tuple[Float[jax.Array, "B T N H"], Float[jax.Array, "B N H Z"]]:
    """Returns the recurrence's outputs, float32, without the skip, and the state after the last token.

    dt_btn: float32, 0 where a token is to change nothing. rate_n: how fast a state decays. K counts groups of heads, whose heads
    follow each other. state_bnhz: float32, before the first token.
    """
    b, t, n, h = x_btnh.shape
    groups, size = b_btkz.shape[2:]
    chunks, by_group = -(-t // CHUNK), (groups, n // groups)
    length = t if chunks == 1 else 8 * -(-t // (8 * chunks))

    def cut(a, *axes: int):
        """Returns `[chunks, B, K, …, length, …]`, with tokens of zeros at the end. axes: what stands in place of the heads."""
        padded = jnp.pad(a, [(0, chunks * length - t) if axis == 1 else (0, 0) for axis in range(a.ndim)])
        parts = padded.reshape(b, chunks, length, *axes, *a.shape[3:])
        return jnp.moveaxis(parts, (1, 2), (0, 2 + len(axes)))

    def one(state_bkghz, parts):
        return _chunk(state_bkghz, rate_n.reshape(by_group), *parts)

    parts = cut(x_btnh, *by_group), cut(dt_btn, *by_group), cut(b_btkz, groups), cut(c_btkz, groups)
    state_bkghz = state_bnhz.reshape(b, *by_group, h, size)
    if chunks == 1:
        state_bkghz, y = one(state_bkghz, jax.tree.map(lambda a: a[0], parts))
        y = y[None]
    else:
        state_bkghz, y = jax.lax.scan(one, state_bkghz, parts)
    y_btnh = jnp.moveaxis(y, (0, 4), (1, 2)).reshape(b, chunks * length, n, h)[:, :t]
    return y_btnh, state_bkghz.reshape(state_bnhz.shape)


def _chunk(state_bkghz, rate_kg, x_bkgth, dt_bkgt, b_bktz, c_bktz) -> tuple[jax.Array, jax.Array]:
    """Returns the state after one chunk, and the outputs `[B, K, G, T, H]` of its tokens."""
    exact = {"precision": "highest", "preferred_element_type": jnp.float32}
    inputs_bkgth = x_bkgth.astype(jnp.float32) * dt_bkgt[..., None]
    sums = _sums(-dt_bkgt * rate_kg[..., None])
    between_bkgtt = sum(sum_bkgt[..., :, None] - sum_bkgt[..., None, :] for sum_bkgt in sums)
    decay_bkgtt = jnp.exp(jnp.where(jnp.tri(dt_bkgt.shape[-1], dtype=bool), between_bkgtt, -jnp.inf))
    pairs_bktt = jnp.einsum("bktz,bksz->bkts", c_bktz, b_bktz, **exact)
    y_bkgth = jnp.einsum("bkgts,bkgsh->bkgth", pairs_bktt[:, :, None] * decay_bkgtt, inputs_bkgth, **exact)
    since_bkgt = jnp.exp(sum(sums))  # the decay of the state before the chunk
    left_bkgt = jnp.exp(sum(sum_bkgt[..., -1:] - sum_bkgt for sum_bkgt in sums))  # of each token until the chunk's end
    b_bktz, c_bktz = b_bktz.astype(jnp.float32), c_bktz.astype(jnp.float32)
    from_state = jnp.einsum("bktz,bkghz->bkgth", c_bktz, state_bkghz, **exact)
    y_bkgth = y_bkgth + from_state * since_bkgt[..., None]
    new_bkghz = jnp.einsum("bkgth,bktz->bkghz", inputs_bkgth * left_bkgt[..., None], b_bktz, **exact)
    return state_bkghz * since_bkgt[..., -1, None, None] + new_bkghz, y_bkgth


def _sums(logs_t: Float[jax.Array, "... T"]) -> tuple[jax.Array, jax.Array]:
    """Returns the sums of logarithms of decays up to each token, in two parts, whose differences are as exact as a sum from one
    token to the other: one large sum would lose, after a fast decay, what is small.

    The first part sums multiples of 2^-10 down to -2^6, of which a chunk has at most 2^7: so it has no more than 24 bits. A decay
    below exp(-64) is taken for that.
    """
    logs_t = jnp.maximum(logs_t, -64.0)
    coarse_t = jnp.round(logs_t * 1024) / 1024
    return jnp.cumsum(coarse_t, axis=-1), jnp.cumsum(logs_t - coarse_t, axis=-1)

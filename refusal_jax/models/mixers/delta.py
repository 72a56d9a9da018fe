"""The gated delta rule (arXiv:2412.06464), by which layers of Qwen3-Next and Qwen 3.5 pass on what they have read.

Each value head keeps a matrix from keys to values. A token first lets it decay; then it reads the value that the matrix has for
its key, and writes the difference to its own value, times beta, under that key; what its query reads is its output. K counts the
heads of queries and keys, G the value heads of each; H are the entries of a key, I those of a value. All is float32.
"""

import dataclasses

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

CHUNK = 64  # tokens that are computed at once


@dataclasses.dataclass(frozen=True)
class DeltaRule:
    """The sizes of a gated delta rule: how many heads there are of queries and keys, and of values; the entries of each; and how
    many tokens its convolution sees.

    by_head: whether one matrix makes queries, keys, values and the output's gates of one key head after the other, and another
    betas and steps, as in Qwen3-Next; else each has a matrix. Of the weights, `delta_rate_log` is HF's `A_log`, and
    `delta_step_bias` its `dt_bias`. Heads are divided over a mesh as those of attention are, by key heads first.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    width: int
    by_head: bool = False
    reads = None
    has_heads = False

    @property
    def heads(self) -> tuple[int, int]:
        """Returns the number of key heads, and that of the value heads of each."""
        return self.key_heads, self.value_heads // self.key_heads

    def rows(self, part: str) -> tuple[int, tuple[int, int]]:
        """Returns how many rows a projection has, and the heads that they belong to, as in `Weight.heads`. part: one of q, k, v,
        z, b and a, or several of them by head."""
        keys = self.key_heads * self.key_dim
        each = {"q": keys, "k": keys, "b": self.value_heads, "a": self.value_heads}
        count = sum(each.get(one, self.value_heads * self.value_dim) for one in part)
        return count, (self.key_heads, 1) if part in ("q", "k") or len(part) > 1 else self.heads

    def weights(self, cfg: ModelConfig) -> dict[str, Weight]:
        """Returns each weight of one layer by its name."""
        d, inner, table = cfg.d_model, self.value_heads * self.value_dim, {}
        for part in ("qkvz", "ba") if self.by_head else "qkvzba":
            rows, of = self.rows(part)
            table[f"delta_{part}"] = Weight((rows, d), ("heads", "embed"), d**-0.5, of)
        for part in "qkv":
            rows, of = self.rows(part)
            axes = ("heads", "norm", "norm")
            table[f"delta_{part}_conv"] = Weight((rows, 1, self.width), axes, self.width**-0.5, of)
        for name in ("rate_log", "step_bias"):
            table[f"delta_{name}"] = Weight((self.value_heads,), ("heads",), 0.0, self.heads, exact=True)
        table["delta_norm"] = Weight((self.value_dim,), ("norm",), None, as_is=True)
        table["delta_o"] = Weight((d, inner), ("embed", "heads"), growth(cfg) * inner**-0.5, self.heads)
        return table

    def memory(self, cfg: ModelConfig, rows: int, tokens: int, dtype) -> State:
        """Returns zeros for the last inputs of the convolution, of queries, keys and values, and for the matrices."""
        keys, values = (self.key_heads, self.key_dim), (self.value_heads, self.value_dim)
        windows = (jnp.zeros((rows, *sizes, self.width - 1), dtype) for sizes in (keys, keys, values))
        return State((*windows, jnp.zeros((rows, self.value_heads, self.key_dim, self.value_dim), jnp.float32)))

    def mix(self, here, h_btd: Float[jax.Array, "B T D"], ctx: Context, past: State | None) -> Mixed:
        """Returns the layer's output and its state after the tokens, as `Mixer.mix` does."""
        (b, t, _), cfg, new = h_btd.shape, here.cfg, []
        *windows, state = (past or self.memory(cfg, b, t, h_btd.dtype)).parts
        made = self._projected(here, h_btd)
        for part, window in zip("qkv", windows, strict=True):
            flat = window.reshape(b, -1, self.width - 1)
            x_btc, end = windowed(made[part], here.weight(f"delta_{part}_conv")[:, 0], ctx.mask_bt, flat)
            made[part] = ACTIVATE[cfg.activation](x_btc)
            new.append(end.reshape(window.shape))
        q, k = (unit(made[part].reshape(b, t, self.key_heads, self.key_dim)) for part in "qk")
        v = made["v"].astype(jnp.float32).reshape(b, t, *self.heads, self.value_dim)
        rate, bias = (here.weight(f"delta_{name}").astype(jnp.float32) for name in ("rate_log", "step_bias"))
        decay = -jnp.exp(rate) * jax.nn.softplus(made["a"].astype(jnp.float32) + bias)
        real_bt1 = ctx.mask_bt[..., None]  # padding neither decays nor writes
        beta = jnp.where(real_bt1, jax.nn.sigmoid(made["b"].astype(jnp.float32)), 0.0).reshape(b, t, *self.heads)
        decay = jnp.where(real_bt1, decay, 0.0).reshape(b, t, *self.heads)
        given = q * self.key_dim**-0.5, k, v, decay, beta
        matrices = state.reshape(b, *self.heads, *state.shape[2:])
        if t == 1:
            q, k, v, decay, beta = (a[:, 0] for a in given)
            out, matrices = recurrent(q, k, v, decay, beta, matrices)
        else:  # bfloat16 models do not gain by products more exact than in three passes
            out, matrices = chunked(*given, matrices, "highest" if h_btd.dtype == jnp.float32 else "high")
        out = out.reshape(b, t, self.value_heads, self.value_dim)
        out = gated_norm(out, made["z"].reshape(out.shape), here.weight("delta_norm"), cfg.norm_eps)
        return Mixed(here.out("delta_o", out.reshape(b, t, -1)), State((*new, matrices.reshape(state.shape))))

    def _projected(self, here, h_btd) -> dict[str, jax.Array]:
        """Returns queries, keys, values, gates, and what makes beta and the decays, `[B, T, rows]` each."""

        def one(part: str):
            x_btc = linear(h_btd, here.factored(f"delta_{part}"))
            return constrain(here.mesh, x_btc, "batch", None, ("heads", self.rows(part)[1]))

        if not self.by_head:
            return {part: one(part) for part in "qkvzba"}
        made = {}
        for parts in ("qkvz", "ba"):
            ends = [sum(self.rows(part)[0] for part in parts[: i + 1]) // self.key_heads for i in range(len(parts) - 1)]
            x_btkc = one(parts).reshape(*h_btd.shape[:2], self.key_heads, -1)
            made |= zip(parts, jnp.split(x_btkc, ends, axis=-1), strict=True)
        return {part: x.reshape(*h_btd.shape[:2], -1) for part, x in made.items()}


def gated_norm(
    x: Float[Array, "... I"], gate: Float[Array, "... I"], scale_i: Float[Array, " I"], eps: float
) -> Float[jax.Array, "... I"]:
    """Returns the RMS norm of the last axis times `scale_i` and silu(gate); float32 inside, the dtype of the gate outside."""
    x = jnp.asarray(x, jnp.float32)
    root = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    gated = x * root * scale_i.astype(jnp.float32) * jax.nn.silu(jnp.asarray(gate, jnp.float32))
    return gated.astype(gate.dtype)


def unit(x: Float[Array, "... H"]) -> Float[jax.Array, "... H"]:
    """Returns vectors of length 1, float32; zeros stay zeros."""
    x = jnp.asarray(x, jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def inverse(lower_tt: Float[Array, "*B T T"], precision="highest") -> Float[jax.Array, "*B T T"]:
    """Returns the inverse of 1 + `lower_tt`, whose entries on and above the diagonal do not count; T is a power of two.

    Diagonal blocks are inverted, of one row first, then of 2, 4, …: two neighbours and what is below the first of them give one
    of twice the size. The sum of the powers of - `lower_tt` is the same, but its terms are huge where keys are alike, and cancel.
    """
    t, block_t = lower_tt.shape[-1], jnp.arange(lower_tt.shape[-1])
    found_tt = jnp.broadcast_to(jnp.eye(t, dtype=jnp.float32), lower_tt.shape)
    for level in range(t.bit_length() - 1):
        below_tt = (block_t[:, None] == block_t + 1) & (block_t[:, None] % 2 == 1)
        between_tt = jnp.where(below_tt, lower_tt, 0.0)
        if level:
            between_tt = jnp.matmul(found_tt, between_tt, precision=precision)
            between_tt = jnp.matmul(between_tt, found_tt, precision=precision)
        found_tt, block_t = found_tt - between_tt, block_t // 2
    return found_tt


def chunked(
    q_btkh: Float[Array, "B T K H"],
    k_btkh: Float[Array, "B T K H"],
    v_btkgi: Float[Array, "B T K G I"],
    decay_btkg: Float[Array, "B T K G"],
    beta_btkg: Float[Array, "B T K G"],
    state_bkghi: Float[Array, "B K G H I"],
    precision="highest",
) -> tuple[Float[jax.Array, "B T K G I"], Float[jax.Array, "B K G H I"]]:
    """Returns the outputs of T tokens and the matrices after them, with all tokens of a chunk at once.

    decay_btkg: logarithms of how much of a matrix is left, at most 0. state_bkghi: the matrices before. precision: of products.
    What the tokens of a chunk write depends on what the chunk's earlier ones wrote: a triangular system, which is solved for all
    chunks at once. Only the matrices go from chunk to chunk.
    """
    (b, t), width = q_btkh.shape[:2], min(CHUNK, 1 << (q_btkh.shape[1] - 1).bit_length())

    def cut(a, *axes: int):
        """Returns chunks of tokens, the last filled up with zeros, which change nothing; axes: the order of [B, chunks, T, …]."""
        a = jnp.pad(jnp.asarray(a, jnp.float32), [(0, -t % width if axis == 1 else 0) for axis in range(a.ndim)])
        return a.reshape(b, -1, width, *a.shape[2:]).transpose(axes)

    def product(form: str, *arrays):
        return jnp.einsum(form, *arrays, precision=precision)

    q, k = (cut(a, 1, 0, 3, 2, 4) for a in (q_btkh, k_btkh))  # [chunks, B, K, T, H]
    v, beta = cut(v_btkgi, 1, 0, 3, 4, 2, 5), cut(beta_btkg, 1, 0, 3, 4, 2)
    decay = cut(decay_btkg, 1, 0, 3, 4, 2)
    # Sums from one token to another, not differences of two sums from the start: those would cancel after a fast decay.
    sums = jnp.cumsum(jnp.where(jnp.tri(width, k=-1, dtype=bool), decay[..., None], 0.0), axis=-2)
    left = jnp.where(jnp.tri(width, dtype=bool), jnp.exp(sums), 0.0)
    since = jnp.exp(jnp.cumsum(decay, axis=-1))  # the start of the chunk
    reads = product("ybkth,ybksh->ybkts", q, k)[:, :, :, None] * left
    known = product("ybkth,ybksh->ybkts", k, k)[:, :, :, None] * left * beta[..., None]
    solved = inverse(known, precision) * beta[..., None, :]
    writes = product("ybkgts,ybkgsi->ybkgti", solved, v)
    recalls = product("ybkgts,ybksh->ybkgth", solved * since[..., None, :], k)

    def chunk(state, part):
        q, k, since, kept, reads, writes, recalls = part
        new = writes - product("bkgth,bkghi->bkgti", recalls, state)
        old = since[..., None] * product("bkth,bkghi->bkgti", q, state)
        out = old + product("bkgts,bkgsi->bkgti", reads, new)
        state = since[..., -1:, None] * state + product("bkth,bkgti->bkghi", k, kept[..., None] * new)
        return state, out

    state, out = jax.lax.scan(
        chunk, jnp.asarray(state_bkghi, jnp.float32), (q, k, since, left[..., -1, :], reads, writes, recalls)
    )
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(b, -1, *v_btkgi.shape[2:])[:, :t], state


def recurrent(
    q_bkh: Float[Array, "B K H"],
    k_bkh: Float[Array, "B K H"],
    v_bkgi: Float[Array, "B K G I"],
    decay_bkg: Float[Array, "B K G"],
    beta_bkg: Float[Array, "B K G"],
    state_bkghi: Float[Array, "B K G H I"],
) -> tuple[Float[jax.Array, "B K G I"], Float[jax.Array, "B K G H I"]]:
    """Returns the outputs of one token and the matrices after it; arguments as in `chunked`."""
    state = jnp.exp(decay_bkg)[..., None, None] * state_bkghi
    found = jnp.sum(k_bkh[:, :, None, :, None] * state, axis=-2)
    written = beta_bkg[..., None] * (v_bkgi - found)
    state = state + k_bkh[:, :, None, :, None] * written[..., None, :]
    return jnp.sum(q_bkh[:, :, None, :, None] * state, axis=-2), state

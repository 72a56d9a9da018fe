"""The gated delta rule (arXiv:2412.06464), by which layers of Qwen3-Next and Qwen 3.5 pass on what they have read.

Each value head keeps a matrix from keys to values. A token first lets it decay; then it reads the value that the matrix has for
its key, and writes the difference to its own value, times beta, under that key; what its query reads is its output. K counts the
heads of queries and keys, G the value heads of each; H are the entries of a key, I those of a value. All is float32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from refusal_jax.axes import Array

CHUNK = 64  # tokens that are computed at once


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
    since = jnp.cumsum(cut(decay_btkg, 1, 0, 3, 4, 2), axis=-1)  # the start of the chunk
    seen_tt = jnp.tri(width, dtype=bool)
    left = jnp.where(seen_tt, jnp.exp(jnp.where(seen_tt, since[..., :, None] - since[..., None, :], 0.0)), 0.0)
    reads = product("ybkth,ybksh->ybkts", q, k)[:, :, :, None] * left
    known = product("ybkth,ybksh->ybkts", k, k)[:, :, :, None] * left * beta[..., None]
    solved = inverse(known, precision) * beta[..., None, :]
    writes = product("ybkgts,ybkgsi->ybkgti", solved, v)
    recalls = product("ybkgts,ybksh->ybkgth", solved * jnp.exp(since)[..., None, :], k)

    def chunk(state, part):
        q, k, since, reads, writes, recalls = part
        new = writes - product("bkgth,bkghi->bkgti", recalls, state)
        old = jnp.exp(since)[..., None] * product("bkth,bkghi->bkgti", q, state)
        out = old + product("bkgts,bkgsi->bkgti", reads, new)
        kept = jnp.exp(since[..., -1:] - since)[..., None] * new
        state = jnp.exp(since[..., -1])[..., None, None] * state + product("bkth,bkgti->bkghi", k, kept)
        return state, out

    state, out = jax.lax.scan(chunk, jnp.asarray(state_bkghi, jnp.float32), (q, k, since, reads, writes, recalls))
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

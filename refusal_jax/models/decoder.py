"""The one decoder: embedding, scanned blocks, unembedding, with edits going in and taps coming out.

Axis letters: B batch, T tokens (query side), C cache slots (key side), D d_model, N heads, K key/value heads,
G queries per kv head, H head dim, F mlp, V vocab, L layers, P tapped positions, S edit sites. All weights of the
blocks are stacked on a leading L axis and kept `[out, in]` as in HF checkpoints, so loading never transposes.
Norms, softmax, rotary angles and logits are float32 whatever the weights' dtype.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from refusal_jax.edits import SITES, Edits
from refusal_jax.models.cache import Cache
from refusal_jax.models.config import ModelConfig
from refusal_jax.taps import NO_TAPS, Taps

ACTIVATE = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class Weight:
    """Shape, logical axes and initial standard deviation (None: ones; 0: zeros) of one parameter."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    std: float | None


def weight_table(cfg: ModelConfig) -> dict[str, Weight]:
    """Every parameter of the decoder by path; the only place that declares them."""
    d, f, v = cfg.d_model, cfg.d_mlp, cfg.vocab_size
    q, kv = cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
    in_d, growth = d**-0.5, (2 * cfg.n_layers) ** -0.5  # fan-in scaling; the blocks' sum keeps the residual's size
    block = {
        "attn_norm": Weight((d,), ("norm",), None),
        "q": Weight((q, d), ("heads", "embed"), in_d),
        "k": Weight((kv, d), ("kv_heads", "embed"), in_d),
        "v": Weight((kv, d), ("kv_heads", "embed"), in_d),
        "o": Weight((d, q), ("embed", "heads"), growth * q**-0.5),
        "mlp_norm": Weight((d,), ("norm",), None),
        "gate": Weight((f, d), ("mlp", "embed"), in_d),
        "up": Weight((f, d), ("mlp", "embed"), in_d),
        "down": Weight((d, f), ("embed", "mlp"), growth * f**-0.5),
    }
    if cfg.attention_bias:
        block |= {
            "q_bias": Weight((q,), ("heads",), 0),
            "k_bias": Weight((kv,), ("kv_heads",), 0),
            "v_bias": Weight((kv,), ("kv_heads",), 0),
            "o_bias": Weight((d,), ("norm",), 0),
        }
    if cfg.mlp_bias:
        block |= {
            "gate_bias": Weight((f,), ("mlp",), 0),
            "up_bias": Weight((f,), ("mlp",), 0),
            "down_bias": Weight((d,), ("norm",), 0),
        }
    table = {"embed": Weight((v, d), ("vocab", "embed"), in_d if cfg.tied_embeddings else 1.0)}
    for name, w in block.items():
        table[f"blocks.{name}"] = Weight((cfg.n_layers, *w.shape), ("layers", *w.axes), w.std)
    table["final_norm"] = Weight((d,), ("norm",), None)
    if not cfg.tied_embeddings:
        table["unembed"] = Weight((v, d), ("vocab", "embed"), in_d)
    return table


def linear(x, w_oi, bias=None):
    """`x @ w.T (+ bias)` in x's dtype; float32 inputs really are multiplied in float32 (TPUs would use bfloat16)."""
    y = jnp.einsum("...i,oi->...o", x, w_oi, precision="highest" if x.dtype == jnp.float32 else None)
    return y if bias is None else y + bias


def rms_norm(x, scale_d, eps: float):
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return scale_d * x32.astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every block sees alike: rotary tables of the tokens, and which of each other they may attend to."""

    cos_bth: jax.Array  # float32 [B, T, H]
    sin_bth: jax.Array  # float32 [B, T, H]
    allowed_btt: jax.Array  # bool [B, T, T]

    @classmethod
    def build(cls, cfg: ModelConfig, positions_bt: jax.Array, mask_bt: jax.Array) -> "Context":
        """For consecutive tokens at these positions, of which `mask_bt` marks the real ones."""
        inverse = jnp.asarray(cfg.rope.inverse_frequencies(cfg.head_dim), jnp.float32)
        angles = positions_bt[..., None].astype(jnp.float32) * inverse
        angles = jnp.concatenate([angles, angles], axis=-1)
        causal_tt = jnp.tril(jnp.ones((mask_bt.shape[1],) * 2, bool))
        return cls(jnp.cos(angles), jnp.sin(angles), causal_tt & mask_bt[:, None, :])

    @classmethod
    def of_prompt(cls, cfg: ModelConfig, mask_bt: jax.Array) -> "Context":
        """For whole, left-padded prompts."""
        return cls.build(cfg, jnp.maximum(jnp.cumsum(mask_bt, axis=1) - 1, 0), mask_bt)

    def rotate(self, x_btnh):
        """Rotary embedding, halves convention; float32 inside."""
        x = x_btnh.astype(jnp.float32)
        half = x.shape[-1] // 2
        turned = jnp.concatenate([-x[..., half:], x[..., :half]], axis=-1)
        return (x * self.cos_bth[:, :, None] + turned * self.sin_bth[:, :, None]).astype(x_btnh.dtype)


def attend(q_btnh, segments):
    """Grouped-query attention over one or more segments of keys and values, softmax in float32.

    segments: tuples (k `[B, K, C, H]`, v `[B, K, C, H]`, allowed bool `[B, T, C]`); scores of all segments share one
    softmax. Cached and new keys stay separate arrays: to attend, a decode step need not copy the cache.
    Returns `[B, T, N * H]`.
    """
    b, t, n, h = q_btnh.shape
    kv_heads = segments[0][0].shape[1]
    precision = "highest" if q_btnh.dtype == jnp.float32 else None
    q_bkgth = q_btnh.reshape(b, t, kv_heads, n // kv_heads, h).transpose(0, 2, 3, 1, 4)

    def score(k_bkch, allowed_btc):
        scores = (
            jnp.einsum("bkgth,bkch->bkgtc", q_bkgth, k_bkch, precision=precision, preferred_element_type=jnp.float32)
            * h**-0.5
        )
        # A finite floor: a padding query attends to nothing, and softmax over all -inf would be NaN.
        return jnp.where(allowed_btc[:, None, None], scores, jnp.finfo(jnp.float32).min)

    scores = jnp.concatenate([score(k, allowed) for k, _, allowed in segments], axis=-1)
    probs = jax.nn.softmax(scores, axis=-1).astype(q_btnh.dtype)
    out, start = 0, 0
    for k, v, _ in segments:
        stop = start + k.shape[2]
        out += jnp.einsum("bkgtc,bkch->bkgth", probs[..., start:stop], v, precision=precision)
        start = stop
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, n * h)


def unstacked(tree, n_layers: int) -> list:
    """A pytree with a leading L axis as a list of L pytrees; the slices are made here and not later."""
    return jax.lax.optimization_barrier(
        [jax.tree.map(lambda a, layer=layer: a[layer], tree) for layer in range(n_layers)]
    )


class Block(nnx.Module):
    """One layer, or all of them stacked on a leading L axis (then `jax.lax.scan` slices it)."""

    def __init__(self, cfg: ModelConfig, weights: dict[str, jax.Array]):
        self.cfg = cfg
        for name, value in weights.items():
            setattr(self, name, nnx.Param(value))

    def weight(self, name: str):
        """The array of a parameter, or None where the architecture has none of that name."""
        param = getattr(self, name, None)
        return None if param is None else param[...]

    def __call__(self, x_btd, ctx: Context, edits: Edits, gate_rs, add_r, taps: Taps, past=()):
        """Returns the block's output, its taps, and the keys and values of its tokens, each `[B, K, T, H]`.

        gate_rs, add_r: this layer's gates of `edits`. past: earlier segments of keys and values, see `attend`.
        """
        cfg, w = self.cfg, self.weight
        b, t, _ = x_btd.shape
        site = {name: gate_rs[:, i] for i, name in enumerate(SITES)}
        resid_pre = edits.added(edits.ablated(x_btd, site["resid_pre"]), add_r)

        h = rms_norm(resid_pre, w("attn_norm"), cfg.norm_eps)
        q = linear(h, w("q"), w("q_bias")).reshape(b, t, cfg.n_heads, cfg.head_dim)
        k = linear(h, w("k"), w("k_bias")).reshape(b, t, cfg.n_kv_heads, cfg.head_dim)
        v = linear(h, w("v"), w("v_bias")).reshape(b, t, cfg.n_kv_heads, cfg.head_dim)
        new = ctx.rotate(k).swapaxes(1, 2), v.swapaxes(1, 2)
        heads = attend(ctx.rotate(q), (*past, (*new, ctx.allowed_btt)))
        attn_out = edits.ablated(linear(heads, w("o"), w("o_bias")), site["attn_out"])
        resid_mid = resid_pre + attn_out

        h = rms_norm(resid_mid, w("mlp_norm"), cfg.norm_eps)
        gated = ACTIVATE[cfg.activation](linear(h, w("gate"), w("gate_bias"))) * linear(h, w("up"), w("up_bias"))
        mlp_out = edits.ablated(linear(gated, w("down"), w("down_bias")), site["mlp_out"])
        resid_post = resid_mid + mlp_out
        return (
            resid_post,
            taps.read(
                resid_pre=resid_pre, attn_out=attn_out, resid_mid=resid_mid, mlp_out=mlp_out, resid_post=resid_post
            ),
            new,
        )


class Decoder(nnx.Module):
    """A decoder-only transformer over a `ModelConfig`; parameters as in `weight_table`."""

    def __init__(self, cfg: ModelConfig, weights: dict[str, jax.Array]):
        self.cfg = cfg
        self.embed = nnx.Param(weights["embed"])
        prefix = "blocks."
        self.blocks = Block(cfg, {p.removeprefix(prefix): a for p, a in weights.items() if p.startswith(prefix)})
        self.final_norm = nnx.Param(weights["final_norm"])
        if not cfg.tied_embeddings:
            self.unembed = nnx.Param(weights["unembed"])

    @classmethod
    def init(cls, cfg: ModelConfig, key: jax.Array, dtype=jnp.float32) -> "Decoder":
        """Random weights, for training and tests."""
        table = weight_table(cfg)
        keys = jax.random.split(key, len(table))

        def make(w, k):
            return jnp.ones(w.shape, dtype) if w.std is None else w.std * jax.random.normal(k, w.shape, dtype)

        return cls(cfg, {path: make(w, k) for (path, w), k in zip(table.items(), keys, strict=True)})

    def weights(self) -> dict[str, jax.Array]:
        """Every parameter by path: the inverse of the constructor."""
        return {
            path: (
                self.blocks.weight(path.removeprefix("blocks."))
                if path.startswith("blocks.")
                else getattr(self, path)[...]
            )
            for path in weight_table(self.cfg)
        }

    @property
    def dtype(self):
        return self.embed[...].dtype

    def embed_tokens(self, tokens_bt):
        return jnp.take(self.embed[...], tokens_bt, axis=0)

    def logits(self, x_btd):
        """Final norm and unembedding, float32 `[B, T, V]`."""
        table = self.embed if self.cfg.tied_embeddings else self.unembed
        x = rms_norm(x_btd, self.final_norm[...], self.cfg.norm_eps)
        precision = "highest" if x.dtype == jnp.float32 else None
        return jnp.einsum("btd,vd->btv", x, table[...], precision=precision, preferred_element_type=jnp.float32)

    def layers(self, edits: Edits):
        """What the blocks are run over: stacked weights, and the layers' gates of `edits`; leading axis L."""
        return self.blocks, *edits.layer_gates(self.cfg.n_layers)

    def run(self, x_btd, ctx: Context, edits: Edits, taps: Taps = NO_TAPS, cache: Cache | None = None, layers=None):
        """All blocks, over whole prompts or, with a cache, over the tokens that follow it.

        layers: `self.layers(edits)`, or that `unstacked`, which the cache must then be too. Returns the last block's
        output, taps `{site: [L, B, P, D]}`, and the tokens' keys and values, a pair of `[L, B, K, T, H]` or a list of
        pairs of `[B, K, T, H]` (dead code, and gone after compilation, where the caller drops them).
        """

        def body(x, layer):
            (block, gate_rs, add_r), past = layer
            segments = () if cache is None else ((*past, cache.mask_bc[:, None]),)
            x, tapped, new = block(x, ctx, edits, gate_rs, add_r, taps, segments)
            return x, (tapped, new)

        layers = self.layers(edits) if layers is None else layers
        past = None if cache is None else cache.kv
        if not isinstance(layers, list):
            x, (tapped, new) = jax.lax.scan(body, x_btd, (layers, past))
            return x, tapped, new
        x, tapped, new = x_btd, [], []
        for layer in zip(layers, past or [None] * len(layers), strict=True):
            x, (tapped_here, new_here) = body(x, layer)
            tapped.append(tapped_here)
            new.append(new_here)
        return x, jax.tree.map(lambda *a: jnp.stack(a), *tapped), new

    def run_layers(self, x_btd, ctx: Context, edits: Edits, start, stop):
        """Blocks `start` to `stop - 1`, traced bounds: one compiled program for any range. Returns the residual."""
        layers = self.layers(edits)

        def body(index, x):
            block, gate_rs, add_r = jax.tree.map(
                lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), layers
            )
            return block(x, ctx, edits, gate_rs, add_r, NO_TAPS)[0]

        return jax.lax.fori_loop(start, stop, body, x_btd)

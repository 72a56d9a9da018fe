"""Attention with keys and values of its own heads: of all families that are not hybrids, and of layers of those that are."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float

from refusal_jax.models.attention import Context, Segment, attend, attend_where_kept
from refusal_jax.models.cache import Tokens, placed
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.head_taps import Heads
from refusal_jax.models.layers import divided_by_root, linear
from refusal_jax.models.mixers.mixer import Mixed
from refusal_jax.models.weight import Weight, growth


@dataclasses.dataclass(frozen=True)
class Attention:
    """Grouped-query attention. Sizes that are None are the config's.

    gated: whether each head's output is multiplied with a sigmoid, whose rows follow those of its queries in one matrix. prefix:
    what the names of its weights begin with. reads: as in `Mixer`; such a layer has queries only. keys_as_values: values are what
    keys are before their norm and rope, and have no weights.
    """

    n_heads: int | None = None
    n_kv_heads: int | None = None
    head_dim: int | None = None
    gated: bool = False
    prefix: str = ""
    reads: int | None = None
    keys_as_values: bool = False
    has_heads = True

    def sizes(self, cfg: ModelConfig) -> tuple[int, int, int]:
        """Returns the number of heads, that of key/value heads, and the width of a head."""
        return self.n_heads or cfg.n_heads, self.n_kv_heads or cfg.n_kv_heads, self.head_dim or cfg.head_dim

    def weights(self, cfg: ModelConfig) -> dict[str, Weight]:
        """Returns each weight of one layer by its name."""
        heads, kv_heads, width = self.sizes(cfg)
        d, q, kv = cfg.d_model, heads * width, kv_heads * width
        queries, keys, made = (kv_heads, heads // kv_heads), (kv_heads, 1), q * (1 + self.gated)
        block = {
            "q": Weight((made, d), ("heads", "embed"), d**-0.5, queries),
            "k": Weight((kv, d), ("kv_heads", "embed"), d**-0.5, keys),
            "v": Weight((kv, d), ("kv_heads", "embed"), d**-0.5, keys),
            "o": Weight((d, q), ("embed", "heads"), growth(cfg) * q**-0.5, queries),
        }
        if cfg.qkv_bias:
            block |= {
                "q_bias": Weight((made,), ("heads",), 0.0, queries),
                "k_bias": Weight((kv,), ("kv_heads",), 0.0, keys),
                "v_bias": Weight((kv,), ("kv_heads",), 0.0, keys),
            }
        if cfg.o_bias:
            block["o_bias"] = Weight((d,), ("norm",), 0.0)
        if cfg.sinks:
            block["sinks"] = Weight((heads,), ("heads",), 0.0, queries)
        if cfg.qk_norm == "each":
            block["q_norm"] = Weight((heads, width), ("heads", "norm"), None, queries)
            block["k_norm"] = Weight((kv_heads, width), ("kv_heads", "norm"), None, keys)
        elif cfg.qk_norm:
            shared = cfg.qk_norm == "head"
            block["q_norm"] = Weight((width if shared else q,), ("norm",), None)
            block["k_norm"] = Weight((width if shared else kv,), ("norm",), None)
        others = "v" * self.keys_as_values if self.reads is None else "kv"  # first letters of what there is none of
        own = {name: w for name, w in block.items() if name[0] not in others}
        return {f"{self.prefix}{name}": weight for name, weight in own.items()}

    def memory(self, cfg: ModelConfig, rows: int, tokens: int, dtype) -> Tokens:
        """Returns room for keys and values, zeros."""
        _, kv_heads, width = self.sizes(cfg)
        side = jnp.zeros((rows, kv_heads, tokens, width), dtype)
        return Tokens((side, side))

    def values(self, here, kept: Tokens) -> Float[jax.Array, "B K T H"]:
        """Returns the values of tokens of which `kept` is the memory."""
        return kept.parts[1]

    def value_parts(
        self, here, read_bpwd: Float[jax.Array, "B P W D"]
    ) -> tuple[Float[jax.Array, "B P W F"], Float[jax.Array, "B P F"]]:
        """Returns which values the parts of an input make that sum to it, of all key/value heads side by side, and what these
        have besides; float32. No part of its input changes a value that is clipped."""
        cfg, bias = here.cfg, here.weight(f"{self.prefix}v_bias")
        values_bpwf = linear(read_bpwd, here.weight(f"{self.prefix}v").astype(jnp.float32))
        constant_bpf = jnp.zeros_like(values_bpwf[:, :, 0]) if bias is None else bias.astype(jnp.float32)
        if cfg.qkv_clip is not None:
            whole_bpf = values_bpwf.sum(axis=2) + constant_bpf
            within_bpf = jnp.abs(whole_bpf) < cfg.qkv_clip
            values_bpwf = jnp.where(within_bpf[:, :, None], values_bpwf, 0.0)
            constant_bpf = jnp.where(within_bpf, constant_bpf, jnp.clip(whole_bpf, -cfg.qkv_clip, cfg.qkv_clip))
        return values_bpwf, jnp.broadcast_to(constant_bpf, values_bpwf[:, :, 0].shape)

    def mix(self, here, h_btd: Float[jax.Array, "B T D"], ctx: Context, past: Tokens | None) -> Mixed:
        """Returns attention on the input, as `Mixer.mix` does; its memory is the tokens' keys and values."""
        cfg, view = here.cfg, ctx.view(here.layer.kind, here.kinds)
        n_heads, n_kv_heads, _ = self.sizes(cfg)
        alone = past is not None and h_btd.shape[1] == 1

        def heads(name: str, count: int):
            # Without the barrier, the order of axes that attention likes makes a TPU copy the weights first.
            full = f"{self.prefix}{name}"
            x = jax.lax.optimization_barrier(linear(h_btd, here.factored(full), here.weight(f"{full}_bias")))
            x = here.norm(f"{full}_norm", x) if cfg.qk_norm == "all" else x
            x = x if cfg.qkv_clip is None else jnp.clip(x, -cfg.qkv_clip, cfg.qkv_clip)
            return x.reshape(*x.shape[:2], count, -1)

        def turned(name: str, x):
            """Returns queries or keys with their norm and rope."""
            norm = f"{self.prefix}{name}_norm"
            if cfg.norm_after_rope:
                return here.norm(norm, view.rotate(x))
            return view.rotate(here.norm(norm, x) if cfg.qk_norm in ("head", "each") else x)

        if self.reads is None:
            k = heads("k", n_kv_heads)
            v = k if self.keys_as_values else heads("v", n_kv_heads)
            k, v = turned("k", k), divided_by_root(cfg, v) if cfg.value_norm else v
            new = placed(here.mesh, Tokens((k.swapaxes(1, 2), v.swapaxes(1, 2))), layers=False)
            new = placed(here.mesh, new, layers=False, decoding=True) if alone else new
        else:
            new = here.shared
        k, v = new.parts
        segments: list[Segment] = [(k, v, view.allowed_btt)]
        if past is not None and view.allowed_btc is not None:
            old_k, old_v = past.parts
            segments.insert(0, (old_k, old_v, view.allowed_btc))
        q, gate_btf = heads("q", n_heads), None
        if self.gated:
            q, gate = jnp.split(q, 2, axis=-1)
            gate_btf = jax.nn.sigmoid(gate.astype(jnp.float32)).astype(gate.dtype).reshape(*h_btd.shape[:2], -1)
        q = view.scaled(turned("q", q))
        sinks, o = here.weight(f"{self.prefix}sinks"), f"{self.prefix}o"
        settings = q, segments, sinks, cfg.query_scale, cfg.attention_softcap
        z = attend(*settings) if past is None else attend_where_kept(here.mesh, *settings)
        z = z if gate_btf is None else z * gate_btf
        projection = here.out(o, z), here.weight(o), here.weight(f"{o}_bias")
        found = Heads(q, segments, sinks, z, *projection, here.post_norm_d, gate_btf, widest(cfg))
        return Mixed(found.out_btd, None if self.reads is not None else new, found)


def widest(cfg: ModelConfig) -> int:
    """Returns the width of the widest heads among the layers' kinds of attention; 0 where all are of one kind."""
    return max((mixer.sizes(cfg)[2] for mixer in cfg.mixers if isinstance(mixer, Attention)), default=0)

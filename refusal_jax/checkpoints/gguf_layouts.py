"""Names and layouts of the tensors of GGUF's architectures: which decoder weights a stored tensor holds, and in which order."""

import dataclasses
from collections.abc import Collection, Mapping

import numpy as np
from jaxtyping import Int64

from refusal_jax.models.config import ModelConfig
from refusal_jax.models.mixers.delta import DeltaRule
from refusal_jax.models.mixers.state_space import CONVOLVED, PARTS

PERMUTED = ("blocks.q", "blocks.k", "blocks.q_bias", "blocks.k_bias")
# GGUF name, `{l}` being the layer and `{e}` the expert -> the decoder paths whose rows it holds, one after the other. Of several
# names for a path the first that the file has counts. Where experts are stacked, each has the rows of all these paths.
NAMES: dict[str, tuple[str, ...]] = {
    "token_embd.weight": ("embed",),
    "output_norm.weight": ("final_norm",),
    "output.weight": ("unembed",),
    "blk.{l}.attn_norm.weight": ("blocks.attn_norm",),
    "blk.{l}.post_attention_norm.weight": ("blocks.attn_post_norm",),
    "blk.{l}.ffn_norm.weight": ("blocks.mlp_norm",),
    "blk.{l}.post_ffw_norm.weight": ("blocks.mlp_post_norm",),
    "blk.{l}.attn_q_norm.weight": ("blocks.q_norm",),
    "blk.{l}.attn_k_norm.weight": ("blocks.k_norm",),
    "blk.{l}.attn_q.weight": ("blocks.q",),
    "blk.{l}.attn_k.weight": ("blocks.k",),
    "blk.{l}.attn_v.weight": ("blocks.v",),
    "blk.{l}.attn_qkv.weight": ("blocks.q", "blocks.k", "blocks.v"),
    "blk.{l}.attn_q.bias": ("blocks.q_bias",),
    "blk.{l}.attn_k.bias": ("blocks.k_bias",),
    "blk.{l}.attn_v.bias": ("blocks.v_bias",),
    "blk.{l}.attn_qkv.bias": ("blocks.q_bias", "blocks.k_bias", "blocks.v_bias"),
    "blk.{l}.attn_output.weight": ("blocks.o",),
    "blk.{l}.attn_output.bias": ("blocks.o_bias",),
    "blk.{l}.ffn_gate.weight": ("blocks.gate",),
    "blk.{l}.ffn_up.weight": ("blocks.up",),
    "blk.{l}.ffn_down.weight": ("blocks.down",),
    "blk.{l}.ffn_gate.bias": ("blocks.gate_bias",),
    "blk.{l}.ffn_up.bias": ("blocks.up_bias",),
    "blk.{l}.ffn_down.bias": ("blocks.down_bias",),
}
FUSED_MLP = {"blk.{l}.ffn_up.weight": ("blocks.gate", "blocks.up")}  # of Phi-3
EXPERTS = {
    "blk.{l}.ffn_gate_inp.weight": ("blocks.router",),
    "blk.{l}.ffn_gate_exps.weight": ("blocks.gate",),
    "blk.{l}.ffn_up_exps.weight": ("blocks.up",),
    "blk.{l}.ffn_gate_up_exps.weight": ("blocks.gate", "blocks.up"),
    "blk.{l}.ffn_down_exps.weight": ("blocks.down",),
    "blk.{l}.ffn_gate.{e}.weight": ("blocks.gate",),  # of the first files of Mixtral
    "blk.{l}.ffn_up.{e}.weight": ("blocks.up",),
    "blk.{l}.ffn_down.{e}.weight": ("blocks.down",),
}
LFM2 = {
    "token_embd_norm.weight": ("final_norm",),  # which llama.cpp calls so in this architecture
    "blk.{l}.shortconv.conv.weight": ("blocks.conv_taps",),
    "blk.{l}.shortconv.in_proj.weight": ("blocks.conv_enter", "blocks.conv_leave", "blocks.conv_x"),
    "blk.{l}.shortconv.out_proj.weight": ("blocks.conv_o",),
}
LFM2_MOE = LFM2 | {
    **{f"blk.{{l}}.ffn_{part}.weight": (f"blocks.dense_{part}",) for part in ("gate", "up", "down")},
    "blk.{l}.exp_probs_b.bias": ("blocks.router_correction",),
}
SHARED = {f"blk.{{l}}.ffn_{part}_shexp.weight": (f"blocks.shared_{part}",) for part in ("gate", "up", "down")}
MAMBA = {
    "blk.{l}.ssm_in.weight": tuple(f"blocks.ssm_{part}" for part in PARTS),
    "blk.{l}.ssm_conv1d.weight": tuple(f"blocks.ssm_conv_{part}" for part in CONVOLVED),
    "blk.{l}.ssm_conv1d.bias": tuple(f"blocks.ssm_conv_{part}_bias" for part in CONVOLVED),
    "blk.{l}.ssm_dt.bias": ("blocks.ssm_step_bias",),
    "blk.{l}.ssm_a": ("blocks.ssm_rate_log",),
    "blk.{l}.ssm_d": ("blocks.ssm_skip",),
    "blk.{l}.ssm_norm.weight": ("blocks.ssm_norm",),
    "blk.{l}.ssm_out.weight": ("blocks.ssm_o",),
}
FALCON_H1 = MAMBA | {"blk.{l}.ffn_norm": ("blocks.mlp_norm",)}  # without an ending, as its converter calls it
GRANITE_HYBRID = MAMBA | SHARED
GRANITE_HYBRID |= {f"blk.{{l}}.ffn_{part}.weight": (f"blocks.dense_{part}",) for part in ("gate", "up", "down")}
DELTA = {
    "blk.{l}.post_attention_norm.weight": ("blocks.mlp_norm",),
    "blk.{l}.attn_qkv.weight": ("blocks.delta_q", "blocks.delta_k", "blocks.delta_v"),
    "blk.{l}.attn_gate.weight": ("blocks.delta_z",),
    "blk.{l}.ssm_beta.weight": ("blocks.delta_b",),
    "blk.{l}.ssm_alpha.weight": ("blocks.delta_a",),
    "blk.{l}.ssm_conv1d.weight": ("blocks.delta_q_conv", "blocks.delta_k_conv", "blocks.delta_v_conv"),
    "blk.{l}.ssm_dt.bias": ("blocks.delta_step_bias",),
    "blk.{l}.ssm_a": ("blocks.delta_rate_log",),
    "blk.{l}.ssm_norm.weight": ("blocks.delta_norm",),
    "blk.{l}.ssm_out.weight": ("blocks.delta_o",),
}
DELTA_MOE = DELTA | SHARED | {"blk.{l}.ffn_gate_inp_shexp.weight": ("blocks.shared_router",)}
QWEN3_NEXT = DELTA_MOE | {"blk.{l}.ssm_ba.weight": ("blocks.delta_b", "blocks.delta_a")}
QWEN3_NEXT = {name: paths for name, paths in QWEN3_NEXT.items() if "ssm_beta" not in name and "ssm_alpha" not in name}
LLAMA4 = SHARED | {f"blk.{{l}}.ffn_{part}.weight": (f"blocks.dense_{part}",) for part in ("gate", "up", "down")}
LATENT = LLAMA4 | {
    "blk.{l}.exp_probs_b.bias": ("blocks.router_correction",),
    "blk.{l}.attn_q.weight": ("blocks.latent_q",),
    "blk.{l}.attn_q_a.weight": ("blocks.latent_q_down",),
    "blk.{l}.attn_q_a_norm.weight": ("blocks.latent_q_norm",),
    "blk.{l}.attn_q_b.weight": ("blocks.latent_q_up",),
    "blk.{l}.attn_kv_a_mqa.weight": ("blocks.latent_kv_down",),
    "blk.{l}.attn_kv_a_norm.weight": ("blocks.latent_kv_norm",),
    "blk.{l}.attn_kv_b.weight": ("blocks.latent_kv_up",),
}
GEMMA4 = {
    **{f"blk.{{l}}.ffn_{part}.weight": (f"blocks.{part}",) for part in ("gate", "up", "down")},
    "blk.{l}.ffn_gate_exps.weight": ("blocks.expert_gate",),
    "blk.{l}.ffn_up_exps.weight": ("blocks.expert_up",),
    "blk.{l}.ffn_gate_up_exps.weight": ("blocks.expert_gate", "blocks.expert_up"),
    "blk.{l}.ffn_down_exps.weight": ("blocks.expert_down",),
    "blk.{l}.ffn_down_exps.scale": ("blocks.expert_scale",),
    "blk.{l}.ffn_gate_inp.scale": ("blocks.router_scale",),
    "blk.{l}.pre_ffw_norm_2.weight": ("blocks.expert_norm",),
    "blk.{l}.post_ffw_norm_1.weight": ("blocks.beside_post_norm",),
    "blk.{l}.post_ffw_norm_2.weight": ("blocks.expert_post_norm",),
    "blk.{l}.layer_output_scale.weight": ("blocks.layer_scale",),
    "blk.{l}.inp_gate.weight": ("blocks.per_layer_gate",),
    "blk.{l}.proj.weight": ("blocks.per_layer_out",),
    "blk.{l}.post_norm.weight": ("blocks.per_layer_post_norm",),
    "per_layer_token_embd.weight": ("per_layer_embed",),
    "per_layer_model_proj.weight": ("per_layer_projection",),
    "per_layer_proj_norm.weight": ("per_layer_norm",),
}
NEMOTRON_H = MAMBA | {
    "blk.{l}.attn_norm.weight": ("blocks.norm",),  # before a layer's only part, whatever that is
    **{f"blk.{{l}}.ffn_{part}.weight": (f"blocks.dense_{part}",) for part in ("up", "down")},
    **{f"blk.{{l}}.ffn_{part}.bias": (f"blocks.dense_{part}_bias",) for part in ("up", "down")},
    **{f"blk.{{l}}.ffn_{part}_shexp.weight": (f"blocks.shared_{part}",) for part in ("up", "down")},
    "blk.{l}.exp_probs_b.bias": ("blocks.router_correction",),
    "blk.{l}.ffn_latent_down.weight": ("blocks.experts_in",),
    "blk.{l}.ffn_latent_up.weight": ("blocks.experts_out",),
}
BY_HEAD = ("attn_k_b", "attn_v_b")  # what newer files have instead of attn_kv_b: of each head, the first transposed
RATES = ("blocks.ssm_rate_log", "blocks.delta_rate_log")  # stored as - exp of themselves
PLAIN_NORMS = ("blocks.delta_norm",)  # to which nothing was added where 1 was added to the others
GPT_OSS = {
    "blk.{l}.attn_sinks.weight": ("blocks.sinks",),
    "blk.{l}.post_attention_norm.weight": ("blocks.mlp_norm",),
    "blk.{l}.ffn_gate_inp.bias": ("blocks.router_bias",),
    "blk.{l}.ffn_gate_exps.bias": ("blocks.gate_bias",),
    "blk.{l}.ffn_up_exps.bias": ("blocks.up_bias",),
    "blk.{l}.ffn_down_exps.bias": ("blocks.down_bias",),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an architecture lays its tensors out, where architectures differ.

    permuted: whether the rows of queries and keys are in llama.cpp's order. norm_offset: what was added to norms. tiled: whether
    the value heads of a delta rule are in turns of all key heads, instead of beside each other. by_key_head: whether the betas
    and steps of a key head stand together in `ssm_ba`. prefixes: of names in the decoder that GGUF calls as those without. own:
    names of tensors that this architecture has or uses otherwise.
    """

    permuted: bool = False
    norm_offset: float = 0.0
    tiled: bool = False
    by_key_head: bool = False
    prefixes: tuple[str, ...] = ()
    own: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def names(self, cfg: ModelConfig) -> dict[str, tuple[str, ...]]:
        """Returns the decoder paths that each GGUF name holds."""
        experts = ("gate", "up", "down") if cfg.n_experts else ()
        dense = {n: paths for n, paths in NAMES.items() if paths[0].removeprefix("blocks.") not in experts}
        return dense | (EXPERTS if cfg.n_experts else {}) | dict(self.own)

    def places(
        self, names: Mapping[str, tuple[str, ...]], weights: Collection[str], path: str
    ) -> list[tuple[str, tuple[str, ...]]]:
        """Returns which of the GGUF names may hold a weight, each with all weights that it holds then."""
        prefix = next((p for p in self.prefixes if path.startswith(f"blocks.{p}")), "")
        plain = path.replace(prefix, "", 1)
        called = {
            name: tuple(p.replace("blocks.", f"blocks.{prefix}") for p in held)
            for name, held in names.items()
            if plain in held
        }
        return [(name, held) for name, held in called.items() if all(p in weights for p in held)]

    def order(self, cfg: ModelConfig, path: str) -> Int64[np.ndarray, " n"] | None:
        """Returns where the rows of a weight are among its stored rows (of `delta_o`, its columns), None where they are in order;
        of `ssm_ba`, among all of its rows."""
        rule = next((mixer for mixer in cfg.mixers if isinstance(mixer, DeltaRule)), None)
        if rule is None or not path.startswith("blocks.delta_"):
            return None
        keys, each = rule.heads
        part = path.removeprefix("blocks.delta_")
        heads = np.arange(rule.value_heads)
        if self.by_key_head and part in ("b", "a"):
            return heads // each * 2 * each + heads % each + each * (part == "a")
        if not self.tiled or part not in ("v", "v_conv", "z", "b", "a", "rate_log", "step_bias", "o"):
            return None
        size = 1 if part in ("b", "a", "rate_log", "step_bias") else rule.value_dim
        tiles = heads % each * keys + heads // each
        return (tiles[:, None] * size + np.arange(size)).ravel()

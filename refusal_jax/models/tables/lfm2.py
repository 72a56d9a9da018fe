"""HF tensor names of LFM2, without experts and with."""

from refusal_jax.models.tables.dense import LLAMA

MLP, CONV, ATTENTION = (f"model.layers.{{l}}.{part}" for part in ("feed_forward", "conv", "self_attn"))
LFM2 = LLAMA | {
    "blocks.attn_norm": "model.layers.{l}.operator_norm.weight",
    "blocks.mlp_norm": "model.layers.{l}.ffn_norm.weight",
    "blocks.o": f"{ATTENTION}.out_proj.weight",
    "blocks.q_norm": f"{ATTENTION}.q_layernorm.weight",
    "blocks.k_norm": f"{ATTENTION}.k_layernorm.weight",
    **{f"blocks.conv_{part}": f"{CONV}.in_proj.weight" for part in ("enter", "leave", "x")},
    **{f"blocks.conv_{part}_bias": f"{CONV}.in_proj.bias" for part in ("enter", "leave", "x")},
    "blocks.conv_taps": f"{CONV}.conv.weight",
    "blocks.conv_taps_bias": f"{CONV}.conv.bias",
    "blocks.conv_o": f"{CONV}.out_proj.weight",
    "blocks.conv_o_bias": f"{CONV}.out_proj.bias",
    "blocks.gate": f"{MLP}.w1.weight",
    "blocks.up": f"{MLP}.w3.weight",
    "blocks.down": f"{MLP}.w2.weight",
    "final_norm": "model.embedding_norm.weight",
}
LFM2_MOE = LFM2 | {
    **{f"blocks.dense_{part}": LFM2[f"blocks.{part}"] for part in ("gate", "up", "down")},
    "blocks.gate": f"{MLP}.experts.{{e}}.w1.weight",
    "blocks.up": f"{MLP}.experts.{{e}}.w3.weight",
    "blocks.down": f"{MLP}.experts.{{e}}.w2.weight",
    "blocks.router": f"{MLP}.gate.weight",
    "blocks.router_correction": f"{MLP}.expert_bias",
}
TABLES = {"lfm2": LFM2, "lfm2_moe": LFM2_MOE}

"""HF tensor names of mixtures of experts."""

from refusal_jax.models.tables.dense import LLAMA

MIXTRAL = LLAMA | {
    "blocks.router": "model.layers.{l}.block_sparse_moe.gate.weight",
    "blocks.gate": "model.layers.{l}.block_sparse_moe.experts.{e}.w1.weight",
    "blocks.up": "model.layers.{l}.block_sparse_moe.experts.{e}.w3.weight",
    "blocks.down": "model.layers.{l}.block_sparse_moe.experts.{e}.w2.weight",
}
DENSE = {
    f"blocks.dense_{part}": LLAMA[f"blocks.{part}"] for part in ("gate", "up", "down")
}  # among layers with experts
QWEN3_MOE = (
    LLAMA
    | DENSE
    | {
        "blocks.router": "model.layers.{l}.mlp.gate.weight",
        "blocks.gate": "model.layers.{l}.mlp.experts.{e}.gate_proj.weight",
        "blocks.up": "model.layers.{l}.mlp.experts.{e}.up_proj.weight",
        "blocks.down": "model.layers.{l}.mlp.experts.{e}.down_proj.weight",
    }
)
QWEN2_MOE = QWEN3_MOE | {
    "blocks.shared_router": "model.layers.{l}.mlp.shared_expert_gate.weight",
    "blocks.shared_gate": "model.layers.{l}.mlp.shared_expert.gate_proj.weight",
    "blocks.shared_up": "model.layers.{l}.mlp.shared_expert.up_proj.weight",
    "blocks.shared_down": "model.layers.{l}.mlp.shared_expert.down_proj.weight",
}
GLM4_MOE = QWEN3_MOE | {
    "blocks.router_correction": "model.layers.{l}.mlp.gate.e_score_correction_bias",
    "blocks.shared_gate": "model.layers.{l}.mlp.shared_experts.gate_proj.weight",
    "blocks.shared_up": "model.layers.{l}.mlp.shared_experts.up_proj.weight",
    "blocks.shared_down": "model.layers.{l}.mlp.shared_experts.down_proj.weight",
}
GRANITE_MOE = LLAMA | {
    "blocks.router": "model.layers.{l}.block_sparse_moe.router.layer.weight",
    **{f"blocks.{part}": "model.layers.{l}.block_sparse_moe.input_linear.weight" for part in ("gate", "up")},
    "blocks.down": "model.layers.{l}.block_sparse_moe.output_linear.weight",
    **{f"blocks.shared_{part}": "model.layers.{l}.shared_mlp.input_linear.weight" for part in ("gate", "up")},
    "blocks.shared_down": "model.layers.{l}.shared_mlp.output_linear.weight",
}
MINIMAX_M2 = MIXTRAL | {"blocks.router_correction": "model.layers.{l}.block_sparse_moe.e_score_correction_bias"}
GPT_OSS = LLAMA | {
    "blocks.sinks": "model.layers.{l}.self_attn.sinks",
    "blocks.router": "model.layers.{l}.mlp.router.weight",
    "blocks.router_bias": "model.layers.{l}.mlp.router.bias",
    **{f"blocks.{part}": "model.layers.{l}.mlp.experts.gate_up_proj" for part in ("gate", "up")},
    **{f"blocks.{part}_bias": "model.layers.{l}.mlp.experts.gate_up_proj_bias" for part in ("gate", "up")},
    "blocks.down": "model.layers.{l}.mlp.experts.down_proj",
    "blocks.down_bias": "model.layers.{l}.mlp.experts.down_proj_bias",
}
TABLES = {
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
    "olmoe": QWEN3_MOE,
    "qwen2_moe": QWEN2_MOE,
    "glm4_moe": GLM4_MOE,
    "granitemoe": GRANITE_MOE,
    "granitemoeshared": GRANITE_MOE,
    "minimax_m2": MINIMAX_M2,
    "gpt_oss": GPT_OSS,
}
# Decoder paths, by family, whose tensors are laid out otherwise: as `[in, out]`, and with the rows of the paths that share a name
# taking turns (all of the first rows, then all of the second, …).
TRANSPOSED = {"gpt_oss": {"blocks.gate", "blocks.up", "blocks.down"}}
ALTERNATING = {"gpt_oss": {"blocks.gate", "blocks.up", "blocks.gate_bias", "blocks.up_bias"}}

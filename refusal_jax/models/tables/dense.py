"""HF tensor names of models without experts.

A table maps decoder paths to HF names, `{l}` being the layer and `{e}` the expert; families.py says how they are read.
"""

import re

LLAMA = {
    "embed": "model.embed_tokens.weight",
    "blocks.attn_norm": "model.layers.{l}.input_layernorm.weight",
    "blocks.q": "model.layers.{l}.self_attn.q_proj.weight",
    "blocks.k": "model.layers.{l}.self_attn.k_proj.weight",
    "blocks.v": "model.layers.{l}.self_attn.v_proj.weight",
    "blocks.o": "model.layers.{l}.self_attn.o_proj.weight",
    "blocks.q_bias": "model.layers.{l}.self_attn.q_proj.bias",
    "blocks.k_bias": "model.layers.{l}.self_attn.k_proj.bias",
    "blocks.v_bias": "model.layers.{l}.self_attn.v_proj.bias",
    "blocks.o_bias": "model.layers.{l}.self_attn.o_proj.bias",
    "blocks.q_norm": "model.layers.{l}.self_attn.q_norm.weight",
    "blocks.k_norm": "model.layers.{l}.self_attn.k_norm.weight",
    "blocks.mlp_norm": "model.layers.{l}.post_attention_layernorm.weight",
    "blocks.gate": "model.layers.{l}.mlp.gate_proj.weight",
    "blocks.up": "model.layers.{l}.mlp.up_proj.weight",
    "blocks.down": "model.layers.{l}.mlp.down_proj.weight",
    "blocks.gate_bias": "model.layers.{l}.mlp.gate_proj.bias",
    "blocks.up_bias": "model.layers.{l}.mlp.up_proj.bias",
    "blocks.down_bias": "model.layers.{l}.mlp.down_proj.bias",
    "final_norm": "model.norm.weight",
    "unembed": "lm_head.weight",
}
QWEN = {
    "embed": "transformer.wte.weight",
    "blocks.attn_norm": "transformer.h.{l}.ln_1.weight",
    **{f"blocks.{part}": "transformer.h.{l}.attn.c_attn.weight" for part in "qkv"},
    **{f"blocks.{part}_bias": "transformer.h.{l}.attn.c_attn.bias" for part in "qkv"},
    "blocks.o": "transformer.h.{l}.attn.c_proj.weight",
    "blocks.o_bias": "transformer.h.{l}.attn.c_proj.bias",
    "blocks.mlp_norm": "transformer.h.{l}.ln_2.weight",
    "blocks.gate": "transformer.h.{l}.mlp.w2.weight",
    "blocks.up": "transformer.h.{l}.mlp.w1.weight",
    "blocks.down": "transformer.h.{l}.mlp.c_proj.weight",
    "blocks.gate_bias": "transformer.h.{l}.mlp.w2.bias",
    "blocks.up_bias": "transformer.h.{l}.mlp.w1.bias",
    "blocks.down_bias": "transformer.h.{l}.mlp.c_proj.bias",
    "final_norm": "transformer.ln_f.weight",
    "unembed": "lm_head.weight",
}
FUSED_GATE = {f"blocks.{part}": "model.layers.{l}.mlp.gate_up_proj.weight" for part in ("gate", "up")}
PHI3 = LLAMA | FUSED_GATE | {f"blocks.{part}": "model.layers.{l}.self_attn.qkv_proj.weight" for part in "qkv"}
GLM4 = (
    LLAMA
    | FUSED_GATE
    | {
        "blocks.attn_post_norm": "model.layers.{l}.post_self_attn_layernorm.weight",
        "blocks.mlp_post_norm": "model.layers.{l}.post_mlp_layernorm.weight",
    }
)
OLMO2 = LLAMA | {
    "blocks.attn_post_norm": "model.layers.{l}.post_attention_layernorm.weight",
    "blocks.mlp_post_norm": "model.layers.{l}.post_feedforward_layernorm.weight",
}
GEMMA2 = OLMO2 | {"blocks.mlp_norm": "model.layers.{l}.pre_feedforward_layernorm.weight"}
HUNYUAN = LLAMA | {
    "blocks.q_norm": "model.layers.{l}.self_attn.query_layernorm.weight",
    "blocks.k_norm": "model.layers.{l}.self_attn.key_layernorm.weight",
}
TABLES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen": QWEN,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "smollm3": LLAMA,
    "exaone4": OLMO2,
    "cohere": LLAMA,
    "cohere2": LLAMA,
    "hunyuan_v1_dense": HUNYUAN,
    "gemma": LLAMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2,
    "gemma3": {path: f"language_model.{name}" for path, name in GEMMA2.items()},
    "mistral3": {path: f"language_model.{name}" for path, name in LLAMA.items()},
    "ministral3": LLAMA,
    "qwen2_vl": LLAMA,
    "qwen2_5_vl": LLAMA,
    "qwen3_vl": {path: name.replace("model.", "model.language_model.", 1) for path, name in LLAMA.items()},
    "phi3": PHI3,
    "olmo2": OLMO2,
    "olmo3": OLMO2,
    "seed_oss": LLAMA,
    "ernie4_5": LLAMA,
    "cwm": LLAMA,
    "granite": LLAMA,
    "glm": LLAMA | FUSED_GATE,
    "glm4": GLM4,
}
# Names of the tensors of a multimodal model's other parts.
LLAVA, QWEN_VL = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\."), re.compile(r"^(model\.)?visual\.")
OTHER_PARTS = {"gemma3": LLAVA, "mistral3": LLAVA, "qwen2_vl": QWEN_VL, "qwen2_5_vl": QWEN_VL, "qwen3_vl": QWEN_VL}

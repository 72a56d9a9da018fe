"""HF tensor names of Gemma 4."""

import re

from refusal_jax.models.tables.dense import GEMMA2

LAYER = "model.layers.{l}."
ATTENTION = ("q", "k", "v", "o", "q_bias", "k_bias", "v_bias", "o_bias", "q_norm", "k_norm")
GEMMA4 = (
    GEMMA2
    | {f"blocks.full_{name}": GEMMA2[f"blocks.{name}"] for name in ATTENTION}
    | {f"blocks.dense_{name}": GEMMA2[f"blocks.{name}"] for name in ("gate", "up", "down")}
    | {f"blocks.expert_{name}": f"{LAYER}experts.gate_up_proj" for name in ("gate", "up")}
    | {
        "blocks.expert_down": f"{LAYER}experts.down_proj",
        "blocks.expert_norm": f"{LAYER}pre_feedforward_layernorm_2.weight",
        "blocks.expert_post_norm": f"{LAYER}post_feedforward_layernorm_2.weight",
        "blocks.beside_post_norm": f"{LAYER}post_feedforward_layernorm_1.weight",
        "blocks.router": f"{LAYER}router.proj.weight",
        "blocks.router_scale": f"{LAYER}router.scale",
        "blocks.expert_scale": f"{LAYER}router.per_expert_scale",
        "blocks.per_layer_gate": f"{LAYER}per_layer_input_gate.weight",
        "blocks.per_layer_out": f"{LAYER}per_layer_projection.weight",
        "blocks.per_layer_post_norm": f"{LAYER}post_per_layer_input_norm.weight",
        "blocks.layer_scale": f"{LAYER}layer_scalar",
        "per_layer_embed": "model.embed_tokens_per_layer.weight",
        "per_layer_projection": "model.per_layer_model_projection.weight",
        "per_layer_norm": "model.per_layer_projection_norm.weight",
    }
)
WHOLE = {path: name.replace("model.", "model.language_model.", 1) for path, name in GEMMA4.items()}
TABLES = {"gemma4_text": GEMMA4, "gemma4": WHOLE, "gemma4_unified": WHOLE}
OTHER = re.compile(r"^(model\.)?(vision_tower|audio_tower|vision_embedder|embed_vision|embed_audio)\.")
OTHER_PARTS = {"gemma4": OTHER, "gemma4_unified": OTHER}

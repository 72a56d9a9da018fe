"""HF tensor names of models with latent attention."""

import re

from refusal_jax.models.tables.mixtures import GLM4_MOE

LATENT = {
    "blocks.latent_q": "model.layers.{l}.self_attn.q_proj.weight",
    "blocks.latent_q_down": "model.layers.{l}.self_attn.q_a_proj.weight",
    "blocks.latent_q_down_bias": "model.layers.{l}.self_attn.q_a_proj.bias",
    "blocks.latent_q_norm": "model.layers.{l}.self_attn.q_a_layernorm.weight",
    "blocks.latent_q_up": "model.layers.{l}.self_attn.q_b_proj.weight",
    "blocks.latent_kv_down": "model.layers.{l}.self_attn.kv_a_proj_with_mqa.weight",
    "blocks.latent_kv_down_bias": "model.layers.{l}.self_attn.kv_a_proj_with_mqa.bias",
    "blocks.latent_kv_norm": "model.layers.{l}.self_attn.kv_a_layernorm.weight",
    "blocks.latent_kv_up": "model.layers.{l}.self_attn.kv_b_proj.weight",
}
DEEPSEEK = GLM4_MOE | LATENT
TABLES = {
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "kimi_k2": DEEPSEEK,
    "kimi_k25": {path: f"language_model.{name}" for path, name in DEEPSEEK.items()},
    "glm4_moe_lite": DEEPSEEK,
}
# transformers 5.24 loads the names above, and saves the text part's layers as "blocks", as those of the vision part are called.
OTHER_SPELLINGS = {"kimi_k25": ("blocks.", "layers.")}
OTHER_PARTS = {"kimi_k25": re.compile(r"^(model\.)?(vision_tower|mm_projector)\.")}

"""Tiny random checkpoints of every supported family, made by transformers, in each of the variants that matter.

The first Qwen, which transformers does not know, computes what a Llama with biases does: its checkpoint is written here
under Qwen's own names, attributes and fused tensors, and such a Llama of the same weights is its reference.
"""

import functools
import json
import pathlib
import re
from typing import NamedTuple

import numpy as np
import oracle
import torch
from safetensors.torch import load_file, save_file
from tiny import DTYPES, ROPES, edit_json, hf_forward, randomise, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from refusal_jax.taps import RESIDUAL_SITES

BASE = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
HEADS = {"mha": {"num_key_value_heads": 4}, "mqa": {"num_key_value_heads": 1}, "gqa": {}}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [2.0, 5.0, 9.0],
    "original_max_position_embeddings": 20,
}
GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
QWEN_VISION |= {"patch_size": 4}
MROPE = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [1, 1, 2]}  # of half a head


KIMI_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
KIMI_VISION |= {"patch_size": 4, "pos_emb_height": 4, "pos_emb_width": 4}


class Whole(NamedTuple):
    """A multimodal config: the model_type and further attributes of its text part, and its other parts."""

    text: str
    more: dict
    parts: dict


MULTIMODAL = {
    "gemma3": Whole("gemma3_text", {}, {"vision_config": VISION, "image_token_index": 3}),
    "qwen2_vl": Whole(
        "qwen2_vl_text",
        {"rope_parameters": MROPE},
        {"vision_config": QWEN_VISION | {"embed_dim": 16, "hidden_size": 32}},
    ),
    "qwen2_5_vl": Whole("qwen2_5_vl_text", {"rope_parameters": MROPE}, {"vision_config": QWEN_VISION}),
    "qwen3_vl": Whole(
        "qwen3_vl_text",
        {"rope_parameters": MROPE | {"mrope_interleaved": True}},
        {"vision_config": QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}},
    ),
    "qwen3_5": Whole("qwen3_5_text", {}, {"vision_config": QWEN_VISION | {"num_position_embeddings": 16}}),
    "qwen3_5_moe": Whole("qwen3_5_moe_text", {}, {"vision_config": QWEN_VISION | {"num_position_embeddings": 16}}),
    "kimi_k25": Whole("deepseek_v3", {}, {"vision_config": KIMI_VISION, "projection_hidden_size": 16}),
    "mistral3": Whole(
        "mistral", {}, {"vision_config": VISION | {"model_type": "pixtral", "head_dim": 8}, "image_token_index": 3}
    ),
}
MULTIMODAL["llama4"] = Whole(
    "llama4_text",
    {},
    {
        "vision_config": VISION
        | dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 16)
        | {"model_type": "llama4_vision_model"}
    },
)
MINISTRAL3 = {
    "head_dim": 16,
    "rope_parameters": YARN
    | {"llama_4_scaling_beta": 0.4, "original_max_position_embeddings": 10, "mscale": 1.0, "mscale_all_dim": 1.0},
}
# Narrow caps, windows of a few tokens, small thetas: every switch has to change the outputs of a tiny model.
GEMMA2 = {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 10, "num_hidden_layers": 4}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
QWEN_MIXTURE = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40} | EXPERTS
GLM_MIXTURE = {"moe_intermediate_size": 24, "n_routed_experts": 12, "num_experts_per_tok": 3, "head_dim": 16}
GLM_MIXTURE |= {"routed_scaling_factor": 1.7}
PARTIAL = {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5}
GRANITE = {
    "embedding_multiplier": 2.5,
    "logits_scaling": 3.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.3,
    "tie_word_embeddings": True,
    "attention_bias": True,
}
FAMILIES = {
    "llama": HEADS
    | {
        "biased": {"attention_bias": True, "mlp_bias": True, "head_dim": 16, "hidden_act": "gelu"},
        "tied": {"tie_word_embeddings": True, "hidden_act": "relu", "head_dim": 4},
        "gelu-tanh": {"hidden_act": "gelu_pytorch_tanh", "mlp_bias": True},
    },
    "mistral": HEADS | {"window": {"sliding_window": 7, "head_dim": 16}, "no-window": {"sliding_window": None}},
    "qwen": {"mha": {}, "biased": {"no_bias": False, "head_dim": 8}},
    "qwen2": HEADS | {"windows": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}},
    "qwen3": {k: {"head_dim": 16} | v for k, v in HEADS.items()} | {"biased": {"head_dim": 8, "attention_bias": True}},
    "smollm3": {
        "gqa": {"no_rope_layer_interval": 2},
        "windows": {
            "use_sliding_window": True,
            "sliding_window": 5,
            "no_rope_layers": [0, 1, 0],
            "attention_bias": True,
        },
    },
    "exaone4": {
        "gqa": {"sliding_window": 6, "sliding_window_pattern": 2, "head_dim": 16},
        "no-window": {"sliding_window": None, "layer_types": ["full_attention"] * 3, "tie_word_embeddings": True},
    },
    "cohere": {"gqa": {}, "normed": {"use_qk_norm": True, "logit_scale": 0.4, "attention_bias": True}},
    "cohere2": {
        "gqa": {"sliding_window": 6, "sliding_window_pattern": 2},
        "untied": {"sliding_window": 5, "num_hidden_layers": 4, "tie_word_embeddings": False, "logit_scale": 0.6},
    },
    "hunyuan_v1_dense": {
        "gqa": {"head_dim": 16},
        "alpha": {
            "head_dim": 8,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "alpha": 50.0, "factor": 1.0},
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    },
    "gemma": {k: {"head_dim": 16} | v for k, v in HEADS.items()},
    "gemma2": {k: GEMMA2 | v for k, v in HEADS.items()}
    | {"capped": GEMMA2 | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5}},
    "gemma3_text": {
        k: GEMMA2 | {"layer_types": ["sliding_attention", "full_attention"] * 2, "rope_parameters": GEMMA3_ROPES} | v
        for k, v in HEADS.items()
    },
    "gemma3": {"gqa": {}},
    "qwen2_vl": {
        "mha": HEADS["mha"],
        "windows": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    },
    "qwen2_5_vl": {"gqa": {"tie_word_embeddings": True}, "mqa": HEADS["mqa"]},
    "qwen3_vl": {k: {"head_dim": 8} | v for k, v in HEADS.items()},
    "mistral3": {"gqa": {"head_dim": 16}, "window": {"sliding_window": 7}, "ministral3": MINISTRAL3},
    "ministral3": {k: MINISTRAL3 | v for k, v in HEADS.items()},
    "phi3": HEADS
    | {
        "partial": {"partial_rotary_factor": 0.75, "sliding_window": 9},
        "longrope": {
            "partial_rotary_factor": 0.75,
            "rope_parameters": LONG,
            "original_max_position_embeddings": 20,
            "tie_word_embeddings": True,
        },
    },
    "olmo2": HEADS | {"biased": {"attention_bias": True}},
    "olmo3": {
        k: {"sliding_window": 6, "num_hidden_layers": 4} | v
        for k, v in (
            HEADS
            | {
                "biased": {"attention_bias": True},
                "yarn": {
                    "rope_parameters": {"full_attention": YARN, "sliding_attention": GEMMA3_ROPES["sliding_attention"]}
                },
            }
        ).items()
    },
    "seed_oss": {
        k: {"head_dim": 16, "attention_out_bias": k == "mha", "mlp_bias": k == "mqa"} | v for k, v in HEADS.items()
    }
    | {"unbiased": {"head_dim": 8, "attention_bias": False}},
    "ernie4_5": {k: {"head_dim": 8, "use_bias": k == "mqa"} | v for k, v in HEADS.items()}
    | {"untied": {"head_dim": 16, "tie_word_embeddings": False}},
    "cwm": {k: {"head_dim": 16, "sliding_window": 5, "num_hidden_layers": 4} | v for k, v in HEADS.items()},
    "granite": HEADS | {"scaled": GRANITE | {"mlp_bias": True}},
    "glm": {k: {"head_dim": 8} | v for k, v in HEADS.items()},
    "glm4": {k: {"head_dim": 16} | v for k, v in HEADS.items()}
    | {"unbiased": {"attention_bias": False, "head_dim": 8}},
    "mixtral": {k: {"num_local_experts": 5, "num_experts_per_tok": 2} | v for k, v in HEADS.items()}
    | {"window": {"sliding_window": 8, "num_local_experts": 3, "num_experts_per_tok": 1}},
    "qwen3_moe": {k: {"head_dim": 16, "moe_intermediate_size": 24} | EXPERTS | v for k, v in HEADS.items()}
    | {
        "renormalised": {
            "norm_topk_prob": True,
            "num_experts": 40,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 8,
        }
    },
    "qwen2_moe": {
        "gqa": QWEN_MIXTURE
        | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "qkv_bias": False},
        "alternating": QWEN_MIXTURE | {"num_hidden_layers": 5, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    },
    "glm4_moe": {
        "gqa": GLM_MIXTURE | {"moe_intermediate_size": 12, "n_shared_experts": 2},  # a mesh divides what is shared more
        "grouped": GLM_MIXTURE
        | {"n_group": 4, "topk_group": 2, "use_qk_norm": True, "attention_bias": True, "n_shared_experts": 2}
        | {"first_k_dense_replace": 2, "partial_rotary_factor": 1.0},
    },
    "granitemoe": {"scaled": {"num_local_experts": 6, "num_experts_per_tok": 3} | GRANITE},
    "granitemoeshared": {"gqa": {"num_local_experts": 5, "shared_intermediate_size": 40} | GRANITE},
    "minimax_m2": {
        "gqa": {"num_local_experts": 6, "num_experts_per_tok": 3, "head_dim": 16, "rope_parameters": PARTIAL},
    },
    "olmoe": {k: EXPERTS | v for k, v in HEADS.items()}
    | {"clipped": EXPERTS | {"clip_qkv": 0.7, "norm_topk_prob": True}},
}
GPT_OSS = {"head_dim": 16, "num_local_experts": 5, "num_experts_per_tok": 2, "swiglu_limit": 0.8, "sliding_window": 6}
FAMILIES["gpt_oss"] = {
    "gqa": GPT_OSS | {"rope_parameters": YARN | {"truncate": False}},
    # As wide inside as outside, as the published ones are: then no shape tells how a matrix lies.
    "square": GPT_OSS
    | {"attention_bias": False, "tie_word_embeddings": True, "swiglu_alpha": 1.0, "intermediate_size": 32},
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
}
LATENT |= {"v_head_dim": 14, "n_routed_experts": 12, "num_experts_per_tok": 3, "routed_scaling_factor": 1.7}
LATENT |= {"moe_intermediate_size": 24, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
FEW_GROUPS = {"n_group": 4, "topk_group": 2}
PLAIN_QUERIES = {"q_lora_rank": None, "attention_bias": True, "moe_intermediate_size": 12, "n_shared_experts": 2}
STEEP = {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4}}
FAMILIES["deepseek_v2"] = {
    "grouped": LATENT | FEW_GROUPS | STEEP | {"topk_method": "group_limited_greedy", "first_k_dense_replace": 1},
    "greedy": LATENT | PLAIN_QUERIES,
}
FAMILIES["deepseek_v3"] = {
    "grouped": LATENT | FEW_GROUPS | STEEP | {"first_k_dense_replace": 1},
    "plain-queries": LATENT
    | PLAIN_QUERIES
    | {"rope_interleave": False, "norm_topk_prob": False, "first_k_dense_replace": 2},
    "dense": LATENT | {"first_k_dense_replace": 3, "tie_word_embeddings": True},
}
FAMILIES["kimi_k2"] = {"mha": LATENT | STEEP | {"first_k_dense_replace": 1}}
FAMILIES["kimi_k25"] = {"mha": LATENT | STEEP | {"first_k_dense_replace": 1}}
FAMILIES["glm4_moe_lite"] = {
    "mha": LATENT,
    "alternating": LATENT
    | PLAIN_QUERIES
    | FEW_GROUPS
    | {"mlp_layer_types": ["sparse", "dense", "sparse"], "rope_interleave": False},
}
# Types that checkpoints say and transformers does not know, and the type whose code theirs is a copy of.
CODE_OF = {"kimi_k2": "deepseek_v3"}
# Value heads for each key head, widths that differ, layers of both kinds, so that nothing can be mixed up unseen.
HYBRID = {"num_hidden_layers": 4, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
# A first token's output is its value times q . k, then normed: a larger eps keeps noise from deciding its sign.
HYBRID |= {"linear_key_head_dim": 8, "linear_value_head_dim": 12, "rope_parameters": PARTIAL, "rms_norm_eps": 1e-3}
FAMILIES["qwen3_next"] = {
    "gqa": HYBRID | QWEN_MIXTURE,
    "alternating": HYBRID
    | QWEN_MIXTURE
    | {"num_hidden_layers": 5, "decoder_sparse_step": 2, "mlp_only_layers": [3], "norm_topk_prob": False}
    | {"full_attention_interval": 2, "linear_num_key_heads": 1, "linear_num_value_heads": 3, "attention_bias": True}
    | {"linear_conv_kernel_dim": 3},
}
FAMILIES["qwen3_5_text"] = {
    "gqa": HYBRID,
    "tied": HYBRID
    | {"tie_word_embeddings": True, "linear_num_key_heads": 4, "linear_conv_kernel_dim": 2, "attention_bias": True}
    | {"layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"]},
}
FAMILIES["qwen3_5_moe_text"] = {"gqa": HYBRID | QWEN_MIXTURE}
FAMILIES["qwen3_5"] = {"gqa": HYBRID | {"rope_parameters": PARTIAL | MROPE | {"mrope_interleaved": True}}}
FAMILIES["qwen3_5_moe"] = {"gqa": HYBRID | QWEN_MIXTURE}
GEMMA4_ROPES = {
    "full_attention": {"rope_type": "proportional", "rope_theta": 1000.0, "partial_rotary_factor": 0.5, "factor": 2.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
GEMMA4 = {"head_dim": 8, "global_head_dim": 16, "sliding_window": 6, "rope_parameters": GEMMA4_ROPES}
GEMMA4 |= {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2}
GEMMA4_LARGE = {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
FAMILIES["gemma4_text"] = {
    "gqa": GEMMA4
    | {"num_kv_shared_layers": 3, "use_double_wide_mlp": True, "hidden_size_per_layer_input": 12}
    | {"vocab_size_per_layer_input": 400, "final_logit_softcapping": 1.5},
    "mqa": GEMMA4 | {"num_key_value_heads": 1, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8},
    "experts": GEMMA4
    | GEMMA4_LARGE
    | {"enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 24},
    "biased": GEMMA4 | GEMMA4_LARGE | {"attention_bias": True, "tie_word_embeddings": False},
}
FAMILIES["gemma4"] = {"gqa": FAMILIES["gemma4_text"]["gqa"]}
FAMILIES["gemma4_unified"] = {
    "gqa": {name: value for name, value in (GEMMA4 | GEMMA4_LARGE).items() if "per_layer_input" not in name}
}
GEMMA4_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
GEMMA4_VISION |= {"num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "position_embedding_size": 16}
MULTIMODAL["gemma4"] = Whole("gemma4_text", {}, {"vision_config": GEMMA4_VISION})
MULTIMODAL["gemma4_unified"] = Whole(
    "gemma4_unified_text",
    {},
    {"vision_config": {"patch_size": 4, "mm_embed_dim": 16, "mm_posemb_size": 16, "output_proj_dims": 32}},
)
GRANITE_4 = GRANITE | {"mamba_n_heads": 8, "mamba_d_state": 6, "mamba_n_groups": 2, "shared_intermediate_size": 40}
FAMILIES["granitemoehybrid"] = {
    "gqa": GRANITE_4
    | {"num_local_experts": 6, "num_experts_per_tok": 3, "layer_types": ["mamba", "attention", "mamba", "mamba"]}
    | {"num_hidden_layers": 4, "position_embedding_type": "nope", "time_step_limit": [0.3, 1.2]},
    "dense": GRANITE_4
    | {"num_local_experts": 0, "layer_types": ["mamba", "attention", "attention"], "mamba_n_groups": 1}
    | {"position_embedding_type": "rope", "mamba_conv_bias": False, "mamba_d_conv": 3, "mamba_expand": 3},
    "attention": GRANITE_4
    | {"num_local_experts": 0, "layer_types": ["attention"] * 3, "position_embedding_type": "rope"},
}
LLAMA4 = {
    "num_hidden_layers": 4,
    "head_dim": 8,
    "intermediate_size_mlp": 40,
    "num_local_experts": 3,
    "interleave_moe_layer_step": 2,
    "no_rope_layer_interval": 2,
    "attention_chunk_size": 7,
    "floor_scale": 5,
    "attn_scale": 0.6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
}
STEP = {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
STEP |= {"low_freq_factor": 1.0, "high_freq_factor": 1.0}
FAMILIES["llama4_text"] = {
    "mqa": LLAMA4 | HEADS["mqa"] | {"moe_layers": [0, 1, 2, 3], "rope_parameters": STEP},
    "two": LLAMA4 | {"num_experts_per_tok": 2, "use_qk_norm": False, "attn_temperature_tuning": False},
    "dense": LLAMA4
    | {"moe_layers": [], "tie_word_embeddings": True, "attention_bias": True, "no_rope_layers": [1, 0, 0, 1]},
}
FAMILIES["llama4"] = {"gqa": LLAMA4 | {"attention_chunk_size": None}}
LFM2 = {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "full_attention"]}
LFM2 |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}}
FAMILIES["lfm2"] = {
    "gqa": LFM2 | {"block_multiple_of": 16, "block_ffn_dim_multiplier": 1.3},
    "biased": LFM2
    | {"conv_bias": True, "conv_L_cache": 5, "tie_word_embeddings": False, "block_auto_adjust_ff_dim": False}
    | {"layer_types": None, "full_attn_idxs": [0]},
}
LFM2_MIXTURE = LFM2 | EXPERTS | {"moe_intermediate_size": 24, "routed_scaling_factor": 1.7}
FAMILIES["lfm2_moe"] = {
    "gqa": LFM2_MIXTURE | {"num_dense_layers": 1},
    "uncorrected": LFM2_MIXTURE
    | {"num_dense_layers": 0, "use_expert_bias": False, "norm_topk_prob": False, "conv_L_cache": 2},
}
ROPE_VARIANTS = {
    "linear": ROPES["linear"],
    "llama3": ROPES["llama3"],
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 3.0},
    "yarn": YARN,
    "yarn-tuned": YARN | {"beta_fast": 4.0, "beta_slow": 0.5, "attention_factor": 1.3, "truncate": False},
    "yarn-mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4},
}
FAMILIES["llama"] |= {f"rope-{name}": {"head_dim": 16, "rope_parameters": rope} for name, rope in ROPE_VARIANTS.items()}
FAMILIES["llama"]["rope-dynamic"]["max_position_embeddings"] = 25
FALCON_H1 = {
    "head_dim": 16,
    "mamba_d_ssm": 48,
    "mamba_n_heads": 6,
    "mamba_n_groups": 2,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
    "embedding_multiplier": 1.7,
    "lm_head_multiplier": 0.6,
    "key_multiplier": 0.7,
    "attention_in_multiplier": 1.3,
    "attention_out_multiplier": 0.8,
    "ssm_in_multiplier": 1.2,
    "ssm_out_multiplier": 0.7,
    "ssm_multipliers": [1.4, 0.8, 1.3, 0.7, 1.5],
    "mlp_multipliers": [1.6, 0.6],
}
FAMILIES["falcon_h1"] = {
    "gqa": FALCON_H1,
    "normed": FALCON_H1
    | {
        "mamba_rms_norm": True,
        "attention_bias": True,
        "mlp_bias": True,
        "projectors_bias": True,
        "mamba_conv_bias": False,
        "time_step_limit": [0.3, 0.9],
        "tie_word_embeddings": True,
    },
    "mqa": FALCON_H1
    | HEADS["mqa"]
    | {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "mamba_d_ssm": None}
    | {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_d_conv": 3, "hidden_act": "gelu"},
}
NEMOTRON_H = {
    "head_dim": 16,
    "mamba_num_heads": 6,
    "mamba_head_dim": 8,
    "ssm_state_size": 16,
    "n_groups": 2,
    "chunk_size": 16,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 1.7,
}
FAMILIES["nemotron_h"] = {
    "gqa": NEMOTRON_H | {"hybrid_override_pattern": "M-*-M", "time_step_min": 0.6},
    "mixture": NEMOTRON_H
    | {"hybrid_override_pattern": "ME*-E", "n_group": 4, "topk_group": 2, "norm_topk_prob": False}
    | {"use_conv_bias": False, "conv_kernel": 3, "mlp_bias": True},
    "latent": NEMOTRON_H
    | {"layers_block_type": ["attention", "moe", "mamba", "moe"], "moe_latent_size": 20, "mlp_bias": True}
    | {"mlp_hidden_act": "gelu"},
}
CASES = [(family, variant) for family, variants in FAMILIES.items() for variant in variants]
FIRST = {(family, next(iter(variants))) for family, variants in FAMILIES.items()}
# Attributes that change what decoding keeps or how it looks back. Variants of a family without any decode as its first one does.
LOOKS_BACK = re.compile(
    "window|chunk|rope|layer_types|layers_block_type|shared_layers|pattern|lora_rank|softcap|mamba|conv_L_cache|qk_norm"
)
# Those whose layers are of several kinds or keep something else than keys and values; test_families_of_kinds.py has them.
OF_KINDS = """
    deepseek_v2 deepseek_v3 kimi_k2 kimi_k25 glm4_moe_lite qwen3_next qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text llama4
    llama4_text lfm2 lfm2_moe granitemoehybrid falcon_h1 nemotron_h gemma4 gemma4_text gemma4_unified
""".split()


def decodes_differently(family: str, variant: str) -> bool:
    """Returns whether a variant decodes differently from the first one of its family."""
    first, own = (FAMILIES[family][name] for name in (next(iter(FAMILIES[family])), variant))
    changed = [name for name in first.keys() | own.keys() if first.get(name) != own.get(name)]
    return (family, variant) in FIRST or family == "llama" or any(LOOKS_BACK.search(name) for name in changed)


def hf_config(family: str, variant: str = "gqa", **config) -> dict:
    """The config.json of a tiny model of this family. config: further attributes."""
    settings = BASE | FAMILIES[family].get(variant, {}) | config
    if family == "qwen":
        return _first_qwen_config(settings)
    if family in MULTIMODAL:
        whole = MULTIMODAL[family]
        of_text = FAMILIES["gemma3_text" if family == "gemma3" else family][variant]
        kind = "ministral3" if "ministral3" in variant else whole.text
        text = BASE | whole.more | of_text | config | {"model_type": kind}
        tied = {} if family == "gemma3" else {"tie_word_embeddings": settings.get("tie_word_embeddings", False)}
        settings = {"text_config": text} | whole.parts | tied
    return AutoConfig.for_model(CODE_OF.get(family, family), **settings).to_dict() | {"model_type": family}


def tiny_model(
    folder, family: str, variant: str = "gqa", dtype: str = "float32", seed: int = 0, **config
) -> pathlib.Path:
    """Writes a whole HF folder of a random model of this family to `folder` and returns it. config: further attributes."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer(folder)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    hf = hf_config(family, variant, **{"vocab_size": len(tokenizer)} | special | config)
    if family == "qwen":
        return _first_qwen(folder, hf, dtype, seed)
    auto = AutoModelForImageTextToText if family in MULTIMODAL else AutoModelForCausalLM
    model = auto.from_config(known_config(hf))
    randomise(model, seed)
    model.to(DTYPES[dtype]).save_pretrained(folder)
    if family in CODE_OF:
        edit_json(folder / "config.json", model_type=family)
    if (
        family == "kimi_k25"
    ):  # transformers 5.24 writes "blocks", which the published checkpoints say in the vision part only
        old = load_file(folder / "model.safetensors")
        new = {name.replace("language_model.model.blocks", "language_model.model.layers"): t for name, t in old.items()}
        save_file(new, folder / "model.safetensors", {"format": "pt"})
    return folder


def known_config(hf: dict):
    """transformers' config of a config.json."""
    return AutoConfig.for_model(**hf | {"model_type": CODE_OF.get(hf["model_type"], hf["model_type"])})


def reference(folder):
    """The checkpoint in transformers, float32, ready for inference."""
    folder = pathlib.Path(folder)
    hf = json.loads((folder / "config.json").read_text())
    family = hf["model_type"]
    auto = AutoModelForImageTextToText if family in MULTIMODAL else AutoModelForCausalLM
    where = folder / "reference" if family == "qwen" else folder
    if family == "qwen":
        _as_llama(folder, where)
    known = {"config": known_config(hf)} if family in CODE_OF else {}
    model = auto.from_pretrained(where, dtype=torch.float32, attn_implementation="eager", **known).eval()
    # The whole Llama 4 of transformers 5.24 fails without an image.
    return without_padding(model.language_model if family == "llama4" else model)


def without_padding(model):
    """The model, with what padding does in transformers alone mended: Llama 4's queries grow with the number of tokens before
    them, padding among them, and biases of LFM2's convolutions make inputs of it."""
    text, seen = text_model(model), {}
    text.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)

    def grown(attention, module, args, out):
        whole = torch.floor((seen["position_ids"] + 1.0) / attention.floor_scale)
        return out * (1 + attention.attn_scale * torch.log1p(whole))[..., None]

    def real(module, args, out):
        return out * seen["attention_mask"][:, -out.shape[1] :, None]

    for layer in text.layers:
        attention = getattr(layer, "self_attn", None)
        if getattr(getattr(layer, "conv", None), "bias", False):
            layer.conv.in_proj.register_forward_hook(real)
        if getattr(attention, "attn_temperature_tuning", False) and not attention.use_rope:
            attention.attn_temperature_tuning = False
            attention.q_proj.register_forward_hook(functools.partial(grown, attention))
    return model


def hf_taps(model, tokens, mask) -> dict[str, np.ndarray]:
    """Every tap site of every layer, `{site: [L, B, T, D]}`, caught by forward hooks."""
    if model.config.model_type in ("falcon_h1", "nemotron_h"):
        return _differences(model, tokens, mask)
    caught = {site: [] for site in RESIDUAL_SITES}
    layers, scale = text_model(model).layers, getattr(model.config, "residual_multiplier", 1.0)
    before_mlp = "pre_feedforward_layernorm", "ffn_norm"  # what gets the residual in the middle, if layers have it
    parallel = not any(hasattr(layers[0], name) for name in ("post_attention_layernorm", *before_mlp))

    def first(value):
        return value[0] if isinstance(value, tuple) else value

    def before(site):
        return lambda module, args, kwargs: caught[site].append(first(args) if args else kwargs["hidden_states"])

    def after(site, factor=1.0):
        return lambda module, args, out: caught[site].append(factor * first(out))

    def more(site, factor):
        return lambda module, args, out: caught[site].append(caught[site].pop() + factor * first(out))

    hooks = []
    for layer in layers:
        attention, mlp, *beside = oracle.writers(layer)
        reads_mid = next((getattr(layer, name) for name in before_mlp if hasattr(layer, name)), None)
        if reads_mid is None and not parallel:
            reads_mid = layer.mlp if attention is layer.post_attention_layernorm else layer.post_attention_layernorm
        hooks += [
            layer.register_forward_pre_hook(before("resid_pre"), with_kwargs=True),
            attention.register_forward_hook(after("attn_out", scale)),
            mlp.register_forward_hook(after("mlp_out", scale)),
            *(module.register_forward_hook(more("mlp_out", scale)) for module in beside),
            layer.register_forward_hook(after("resid_post")),
        ]
        if not parallel:
            hooks.append(reads_mid.register_forward_pre_hook(before("resid_mid"), with_kwargs=True))
    try:
        hf_forward(model, tokens, mask)
    finally:
        for hook in hooks:
            hook.remove()
    if parallel:
        caught["resid_mid"] = [pre + out for pre, out in zip(caught["resid_pre"], caught["attn_out"], strict=True)]
    shape = caught["resid_pre"][0].shape  # experts of Llama 4 give all tokens of all rows on one axis
    return {site: torch.stack([v.reshape(shape) for v in values]).numpy() for site, values in caught.items()}


def _differences(model, tokens, mask) -> dict[str, np.ndarray]:
    """Returns what `hf_taps` does, of models in which no module alone makes what is added to the residual: from residuals.
    Where a layer has one part only, that is a mixture, an MLP or a sequence mixer."""
    caught, hooks = {"resid_pre": [], "resid_mid": [], "resid_post": []}, []

    def read(site, value):
        caught[site].append(value[0] if isinstance(value, tuple) else value)

    def before(site):
        return lambda module, args, kwargs: read(site, args[0] if args else kwargs["hidden_states"])

    layers = text_model(model).layers
    for layer in layers:
        hooks.append(layer.register_forward_pre_hook(before("resid_pre"), with_kwargs=True))
        hooks.append(layer.register_forward_hook(lambda module, args, out: read("resid_post", out)))
        if hasattr(layer, "pre_ff_layernorm"):
            hooks.append(layer.pre_ff_layernorm.register_forward_pre_hook(before("resid_mid"), with_kwargs=True))
    try:
        hf_forward(model, tokens, mask)
    finally:
        for hook in hooks:
            hook.remove()
    for layer, pre, post in zip(layers, caught["resid_pre"], caught["resid_post"], strict=True):
        if hasattr(layer, "mixer"):
            caught["resid_mid"].append(pre if layer.block_type in ("mlp", "moe") else post)
    found = {site: torch.stack(values).numpy() for site, values in caught.items()}
    added = {"attn_out": found["resid_mid"] - found["resid_pre"], "mlp_out": found["resid_post"] - found["resid_mid"]}
    return found | added


def hf_heads(model, tokens, mask) -> dict[str, np.ndarray]:
    """Returns, of every layer that has heads, what goes in and out of the projection, "z" `[L, B, T, N, H]`, narrower with zeros
    at the end, and "out" `[L, B, T, D]`, and the attention probabilities, "pattern" `[L, B, N, T, T]`."""
    caught = {"z": [], "out": []}

    def catch(module, args, out):
        caught["z"].append(args[0])
        caught["out"].append(out)

    heads = [getattr(layer, "self_attn", None) for layer in text_model(model).layers]
    heads += [mixer for layer in text_model(model).layers if hasattr(mixer := getattr(layer, "mixer", None), "o_proj")]
    hooks = [getattr(part, "o_proj", None) or part.out_proj for part in heads if part is not None]
    hooks = [projection.register_forward_hook(catch) for projection in hooks]
    try:
        patterns = hf_forward(model, tokens, mask, output_attentions=True).attentions
    finally:
        for hook in hooks:
            hook.remove()
    n_heads = model.config.get_text_config().num_attention_heads
    z = [z_btf.unflatten(-1, (n_heads, -1)) for z_btf in caught["z"]]
    caught["z"] = [torch.nn.functional.pad(a, (0, max(b.shape[-1] for b in z) - a.shape[-1])) for a in z]
    caught["pattern"] = [pattern for pattern in patterns if pattern is not None]
    return {site: torch.stack(values).numpy() for site, values in caught.items()}


def text_model(model):
    """The part of a transformers model that has the embedding and the layers."""
    whole = getattr(model, "model", model)
    inner = getattr(whole, "language_model", whole)
    return getattr(inner, "model", inner)


def _first_qwen_config(settings: dict) -> dict:
    """`settings` are a Llama's."""
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    head_dim = settings.get("head_dim", settings["hidden_size"] // settings["num_attention_heads"])
    return {name: settings[name] for name in same} | {
        "model_type": "qwen",
        "architectures": ["QWenLMHeadModel"],
        "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
        "kv_channels": head_dim,
        "intermediate_size": 2 * settings["intermediate_size"],
        "seq_length": 128,
        "layer_norm_epsilon": 1e-6,
        "rotary_emb_base": 1000.0,
        "no_bias": settings.get("no_bias", True),
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "tie_word_embeddings": False,
        "eos_token_id": settings.get("eos_token_id"),
    }


def _first_qwen(folder, hf: dict, dtype: str, seed: int) -> pathlib.Path:
    """A checkpoint of the first Qwen with random weights."""
    (folder / "config.json").write_text(json.dumps(hf))
    bias, q = not hf["no_bias"], hf["kv_channels"] * hf["num_attention_heads"]
    d, f, v = hf["hidden_size"], hf["intermediate_size"] // 2, hf["vocab_size"]
    shapes = {"transformer.wte.weight": (v, d), "transformer.ln_f.weight": (d,), "lm_head.weight": (v, d)}
    for layer in range(hf["num_hidden_layers"]):
        at = f"transformer.h.{layer}"
        shapes |= {f"{at}.ln_{i}.weight": (d,) for i in (1, 2)}
        shapes |= {f"{at}.attn.c_attn.weight": (3 * q, d), f"{at}.attn.c_attn.bias": (3 * q,)}
        shapes |= {f"{at}.attn.c_proj.weight": (d, q), f"{at}.mlp.c_proj.weight": (d, f)}
        shapes |= {f"{at}.mlp.w{i}.weight": (f, d) for i in (1, 2)}
        if bias:
            shapes |= {f"{at}.mlp.w{i}.bias": (f,) for i in (1, 2)}
            shapes |= {f"{at}.attn.c_proj.bias": (d,), f"{at}.mlp.c_proj.bias": (d,)}
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            noise = 0.3 * noise + (".ln_" in name)
        elif "wte" not in name:
            noise *= 1.2 * shape[-1] ** -0.5
        tensors[name] = noise.to(DTYPES[dtype])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def _as_llama(folder, target) -> None:
    """The same model as a Llama checkpoint with biases."""
    hf, old = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    target.mkdir(exist_ok=True)
    bias = not hf["no_bias"]
    settings = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "intermediate_size": hf["intermediate_size"] // 2,
        "head_dim": hf["kv_channels"],
        "rms_norm_eps": hf["layer_norm_epsilon"],
        "rope_parameters": {"rope_type": "default", "rope_theta": hf["rotary_emb_base"]},
        "attention_bias": True,
        "mlp_bias": bias,
        "tie_word_embeddings": False,
    }
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    (target / "config.json").write_text(json.dumps(settings | {name: hf[name] for name in same}))
    new = {
        "model.embed_tokens.weight": old["transformer.wte.weight"],
        "model.norm.weight": old["transformer.ln_f.weight"],
        "lm_head.weight": old["lm_head.weight"],
    }
    renamed = {"attn.c_proj": "self_attn.o_proj", "mlp.w1": "mlp.up_proj", "mlp.w2": "mlp.gate_proj"}
    renamed |= {"mlp.c_proj": "mlp.down_proj", "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm"}
    for layer in range(hf["num_hidden_layers"]):
        a, b = f"transformer.h.{layer}", f"model.layers.{layer}"
        new[f"{b}.self_attn.o_proj.bias"] = torch.zeros(hf["hidden_size"])
        for kind in ("weight", "bias"):
            fused = old[f"{a}.attn.c_attn.{kind}"].chunk(3)
            new |= {f"{b}.self_attn.{p}_proj.{kind}": t.clone() for p, t in zip("qkv", fused, strict=True)}
            new |= {f"{b}.{n}.{kind}": old[f"{a}.{o}.{kind}"] for o, n in renamed.items() if f"{a}.{o}.{kind}" in old}
    save_file(new, target / "model.safetensors", {"format": "pt"})

"""The allow-list over HF configs, and the parameter counts of real models, without their memory."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from refusal_jax import Edits, UserError
from refusal_jax.files import read_json
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.families import hf_shapes
from refusal_jax.models.hf_attributes import Reader
from refusal_jax.models.hf_config import from_hf, load_config
from refusal_jax.models.hf_readers import READERS
from refusal_jax.models.predict import predict
from refusal_jax.models.quantisation import quantisation_of
from refusal_jax.models.rope import Rope
from refusal_jax.models.unread_keys import INERT
from refusal_jax.taps import Taps

BASE = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def hf(**changes) -> dict:
    return {key: value for key, value in (BASE | changes).items() if value is not None}


# Of every family: attributes with all of its switches on, so that a change of any of them shows.
SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-2,
    "layer_norm_eps": 1e-2,
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
}
ON = {
    "attention_bias": True,
    "attention_out_bias": True,
    "use_bias": True,
    "mlp_bias": True,
    "sliding_window": 3,
    "use_sliding_window": True,
    "max_window_layers": 2,
    "no_rope_layer_interval": 2,
    "query_pre_attn_scalar": 9.0,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 2.0,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
    "logits_scaling": 3.0,
    "partial_rotary_factor": 0.5,
    "num_experts": 4,
    "norm_topk_prob": False,
    "moe_intermediate_size": 12,
    "clip_qkv": 0.4,
    "rope_local_base_freq": 30.0,
    "sliding_window_pattern": 2,
    "kv_channels": 8,
    "no_bias": False,
    "layer_norm_epsilon": 1e-2,
    "logit_scale": 0.5,
    "swiglu_alpha": 1.5,
    "swiglu_limit": 0.3,
    "use_qk_norm": True,
    "rotary_emb_base": 100.0,
    "rotary_pct": 0.5,
    "seq_length": 32,
    "use_dynamic_ntk": True,
    "use_logn_attn": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
    "shared_expert_intermediate_size": 10,
    "qkv_bias": True,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.5,
    "num_nextn_predict_layers": 2,
    "shared_intermediate_size": 10,
    "mamba_n_heads": 4,
    "mamba_n_groups": 2,
    "mamba_d_state": 5,
    "mamba_d_conv": 3,
    "mamba_proj_bias": True,
    "mamba_conv_bias": False,
    "time_step_limit": [0.1, 0.2],
    "position_embedding_type": "rope",
    "rotary_dim": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "rope_interleave": True,
    "topk_method": "group_limited_greedy",
    "mlp_layer_types": ["dense", "sparse", "sparse", "dense"],
    "full_attention_interval": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 3,
    "global_head_dim": 12,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 6,
    "vocab_size_per_layer_input": 44,
    "enable_moe_block": True,
    "top_k_experts": 2,
    "attention_chunk_size": 3,
    "attn_temperature_tuning": True,
    "attn_scale": 0.8,
    "floor_scale": 2,
    "interleave_moe_layer_step": 2,
    "intermediate_size_mlp": 20,
    "norm_eps": 1e-2,
    "conv_L_cache": 3,
    "conv_bias": True,
    "block_multiple_of": 4,
    "block_ffn_dim_multiplier": 1.9,
    "block_auto_adjust_ff_dim": True,
    "num_dense_layers": 1,
    "use_expert_bias": True,
    "mamba_d_ssm": 24,
    "mamba_rms_norm": True,
    "mamba_norm_before_gate": True,
    "projectors_bias": True,
    "lm_head_multiplier": 0.7,
    "key_multiplier": 0.8,
    "attention_in_multiplier": 1.2,
    "attention_out_multiplier": 0.7,
    "ssm_in_multiplier": 1.3,
    "ssm_out_multiplier": 0.9,
    "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 1.3],
    "mlp_multipliers": [1.5, 0.6],
    "hybrid_override_pattern": "M*-E",
    "mamba_num_heads": 4,
    "mamba_head_dim": 6,
    "ssm_state_size": 5,
    "time_step_min": 0.3,
    "moe_latent_size": 12,
    "moe_shared_expert_intermediate_size": 10,
}
LONG_ROPE = {"type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]}
OTHER_VALUE = {
    "vocab_size": 41,
    "hidden_size": 20,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 12,
    "global_head_dim": 16,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "per_layer_config": {"3": {"head_dim": 20}},
    "intermediate_size": 26,
    "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.3],
    "mlp_multipliers": [1.5, 0.9],
    "mlp_hidden_act": "gelu",
    "mamba_hidden_act": "relu",
    "hybrid_override_pattern": "M*EE",
    "max_position_embeddings": 28,
    "rms_norm_eps": 3e-2,
    "layer_norm_epsilon": 3e-2,
    "layer_norm_eps": 3e-2,
    "rope_theta": 7.0,
    "rotary_emb_base": 7.0,
    "tie_word_embeddings": True,
    "hidden_act": "relu",
    "hidden_activation": "relu",
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "use_dynamic_ntk": False,
    "no_rope_layers": [0, 1, 1, 0],
    "no_rope_layer_interval": 3,
    "num_local_experts": 5,
    "num_experts": 5,
    "num_experts_per_tok": 1,
    "rotary_pct": 1.0,
    "sliding_window_pattern": 3,
    "max_window_layers": 0,
    "moe_intermediate_size": 14,
    "original_max_position_embeddings": 5,
    "mlp_only_layers": [1, 2],
    "n_group": 2,
    "num_mtp_layers": 2,
    "n_routed_experts": 12,
    "qk_rope_head_dim": 6,
    "topk_method": "greedy",
    "mlp_layer_types": ["sparse", "dense", "sparse", "dense"],
    "full_attention_interval": 3,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 6,
    "time_step_limit": [0.3, 0.4],
    "mamba_expand": 3,
    "mamba_n_groups": 4,
    "moe_layers": [0],
    "full_attn_idxs": [1, 2],
    "block_ff_dim": 40,
    "block_multiple_of": 5,
    "tie_embedding": True,
}
MINISTRAL_ROPE = {
    "rope_type": "yarn",
    "factor": 2.0,
    "original_max_position_embeddings": 4,
    "llama_4_scaling_beta": 0.5,
}
GEMMA4_TYPES = ["sliding_attention", "full_attention"] * 2
HYBRID = {"layer_types": ["mamba", "attention"] * 2}
GRANITE_4 = {  # its attributes that count in layers of one kind only, or depend on others
    **{name: OTHER_VALUE[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta")},
    **{name: OTHER_VALUE[name] for name in ("rope_scaling", "rope_parameters")},
    **{"attention_bias": False, "attention_multiplier": 0.7, "position_embedding_type": None, "num_local_experts": 5},
    **{"layer_types": ["mamba", "attention", "attention", "mamba"], "mamba_n_heads": 8},
}
NEMOTRON_H = ({"hybrid_override_pattern": None}, ["mamba", "attention", "moe", "moe"])
# (family, attribute): what else must be set for it to count, and its other value.
OF_FAMILY = {
    **{
        (family, "num_local_experts"): ({"num_experts": None, "num_local_experts": 4}, 5)
        for family in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "granitemoeshared", "minimax_m2")
    },
    **{
        (family, "num_local_experts"): ({"num_experts": None, "num_local_experts": 4}, 5)
        for family in ("qwen3_next", "qwen3_5_moe_text")
    },
    **{
        (family, "layer_types"): ({}, ["linear_attention", "full_attention", "full_attention", "linear_attention"])
        for family in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
    },
    ("gpt_oss", "max_position_embeddings"): ({}, 200_000),  # beyond what its default rope stretches to
    **{
        (family, "num_local_experts"): ({"n_routed_experts": None, "num_local_experts": 8}, 12)
        for family in ("glm4_moe", "glm4_moe_lite", "deepseek_v3", "kimi_k2")
    },
    **{
        (family, "num_mtp_layers"): ({"num_nextn_predict_layers": None}, 2)
        for family in ("glm4_moe", "glm4_moe_lite", "deepseek_v3", "kimi_k2")
    },
    # Where groups count as much as their best expert, they matter only if fewer are chosen than experts.
    ("deepseek_v2", "n_group"): ({"topk_group": 1}, 2),
    ("deepseek_v2", "topk_group"): ({}, 1),
    ("deepseek_v2", "topk_method"): ({"topk_group": 1}, "greedy"),
    ("glm4_moe_lite", "num_hidden_layers"): ({"mlp_layer_types": None}, 5),
    ("granitemoehybrid", "layers_block_type"): ({}, HYBRID["layer_types"]),
    **{("granitemoehybrid", name): (HYBRID, value) for name, value in GRANITE_4.items()},
    ("minimax_m2", "rotary_dim"): ({"partial_rotary_factor": None}, 8),
    ("qwen", "use_logn_attn"): ({"use_dynamic_ntk": False}, True),  # either of the two ends the context at seq_length
    ("qwen", "rotary_emb_base"): ({"rope_theta": None}, 7.0),
    **{(f"qwen2{v}_vl", "hidden_size"): ({}, 24) for v in ("", "_5")},  # heads of another even size
    **{(f"qwen2{v}_vl", "num_attention_heads"): ({}, 2) for v in ("", "_5")},
    ("ministral3", "rope_parameters"): ({}, MINISTRAL_ROPE),
    ("ministral3", "rope_scaling"): ({}, MINISTRAL_ROPE),
    ("ministral3", "rope_theta"): ({"rope_scaling": MINISTRAL_ROPE}, 7.0),
    ("ministral3", "max_position_embeddings"): ({}, 10**6),  # the class's own rope stretches to 262144
    ("cwm", "rope_theta"): ({"rope_scaling": {"rope_type": "default"}}, 7.0),  # the class's own rope has its own
    ("olmo3", "rope_parameters"): ({}, {"full_attention": {"rope_type": "default", "rope_theta": 7.0}}),
    ("olmo3", "rope_scaling"): ({}, {"rope_type": "linear", "factor": 2.0}),
    ("gemma3_text", "rope_parameters"): ({}, {"sliding_attention": {"rope_type": "default", "rope_theta": 7.0}}),
    ("gemma3_text", "rope_scaling"): ({}, {"rope_type": "linear", "factor": 2.0}),
    ("gemma4_text", "rope_parameters"): ({}, {"sliding_attention": {"rope_type": "default", "rope_theta": 7.0}}),
    ("gemma4_text", "num_kv_shared_layers"): ({"layer_types": GEMMA4_TYPES, "num_kv_shared_layers": 1}, 2),
    ("gemma4_text", "use_double_wide_mlp"): (
        {"layer_types": GEMMA4_TYPES, "num_kv_shared_layers": 1, "enable_moe_block": False},
        True,
    ),
    ("phi3", "rope_scaling"): ({}, LONG_ROPE),
    ("falcon_h1", "mamba_d_ssm"): ({}, 32),
    ("falcon_h1", "mamba_expand"): ({"mamba_d_ssm": None}, 3),
    ("falcon_h1", "mamba_n_heads"): ({}, 8),
    ("falcon_h1", "mamba_n_groups"): ({}, 4),
    **{("nemotron_h", name): NEMOTRON_H for name in ("layers_block_type", "layer_types")},
    ("nemotron_h", "mamba_num_heads"): ({}, 8),
    ("nemotron_h", "mamba_n_groups"): ({}, 4),
    ("nemotron_h", "n_groups"): ({"mamba_n_groups": None, "mamba_num_heads": 8}, 4),
    ("nemotron_h", "conv_kernel"): ({"mamba_d_conv": None}, 3),
    ("nemotron_h", "use_conv_bias"): ({"mamba_conv_bias": None}, False),
    ("nemotron_h", "mamba_dt_min"): ({}, 0.7),
    ("nemotron_h", "num_local_experts"): ({"n_routed_experts": None, "num_local_experts": 8}, 12),
    ("phi3", "original_max_position_embeddings"): ({"rope_scaling": LONG_ROPE}, 5),
    ("llama4_text", "layer_types"): ({}, ["chunked_attention"] * 4),
    ("llama4_text", "interleave_moe_layer_step"): ({}, 4),
    ("lfm2", "layer_types"): ({}, ["conv", "full_attention"] * 2),
    ("lfm2", "intermediate_size"): ({}, 40),
    ("lfm2", "conv_L_cache"): ({"full_attn_idxs": [1]}, 4),
    ("lfm2", "conv_bias"): ({"full_attn_idxs": [1]}, False),
    ("lfm2_moe", "layer_types"): ({}, ["conv"] * 4),
}
NEEDED = {
    "granitemoehybrid": {"mamba_n_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
}
LEFT_OUT = {
    "falcon_h1": {"mamba_d_head"},  # as in Granite 4
    "nemotron_h": {"attention_head_dim"},  # which counts where there is no head_dim
    "granitemoehybrid": {"mamba_d_head"},  # which can only say what others say together
    "deepseek_v2": {"num_experts"},  # another name of n_routed_experts, which these attributes give, too
    "lfm2_moe": {"num_hidden_layers"},  # which must be as many as its layer_types
    "olmo3": {"rope_theta"},  # which versions of transformers read differently, unless rope_parameters repeats it
    **{f"qwen2{v}_vl": {"head_dim"} for v in ("", "_5")},  # which the class does not hand on to its text part
}
WRAPPED = {  # text parts inside others
    "gemma3",
    "gemma4",
    "gemma4_unified",
    "llama4",
    "qwen3_vl",
    "kimi_k25",
    "mistral3",
    "qwen3_5",
    "qwen3_5_moe",
}
FAMILIES = sorted(set(READERS) - WRAPPED)


def other_value(name: str, value):
    if name in OTHER_VALUE:
        return OTHER_VALUE[name]
    return not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value * 1.5


@functools.cache
def program(cfg: ModelConfig) -> str:
    """Returns what a model of this config computes, without what no output needs: its text, constants among it."""
    decoder = Decoder.abstract(dataclasses.replace(cfg, family="", context_length=0), jnp.float32, None)
    tokens, mask = np.zeros((2, 8), np.int32), np.ones((2, 8), bool)
    edits = Edits.none(cfg.d_model).for_batch(2, cfg.n_layers, cfg.d_model)
    return predict.lower(decoder, tokens, mask, edits, taps=Taps(), last=False).as_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_handled_attribute_changes_shapes_or_the_program(family):
    reader = Reader(SMALL | ON | {"model_type": family}, "")
    READERS[family](reader)
    taken = reader.seen - LEFT_OUT.get(family, set())
    base = {name: value for name, value in (SMALL | ON).items() if name in taken} | {"model_type": family}
    base |= NEEDED.get(family, {})
    shapes = functools.cache(hf_shapes)
    assert not (reader.seen | reader.fixed | reader.ignored) & INERT  # nothing is both handled and inert
    for name in reader.fixed:
        with pytest.raises(UserError, match=f"{name} = 'other' is not supported"):
            from_hf(base | {name: "other"})
    for name in sorted(taken):
        more, value = OF_FAMILY.get((family, name)) or ({}, other_value(name, base.get(name)))
        before, after = from_hf(base | more), from_hf(base | more | {name: value})
        if before.draft_layers != after.draft_layers:
            continue  # which no output shows: it says what tensors may be there besides
        if shapes(before) == shapes(after) and before.context_length == after.context_length:
            assert program(before) != program(after), (name, value)


def test_every_config_field_is_read_by_some_family():
    """And has another value somewhere than it has in most places: no switch is only declared."""
    seen = {}
    for family in FAMILIES:
        for attributes in (SMALL, SMALL | ON):
            cfg = read(family, attributes)
            for field in dataclasses.fields(cfg):
                seen.setdefault(field.name, set()).add(getattr(cfg, field.name))
    switches = {field.name for field in dataclasses.fields(ModelConfig) if field.default is not dataclasses.MISSING}
    assert all(len(seen[name]) > 1 for name in switches)


def read(family: str, attributes: dict) -> ModelConfig:
    """The config of a family from those of the attributes that it knows."""
    reader = Reader(attributes | {"model_type": family}, "")
    READERS[family](reader)
    taken = reader.seen - LEFT_OUT.get(family, set())
    known = {name: value for name, value in attributes.items() if name in taken}
    return from_hf(known | {"model_type": family} | NEEDED.get(family, {}))


WHOLE_ROPES = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "proportional": {"factor": 2.0, "partial_rotary_factor": 0.5},
    "llama3": LLAMA3_ROPE | {"original_max_position_embeddings": 16},
    "yarn": {
        "factor": 4.0,
        "beta_fast": 2.0,
        "beta_slow": 0.5,
        "truncate": False,
        "original_max_position_embeddings": 40,
    },
    "yarn-scaled": {"factor": 4.0, "attention_factor": 1.2, "original_max_position_embeddings": 12},
    "yarn-mscale": {"factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.4, "original_max_position_embeddings": 12},
    "longrope": {
        "factor": 3.0,
        "attention_factor": 1.2,
        "short_factor": [1.0, 2.0] * 8,
        "long_factor": [5.0, 6.0] * 8,
        "original_max_position_embeddings": 18,
    },
}
PARTS = [(kind, part) for kind, spec in WHOLE_ROPES.items() for part in spec if part != "rope_type"]


@pytest.mark.parametrize("kind,part", PARTS)
def test_every_part_of_a_rope_changes_the_angles(kind, part):
    base = WHOLE_ROPES[kind] | {"rope_type": kind.split("-")[0]}
    if kind == "longrope" and part == "factor":
        del base["attention_factor"]  # whose default it is
    value = base[part]
    value = not value if isinstance(value, bool) else [1.5 * v for v in value] if isinstance(value, list) else 2 * value
    shape = {"max_position_embeddings": 20, "head_dim": 32, "rope_theta": 50.0}
    tables = [
        from_hf(hf(rope_scaling=spec, **shape)).kinds[0].rope.tables(np.arange(length)[None])
        for spec in (base, base | {part: value})
        for length in (17, 30)
    ]
    assert any(
        np.abs(np.asarray(a) - np.asarray(b)).max() > 1e-3 for i in (0, 1) for a, b in zip(*tables[i::2], strict=True)
    )


@pytest.mark.parametrize(
    "name,value", [("sliding_window", 4096), ("clip_qkv", 8.0), ("partial_rotary_factor", 0.5), ("new_norm", "on")]
)
def test_an_unknown_attribute_is_an_error_that_names_it(name, value):
    with pytest.raises(UserError, match=rf"cannot be run faithfully: {name} = {value!r} is not supported.*\. Nothing"):
        from_hf(hf(**{name: value}))


@pytest.mark.parametrize(
    "pattern,window,windowed", [("LLG", 3, "11010"), (2, 3, "10101"), (None, 3, "00000"), ("LLG", None, "00000")]
)
def test_patterns_of_windows(pattern, window, windowed):
    """EXAONE 4's, in all the ways in which its configs spell them; without a window all layers have a rope."""
    hf = {"model_type": "exaone4", "sliding_window": window, "sliding_window_pattern": pattern, "num_hidden_layers": 5}
    cfg = from_hf({name: value for name, value in BASE.items() if "bias" not in name} | hf)
    kinds = [cfg.kinds[kind] for kind in cfg.layer_kinds]
    assert [kind.window for kind in kinds] == [3 if flag == "1" else None for flag in windowed]
    assert [kind.rope.kind for kind in kinds] == [
        "default" if not window or flag == "1" else "none" for flag in windowed
    ]


@pytest.mark.parametrize("value", [None, False, {}, []])
def test_an_unknown_attribute_that_is_off_is_accepted(value):
    assert from_hf(BASE | {"sliding_window": value}) == from_hf(BASE)


def test_inert_attributes_change_nothing():
    assert from_hf({name: "anything" for name in INERT} | BASE) == from_hf(BASE)


def test_defaults_are_those_of_transformers():
    from transformers import LlamaConfig

    bare = {"model_type": "llama", "vocab_size": 100, "hidden_size": 64, "num_attention_heads": 4}
    bare |= {"num_hidden_layers": 2, "intermediate_size": 96}
    whole = LlamaConfig(**{k: v for k, v in bare.items() if k != "model_type"}).to_dict()
    assert from_hf(bare) == from_hf(whole)


def test_both_spellings_of_rope_agree():
    old = from_hf(hf(rope_theta=500000.0, rope_scaling=LLAMA3_ROPE))
    new = from_hf(hf(rope_theta=None, rope_parameters=LLAMA3_ROPE | {"rope_theta": 500000.0}))
    assert old == new
    blend = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert old.kinds[0].rope == Rope(500000.0, 8, "llama3", 8.0, 8192, **blend)
    linear = from_hf(hf(rope_scaling={"type": "linear", "factor": 4})).kinds[0].rope
    assert (linear.kind, linear.factor, linear.theta) == ("linear", 4.0, 10000.0)


BAD = {
    "branches": (
        {"model_type": "qwen", "intermediate_size": 97},
        "intermediate_size = 97 is odd, but counts two branches",
    ),
    "not-causal": ({"is_causal": False}, "is_causal = False is not supported .only True is"),
    "infinite": ({"rms_norm_eps": math.inf}, "rms_norm_eps = inf, expected a positive number"),
    "rope-type": ({"rope_scaling": {"type": ["x"]}}, r"rope_scaling type \['x'\] is not supported"),
    "rope-span": (
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1}},
        "rope_scaling of type 'yarn' has original_max_position_embeddings = 1.0, expected a number of tokens",
    ),
    "rope-stretch": (
        {"rope_scaling": {"type": "yarn", "factor": 1e30}},
        "stretches 512.* tokens 1e.30 times, expected",
    ),
    "rope-new": ({"rope_parameters": {"rope_type": "ntk"}}, "rope_parameters type 'ntk' is not supported"),
    "types-of-types": ({"model_type": "qwen2", "layer_types": [["x"]] * 4}, "layer_types = .*for each of 4 layers"),
    "ropes-object": (
        {"model_type": "gemma3_text", "rope_parameters": "x"},
        "rope_parameters = 'x', expected an object",
    ),
    "gemma4-window": (
        {"model_type": "gemma4_text", "num_kv_shared_layers": 1},
        "num_kv_shared_layers = 1, expected that of each kind of the 4 layers at least one has keys and values of its own",
    ),
    "gemma4-all-shared": (
        {"model_type": "gemma4_text", "num_kv_shared_layers": 4},
        "num_kv_shared_layers = 4, expected",
    ),
    "gemma4-heads": (
        {"model_type": "gemma4_text", "attention_k_eq_v": True, "num_global_key_value_heads": 3},
        "num_attention_heads = 8 is not a multiple of the 3 key/value heads of full layers",
    ),
    "gemma4-layers": (
        {"model_type": "gemma4_text", "per_layer_config": {"2": {"head_dim": 4}}},
        r"per_layer_config = .* expected the same attributes for each of the layers \[3\], which have no window, and for ot",
    ),
    "gemma4-no-layer": (
        {"model_type": "gemma4_text", "per_layer_config": {"x": 3}},
        "per_layer_config = .* expected the",
    ),
    "gemma4-layer-size": (
        {"model_type": "gemma4_text", "per_layer_config": {"03": {"head_dim": "x", "skip": ["mlp"]}}},
        "per_layer_config: head_dim = 'x', expected a positive integer; per_layer_config: skip = .* is not supported",
    ),
    "gemma4-ropes": (
        {"model_type": "gemma4_text", "rope_parameters": {"rope_theta": 5.0}},
        "rope_parameters.rope_theta = 5.0 is not supported",
    ),
    "gemma4-experts": (
        {"model_type": "gemma4_text", "enable_moe_block": True, "num_experts": 2, "top_k_experts": 3},
        "moe_intermediate_size is missing; top_k_experts = 3 is more than the 2 experts",
    ),
    "gemma4-wide-experts": (
        {
            "model_type": "gemma4_text",
            "enable_moe_block": True,
            "use_double_wide_mlp": True,
            "num_kv_shared_layers": 1,
            "layer_types": GEMMA4_TYPES,
        },
        "use_double_wide_mlp = True is not supported with enable_moe_block = True",
    ),
    "gemma4-both-ways": (
        {"model_type": "gemma4_text", "use_bidirectional_attention": "all"},
        "use_bidirectional_attention = 'all' is not supported",
    ),
    "ropes-scaling": ({"model_type": "gemma3_text", "rope_scaling": [1]}, r"rope_scaling = \[1\], expected an object"),
    "ropes-full": ({"model_type": "gemma3_text", "rope_parameters": {"full_attention": 3}}, "= 3, expected an object"),
    "ropes-base": (
        {"model_type": "olmo3", "rope_theta": 1e4, "sliding_window": 3},
        "rope_theta = 10000.0 is read differently by versions of transformers .5 keeps 500000.0 in layers with a window",
    ),
    "ropes-growth": (
        {"model_type": "ministral3", "rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
        "lacks or misstates llama_4_scaling_beta or original_max_position_embeddings",
    ),
    "cap": (
        {"model_type": "gemma3_text", "attn_logit_softcapping": 2.0},
        "attn_logit_softcapping = 2.0 is not supported",
    ),
    "activations": (
        {"model_type": "gemma", "hidden_activation": "relu"},
        "hidden_activation = 'relu' is not supported",
    ),
    "two-names": (
        {"model_type": "mixtral", "num_experts": 4, "num_local_experts": 6},
        "num_experts = 4 and num_local_experts = 6 disagree",
    ),
    "least": (
        {"model_type": "qwen2", "max_window_layers": -1},
        "max_window_layers = -1, expected an integer from 0 up",
    ),
    "layer-types": (
        {"model_type": "gemma2", "layer_types": ["full_attention"]},
        "layer_types = .*for each of 4 layers",
    ),
    "roped-layers": (
        {"model_type": "smollm3", "no_rope_layers": [1, 2, 0, 1]},
        r"no_rope_layers = \[1, 2, 0, 1\], expected 0 or 1 for each of 4 layers",
    ),
    "chunked-layers": (
        {"model_type": "llama4_text", "layer_types": ["sliding_attention"] * 4},
        "layer_types = .*, expected 'full_attention' or 'chunked_attention' for each of 4 layers",
    ),
    "rope-flags": (
        {"model_type": "llama4_text", "no_rope_layers": [1]},
        r"no_rope_layers = \[1\], expected 0 or 1 for",
    ),
    "sparse-layers": ({"model_type": "llama4_text", "moe_layers": 2}, "moe_layers = 2, expected a list of layers"),
    "tuning": (
        {"model_type": "llama4_text", "attn_temperature_tuning": "on"},
        "attn_temperature_tuning = 'on', expected",
    ),
    "conv-layers": (
        {"model_type": "lfm2", "layer_types": ["conv", "mamba"]},
        "layer_types = .*, expected 'conv' or 'full_attention' for each of 4 layers",
    ),
    "conv-lacks-layers": ({"model_type": "lfm2_moe"}, "layer_types is missing"),
    "attending-layers": ({"model_type": "lfm2", "full_attn_idxs": 2}, "full_attn_idxs = 2, expected a list of layers"),
    "one-tap": ({"model_type": "lfm2", "conv_L_cache": 1}, "conv_L_cache = 1, expected an integer from 2 up"),
    "pattern": (
        {"model_type": "exaone4", "sliding_window_pattern": "LxG"},
        "sliding_window_pattern = 'LxG', expected a number or a text such as 'LLLG'",
    ),
    "no-window": (
        {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 4},
        "sliding_window is null, but there",
    ),
    "experts": (
        {"model_type": "mixtral", "num_experts_per_tok": 9},
        "num_experts_per_tok = 9 is more than the 8 experts",
    ),
    "dense-layers": (
        {"model_type": "qwen3_moe", "mlp_only_layers": ["0"]},
        r"mlp_only_layers = \['0'\], expected a list of layers",
    ),
    "groups": ({"model_type": "glm4_moe", "n_group": 3}, "n_group = 3 and topk_group = 1 do not divide 128 experts"),
    "no-groups": (
        {"model_type": "deepseek_v2", "num_experts_per_tok": 2, "topk_method": "group_limited_greedy"},
        "n_group is missing; topk_group is missing",
    ),
    "no-choice": ({"model_type": "deepseek_v2"}, "num_experts_per_tok is missing"),
    "method": (
        {"model_type": "deepseek_v2", "topk_method": "noaux_tc"},
        r"topk_method = 'noaux_tc' is not supported \(greedy and group_limited_greedy are\)",
    ),
    "steepness": (
        {"model_type": "deepseek_v3", "rope_scaling": {"type": "yarn", "factor": 4.0, "mscale_all_dim": -1}},
        r"rope_scaling\.mscale_all_dim = -1, expected a positive number of ordinary size",
    ),
    "lite-as-v3": (
        {"model_type": "deepseek_v3", "scoring_func": "softmax"},
        "scoring_func = 'softmax' is not supported",
    ),
    "shared-heads": (
        {"model_type": "deepseek_v3"},
        r"num_key_value_heads = 4 is not supported \(only 8 is\)",
    ),
    "layers-with-experts": (
        {"model_type": "glm4_moe_lite", "mlp_layer_types": ["dense"] * 3},
        "mlp_layer_types = .*, expected 'dense' or 'sparse' for each of 4 layers",
    ),
    "open-groups": (
        {"model_type": "glm4_moe", "n_group": 64},
        "num_experts_per_tok = 8 is more than the experts of topk_group = 1 groups",
    ),
    "ropes": (
        {"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 1.0}},
        r"rope_parameters\.rope_theta = 1\.0",
    ),
    "missing": ({"hidden_size": None, "vocab_size": None}, "vocab_size is missing"),
    "missing-too": ({"hidden_size": None, "vocab_size": None}, "hidden_size is missing"),
    "integer": ({"num_hidden_layers": 2.5}, r"num_hidden_layers = 2\.5, expected a positive integer"),
    "boolean-as-integer": ({"intermediate_size": True}, "intermediate_size = True, expected a positive integer"),
    "zero": ({"num_attention_heads": 0}, "num_attention_heads = 0, expected a positive integer"),
    "number": ({"rms_norm_eps": "small"}, "rms_norm_eps = 'small', expected a positive number"),
    "nan": ({"rope_theta": math.nan}, "rope_theta = nan, expected a positive number"),
    "boolean": ({"attention_bias": "yes"}, "attention_bias = 'yes', expected true or false"),
    "activation": ({"hidden_act": "swish9"}, "hidden_act = 'swish9' is not one of silu, gelu"),
    "heads": ({"num_key_value_heads": 3}, "num_attention_heads = 8 is not a multiple of num_key_value_heads = 3"),
    "odd": ({"head_dim": 7}, "rope_scaling rotates 7 of head_dim = 7 entries, rotary embeddings need pairs"),
    "rope-kind": ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_scaling type 'ntk' is not supported"),
    "rope-partial": (
        {"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
        r"rope_scaling\.partial_rotary_factor = 0\.5 is not supported by this architecture",
    ),
    "rope-factors": (
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 4}},
        "rope_scaling of type 'longrope' lacks or misstates short_factor .must be 4 positive numbers",
    ),
    "rope-not-object": ({"rope_scaling": "linear"}, "rope_scaling = 'linear', expected an object"),
    "rope-attribute": (
        {"rope_scaling": {"type": "linear", "factor": 2.0, "alpha": 32}},
        r"rope_scaling\.alpha = 32 is not supported",
    ),
    "rope-lacks": ({"rope_scaling": {"type": "linear"}}, "rope_scaling of type 'linear' lacks or misstates factor"),
    "rope-misstates": (
        {"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": "x"}},
        "rope_scaling of type 'llama3' lacks or misstates high_freq_factor = 'x'",
    ),
    "rope-base-below-one": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 0.5}},
        "of type 'default' has rope_theta = 0.5, expected more than 1",
    ),
    "beyond-int32": ({"vocab_size": 10**12}, "expected a positive integer of at most 2,147,483,647"),
    "beyond-float32": ({"rms_norm_eps": 1e300}, "rms_norm_eps = 1e.300, expected a positive number"),
    "beyond-floats": ({"rope_theta": 10**400}, "rope_theta = 1000000000.*, expected a positive number"),
    "layers": ({"num_hidden_layers": 10**6}, "num_hidden_layers = 1000000, expected at most 10,000"),
    "experts-beyond": (
        {"model_type": "mixtral", "num_local_experts": 10**6},
        "1000000 experts in each layer, expected at most 100,000 in all",
    ),
    "long-text": ({"hidden_act": "x" * 10**5}, r"hidden_act = 'x{40,70}\.\.\.x{40,70}' is not one of"),
    "rope-base": ({"rope_parameters": {"rope_type": "default", "rope_theta": "big"}}, "rope_theta"),
    "rope-base-negative": ({"rope_parameters": {"rope_type": "default", "rope_theta": -5.0}}, "rope_theta"),
    "rope-factor-zero": ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
    "rope-no-blend": ({"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 0.5}}, "freq_factor"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values(name):
    changes, message = BAD[name]
    with pytest.raises(UserError, match=message):
        from_hf(hf(**changes), "here/config.json")


def test_all_problems_come_in_one_error():
    with pytest.raises(UserError) as error:
        from_hf(hf(hidden_size=None, hidden_act="?", clip_qkv=1.0, rope_scaling={"type": "ntk"}), "here/config.json")
    text = str(error.value)
    assert text.startswith("here/config.json cannot be run faithfully")
    assert all(part in text for part in ("hidden_size is missing", "hidden_act", "clip_qkv", "ntk"))


@pytest.mark.parametrize("model_type", ["mamba", None])
def test_unsupported_architecture(model_type):
    with pytest.raises(UserError, match=rf"model_type = {model_type!r}, which is not supported. Supported: .*llama"):
        from_hf(hf(model_type=model_type))


GROUPS = {"group_0": {"weights": {"num_bits": 4, "type": "int"}, "targets": ["Linear"]}}


@pytest.mark.parametrize(
    "value,found",
    [
        ("4bit", "it is '4bit', expected an object with a quant_method"),
        ({"quant_method": "hqq"}, "quant_method = 'hqq' is not supported"),
        (
            {"quant_method": "auto-round", "packing_format": "auto_round"},
            "quant_method = 'auto-round, auto_round' is not",
        ),
        ({"bits": 4}, "quant_method = None is not supported"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size = \[128\], expected two positive"),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "expert_dtype = 'fp4' is not supported"),
        (
            {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"},
            "quant_method = 'modelopt' with quant_algo = 'W4A8_AWQ' is not",
        ),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "af4"}, "bnb_4bit_quant_type = 'af4', expected nf4 or fp4"),
        ({"quant_method": "gptq", "bits": 5}, "bits = 5 of GPTQ, expected one of 2, 3, 4, 8"),
        ({"quant_method": "gptq", "bits": "4"}, "bits = '4' is no int"),
        (
            {"quant_method": "gptq", "bits": 4, "is_marlin_format": True},
            "checkpoint_format = 'marlin' is not supported",
        ),
        (
            {"quant_method": "awq", "version": "gemv_fast"},
            "AWQ with version = 'gemv_fast' and bits = 4, expected 4 bits",
        ),
        ({"quant_method": "awq", "backend": "ipex"}, "AWQ with backend = 'ipex' is not supported"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "format = 'marlin-24' of compressed-tensors"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "config_groups = None, expected an object",
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": GROUPS, "transform_config": {"a": 1}},
            r"transform_config = \{'a': 1\} is not supported",
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": GROUPS, "sparsity_config": {"format": "2:4"}},
            "sparsity_config with format = '2:4' is not supported",
        ),
    ],
)
def test_quantised_weights_that_cannot_be_read(value, found):
    with pytest.raises(
        UserError, match=f"The quantization_config of config.json cannot be read: {found}.*Use the orig"
    ):
        from_hf(hf(quantization_config=value))


@pytest.mark.parametrize(
    "value,what,activations",
    [
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            "fp8 with a scale for each block of 128 x 128",
            True,
        ),
        ({"quant_method": "fbgemm_fp8"}, "fp8 with a scale for each row", True),
        ({"quant_method": "modelopt", "quantization": {"quant_algo": "FP8"}}, "ModelOpt's fp8", True),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes nf4", False),
        ({"load_in_8bit": True, "load_in_4bit": False}, "bitsandbytes int8", True),
        ({"quant_method": "gptq", "bits": 3}, "GPTQ with 3 bits", False),
        ({"quant_method": "awq"}, "AWQ with 4 bits", False),
        (
            {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"},
            "GPTQ with 4 bits",
            False,
        ),
        ({"quant_method": "mxfp4"}, "mxfp4", False),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": GROUPS},
            r"compressed-tensors, pack-quantized \(packed integers\)",
            False,
        ),
    ],
)
def test_quantised_weights_change_nothing_else(value, what, activations):
    assert from_hf(hf(quantization_config=value)) == from_hf(hf())
    found = quantisation_of(
        {"text_config": {"compression_config": value}}
    )  # where older and multimodal configs have it
    assert re.match(f"The weights are dequantised from {what} as they are read.", found.note)
    assert ("runtime quantises activations too, which is not computed" in found.note) == activations


def test_the_note_of_a_quantised_cache():
    found = quantisation_of({"quantization_config": {"quant_method": "fp8", "kv_cache_scheme": "static"}})
    assert found.note.endswith("Nor is the cache of keys and values quantised, as it may be there.")


def test_the_text_part_of_a_multimodal_config():
    text = BASE | {"model_type": "gemma3_text", "tie_word_embeddings": True}
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {"depth": 3}, "image_token_index": 7}
    assert dataclasses.replace(from_hf(whole), family="gemma3_text") == from_hf(text)
    for broken in ({"model_type": "gemma3"}, whole | {"text_config": text | {"model_type": "llama"}}):
        with pytest.raises(UserError, match="has no text_config of model_type gemma3_text, which a gemma3 checkpoint"):
            from_hf(broken)
    outside = whole | {"sliding_window": 2}
    with pytest.raises(UserError, match="sliding_window = 2 is not supported"):  # it would not count in transformers
        from_hf(outside)
    said = text | {"sliding_window": 3, "rope_parameters": {"full_attention": {"rope_theta": 7.0}}}
    beside = outside | {"text_config": said, "rope_scaling": {"type": "mrope"}, "rope_theta": 3.0}
    assert from_hf(beside) == from_hf(
        whole | {"text_config": said}
    )  # what the text part says itself, nobody reads here
    assert from_hf(whole | {"hidden_size": 64, "layer_types": ["full_attention"], "audio_config": 3}) == from_hf(whole)


def test_not_a_checkpoint_folder(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a folder. Pass the folder of a Hugging Face checkpoint"):
        load_config(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no config\.json \(found: nothing\)"):
        load_config(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=r"has no config\.json \(found: notes\.txt\)"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "content,message",
    [
        (b'{"model_type": "llama"', "is not valid JSON"),
        (b"\xff\xfe{}", "is not valid JSON"),
        (b"[1, 2]", "holds a JSON list, expected an object"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "is not valid JSON .*digits.*If it was edited by hand, repair it"),
        (b'{"a": ' * 5000, r"is not valid JSON \(it is nested too deeply\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is not valid JSON .*run `git lfs pull`"),
        (b"<!DOCTYPE html><html></html>", "is not valid JSON .*It is a web page, .*log in"),
    ],
)
def test_damaged_config_file(content, message, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"config\.json {message}"):
        load_config(tmp_path)


@pytest.mark.parametrize("kind", ["a folder", "a link to no file", "a device or pipe"])
def test_a_config_that_is_no_file(kind, tmp_path):
    path = tmp_path / "config.json"
    {"a folder": path.mkdir, "a link to no file": lambda: path.symlink_to(path)}.get(kind, lambda: os.mkfifo(path))()
    with pytest.raises(UserError, match=rf"config\.json is {kind}, expected a file\. Remove it, and copy"):
        load_config(tmp_path)


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(pathlib.Path, "read_bytes", denied)
    with pytest.raises(UserError, match=r"config\.json could not be read \(Permission denied\)\. Check that you may"):
        load_config(tmp_path)


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "iterdir", denied)
    with pytest.raises(UserError, match=r"could not be read \(Permission denied\)\. Check that you may read it"):
        load_config(tmp_path)


def test_a_folder_of_an_adapter_alone(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    message = r"holds a PEFT adapter of 'org/base', not a model\. Merge the two:\n\n    from peft import"
    with pytest.raises(UserError, match=message) as caught:
        load_config(tmp_path)
    compile(textwrap.dedent(str(caught.value).partition("\n\n")[2]), "message", "exec")


def test_missing_json_file(tmp_path):
    with pytest.raises(UserError, match=r"config\.json does not exist. Point to a Hugging Face checkpoint folder"):
        read_json(tmp_path / "config.json")


def test_configs_written_by_transformers_load(tmp_path):
    folder = tiny.tiny_llama(tmp_path, rope="llama3", heads=4, kv_heads=1, head_dim=16)
    cfg, written = load_config(folder), json.loads((folder / "config.json").read_text())
    assert (cfg.n_heads, cfg.n_kv_heads, cfg.head_dim, cfg.vocab_size) == (4, 1, 16, written["vocab_size"])
    assert cfg.queries_per_kv == 4
    assert cfg.kinds[0].rope == Rope(1000.0, 16, "llama3", 8.0, 16, low_freq_factor=1.0, high_freq_factor=4.0)

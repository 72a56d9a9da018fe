"""Keys of config.json that no reader takes: what passes, what does not, and that transformers ignores whatever passes."""

import dataclasses
import importlib
import inspect
import logging
import re

import pytest
from test_config import BASE, hf

from refusal_jax import UserError
from refusal_jax.models import unread_keys
from refusal_jax.models.hf_attributes import Reader
from refusal_jax.models.hf_config import ITS_OWN_CODE, from_hf
from refusal_jax.models.hf_readers import READERS
from refusal_jax.models.unread_keys import INERT

KNOWN_TO_TRANSFORMERS = sorted(set(READERS) - ITS_OWN_CODE)
TOP_OF_MULTIMODAL = {"text_config", "vision_config", "get_text_config"}


def read_by_transformers(model_type: str) -> set[str]:
    """The keys that transformers' config class declares or takes apart, and those that its model reads; of a multimodal model
    its text part's."""
    from transformers import CONFIG_MAPPING

    whole = CONFIG_MAPPING[model_type]
    parts = whole.sub_configs_defaults
    config = parts["text_config"].get_config_class(parts["text_config"].model_type) if "text_config" in parts else whole
    names = {field.name for field in dataclasses.fields(config)}
    names |= set(re.findall(r'kwargs\.(?:pop|get)\(\s*"(\w+)"', inspect.getsource(config)))
    module = importlib.import_module(config.__module__.replace("configuration_", "modeling_"))
    code = inspect.getsource(module)
    names |= set(re.findall(r"(?<!vision_)\bconfig\.([a-z]\w*)\b(?!\()", code))
    names |= set(re.findall(r'getattr\((?:self\.)?config,\s*"(\w+)"', code))
    if "vision_config" in CONFIG_MAPPING[model_type.removesuffix("_text")].sub_configs_defaults:
        names -= TOP_OF_MULTIMODAL
        names &= {field.name for field in dataclasses.fields(config)}  # the file has the code of the vision part, too
    return names


@pytest.mark.parametrize("model_type", KNOWN_TO_TRANSFORMERS)
def test_every_key_that_transformers_reads_is_taken(model_type):
    reader = Reader(BASE | {"model_type": model_type}, "")
    READERS[model_type](reader)
    assert read_by_transformers(model_type) <= reader.seen | reader.fixed | reader.ignored | INERT


# Found in real files, where transformers' logits do not depend on them.
HARMLESS = {
    "llama": {
        "_model_name_or_path": "x.gguf",
        "model_name": "unsloth/x",
        "unsloth_anything": True,
        "group_size_ratio": 0.25,
        "internal_version": "v2",
        "attention_chunk_size": 8192,
        "original_max_position_embeddings": 8192,
        "moe_frequency": 2,
        "use_flash_attention": True,
        "eos_token": "</s>",
        "badwordsids": [3],
        "sparsity": 0.5,
        "k_codes": 4,
        "move_model_to_device": True,
        "num_layers": 4,
        "layer_norm_eps": 1e-6,
        "max_window_layers": 28,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_position_embeddings": 512.0,
        "hidden_act": "swish",
    },
    "qwen2": {"dual_chunk_attention_config": {"chunk_size": 262144}, "attention_bias": True},
    "qwen3_moe": {"use_qk_norm": True},
}


@pytest.mark.parametrize("model_type", HARMLESS)
def test_harmless_keys_pass(model_type):
    base = BASE | {"model_type": model_type, "attention_bias": None, "mlp_bias": None}
    assert from_hf(base | HARMLESS[model_type]) == from_hf(base)


def test_keys_that_pass_are_named_once(caplog):
    caplog.set_level(logging.INFO)
    for _ in range(2):
        from_hf(
            hf(internal_version="v2", rope_scaling={"type": "linear", "factor": 2.0, "finetuned": True}), "there/a.json"
        )
    assert [record.message for record in caplog.records] == [
        "there/a.json has keys that its architecture does not read in transformers either: internal_version, "
        "rope_scaling.finetuned. They change nothing."
    ]


@pytest.mark.parametrize(
    "spec",
    [
        {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64},
        {"type": "linear", "factor": 2.0, "original_max_position_embeddings": 64, "max_position_embeddings": 32},
        {"type": "default", "factor": 4.0},
        {"type": "yarn", "factor": 4.0, "finetuned": True, "attn_factor": 0.8782488562869419},
    ],
)
def test_parts_of_a_rope_that_its_kind_does_not_read_pass(spec):
    unread = {"max_position_embeddings", "finetuned", "attn_factor"}
    unread |= {"yarn": set(), "default": {"factor"}}.get(spec["type"], {"original_max_position_embeddings"})
    assert from_hf(hf(rope_scaling=spec)) == from_hf(
        hf(rope_scaling={name: value for name, value in spec.items() if name not in unread})
    )


@pytest.mark.parametrize(
    "keys,message",
    [
        ({"rope_interval": 4}, "rope_interval = 4 is not supported"),
        ({"layer_window": 4}, "layer_window = 4 is not supported"),
        ({"norm_type": "layernorm"}, "norm_type = 'layernorm' is not supported"),
        ({"gated_attention": True}, "gated_attention = True is not supported"),
        ({"draft_vocab_size": 32000}, "draft_vocab_size = 32000 is not supported"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not supported"),
        ({"n_head": 16}, "n_head = 16 contradicts num_attention_heads = 8"),
        (
            {"architectures": ["LlamaForCausalLMEagle3"]},
            "architectures = 'LlamaForCausalLMEagle3' is another model than",
        ),
        ({"model_type": "qwen", "new_thing": 3}, "new_thing = 3 is not supported"),
        (
            {"model_type": "qwen", "rope_theta": 1e6, "rotary_emb_base": 1e4},
            "rope_theta = 1000000.0 disagrees with rotary_emb_",
        ),
        (
            {"model_type": "qwen", "rope_scaling": {"type": "linear"}},
            r"rope_scaling = .* is not supported \(only None is\)",
        ),
        (
            {"model_type": "gemma3_text", "rope_scaling": {"type": "linear", "factor": 8.0}},
            "rope_scaling = .* is read differently by versions of transformers: 4 scales by it, 5 does not",
        ),
        ({"quantization": {"bits": 4}}, "quantization = {'bits': 4} is not supported"),
        ({"model_type": "qwen2_vl", "head_dim": 16}, "head_dim = 16 is not supported"),
        ({"model_type": "qwen3_moe", "use_qk_norm": False}, "use_qk_norm = False is not supported"),
    ],
)
def test_words_of_architecture_do_not_pass(keys, message):
    with pytest.raises(UserError, match=message):
        from_hf(hf(**keys))


@pytest.mark.parametrize("name", ["normalize_text", "navigate", "aggregate_logs", "ahead"])
def test_words_that_only_look_like_architecture(name):
    assert not unread_keys.problem(name, 1, {})

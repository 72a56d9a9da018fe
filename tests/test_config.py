"""The allow-list over HF configs, and the parameter counts of real models, without their memory."""

import json
import math

import jax
import pytest
import tiny

from refusal_jax import Edits, UserError
from refusal_jax.chat_model import _forward
from refusal_jax.models import config as config_module
from refusal_jax.models.config import INERT, ModelConfig, Rope, from_hf, load_config
from refusal_jax.models.decoder import Decoder, weight_table
from refusal_jax.models.families import hf_slots
from refusal_jax.taps import TAP_SITES, Taps

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
PERTURBED = {
    "vocab_size": 1001,
    "hidden_size": 72,
    "num_hidden_layers": 5,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 97,
    "max_position_embeddings": 513,
    "hidden_act": "relu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
    "tie_word_embeddings": True,
    "attention_bias": True,
    "mlp_bias": True,
}


def hf(**changes) -> dict:
    return {key: value for key, value in (BASE | changes).items() if value is not None}


@pytest.mark.parametrize("name", PERTURBED)
def test_every_handled_attribute_changes_the_config(name):
    assert from_hf(hf(**{name: PERTURBED[name]})) != from_hf(BASE)


def test_the_list_of_handled_attributes_is_whole():
    reader = config_module._Reader(BASE, "")
    config_module._llama(reader)
    assert reader.seen == set(PERTURBED)
    assert not reader.seen & INERT  # nothing is both handled and ignored


def test_every_config_field_is_read_from_some_attribute():
    base = from_hf(BASE)
    changed = {
        field
        for name, value in PERTURBED.items()
        for field in ModelConfig.__dataclass_fields__
        if getattr(from_hf(hf(**{name: value})), field) != getattr(base, field)
    }
    assert changed == set(ModelConfig.__dataclass_fields__) - {"family"}


@pytest.mark.parametrize("part", [k for k in LLAMA3_ROPE if k != "rope_type"])
def test_every_part_of_a_rope_changes_the_frequencies(part):
    base = LLAMA3_ROPE | {"original_max_position_embeddings": 16}
    changed = base | {part: base[part] * 2}
    ropes = [from_hf(hf(rope_scaling=spec, head_dim=32)).rope for spec in (base, changed)]
    assert ropes[0].inverse_frequencies(32) != ropes[1].inverse_frequencies(32)


@pytest.mark.parametrize(
    "name,value", [("sliding_window", 4096), ("clip_qkv", 8.0), ("partial_rotary_factor", 0.5), ("new_thing", "on")]
)
def test_an_unknown_attribute_is_an_error_that_names_it(name, value):
    with pytest.raises(UserError, match=rf"cannot be run faithfully: {name} = {value!r} is not supported\. Nothing"):
        from_hf(hf(**{name: value}))


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
    assert old.rope == Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    assert from_hf(hf(rope_scaling={"type": "linear", "factor": 4})).rope == Rope(10000.0, "linear", 4.0)


BAD = {
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
    "odd": ({"head_dim": 7}, "head_dim = 7 is odd, rotary embeddings need pairs"),
    "rope-kind": ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling type 'yarn' is not supported"),
    "rope-not-object": ({"rope_scaling": "linear"}, "rope_scaling = 'linear', expected an object"),
    "rope-attribute": (
        {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}},
        r"rope_scaling\.beta_fast = 32 is not supported",
    ),
    "rope-lacks": ({"rope_scaling": {"type": "linear"}}, "rope_scaling of type 'linear' lacks or misstates 'factor'"),
    "rope-misstates": (
        {"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": "x"}},
        "rope_scaling of type 'llama3' lacks or misstates high_freq_factor = 'x'",
    ),
    "rope-base": ({"rope_parameters": {"rope_type": "default", "rope_theta": "big"}}, "rope_theta"),
    "rope-base-negative": ({"rope_parameters": {"rope_type": "default", "rope_theta": -5.0}}, "rope_theta"),
    "rope-factor-zero": ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
    "rope-no-blend": ({"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1.0}}, "freq_factor"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values(name):
    changes, message = BAD[name]
    with pytest.raises(UserError, match=message):
        from_hf(hf(**changes), "here/config.json")


def test_all_problems_come_in_one_error():
    with pytest.raises(UserError) as error:
        from_hf(hf(hidden_size=None, hidden_act="?", clip_qkv=1.0, rope_scaling={"type": "yarn"}), "here/config.json")
    text = str(error.value)
    assert text.startswith("here/config.json cannot be run faithfully")
    assert all(part in text for part in ("hidden_size is missing", "hidden_act", "clip_qkv", "yarn"))


@pytest.mark.parametrize("model_type", ["mamba", None])
def test_unsupported_architecture(model_type):
    with pytest.raises(UserError, match=rf"model_type = {model_type!r}, which is not supported. Supported: .*llama"):
        from_hf(hf(model_type=model_type))


@pytest.mark.parametrize("value,method", [({"quant_method": "gptq", "bits": 4}, "gptq"), ("4bit", "unknown")])
def test_quantised_weights(value, method):
    with pytest.raises(UserError, match=f"quantised with '{method}', which cannot be edited exactly"):
        from_hf(hf(quantization_config=value))


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
    ],
)
def test_damaged_config_file(content, message, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"config\.json {message}"):
        load_config(tmp_path)


def test_missing_json_file(tmp_path):
    with pytest.raises(UserError, match=r"config\.json does not exist. Point to a Hugging Face checkpoint folder"):
        config_module.read_json(tmp_path / "config.json")


def test_configs_written_by_transformers_load(tmp_path):
    folder = tiny.tiny_llama(tmp_path, rope="llama3", heads=4, kv_heads=1, head_dim=16)
    cfg, written = load_config(folder), json.loads((folder / "config.json").read_text())
    assert (cfg.n_heads, cfg.n_kv_heads, cfg.head_dim, cfg.vocab_size) == (4, 1, 16, written["vocab_size"])
    assert cfg.queries_per_kv == 4
    assert cfg.rope == Rope(1000.0, "llama3", 8.0, 1.0, 4.0, 16)


def llama(vocab, d, layers, heads, kv, mlp, context, **more) -> dict:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "vocab_size": vocab,
        "hidden_size": d,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": mlp,
        "max_position_embeddings": context,
        **more,
    }


SMALL_ROPE = LLAMA3_ROPE | {"factor": 32.0}
PUBLISHED = {
    "Llama-2-7b": (llama(32000, 4096, 32, 32, 32, 11008, 4096), 6_738_415_616),
    "Llama-2-13b": (llama(32000, 5120, 40, 40, 40, 13824, 4096), 13_015_864_320),
    "Llama-2-70b": (llama(32000, 8192, 80, 64, 8, 28672, 4096), 68_976_648_192),
    "Llama-3-8b": (llama(128256, 4096, 32, 32, 8, 14336, 8192, rope_theta=5e5), 8_030_261_248),
    "Llama-3-70b": (llama(128256, 8192, 80, 64, 8, 28672, 8192, rope_theta=5e5), 70_553_706_496),
    "Llama-3.1-8b": (
        llama(128256, 4096, 32, 32, 8, 14336, 131072, rope_theta=5e5, rope_scaling=LLAMA3_ROPE),
        8_030_261_248,
    ),
    "Llama-3.2-1b": (
        llama(
            128256,
            2048,
            16,
            32,
            8,
            8192,
            131072,
            head_dim=64,
            rope_theta=5e5,
            rope_scaling=SMALL_ROPE,
            tie_word_embeddings=True,
        ),
        1_235_814_400,
    ),
    "Yi-6b": (llama(64000, 4096, 32, 32, 4, 11008, 4096, rope_theta=5e6), 6_061_035_520),
    "Yi-34b": (llama(64000, 7168, 60, 56, 8, 20480, 4096, rope_theta=5e6), 34_388_917_248),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_of_real_models(name):
    attributes, count = PUBLISHED[name]
    cfg = from_hf(attributes)
    shapes = jax.eval_shape(lambda key: Decoder.init(cfg, key).weights(), jax.random.key(0))
    assert {path: a.shape for path, a in shapes.items()} == {path: w.shape for path, w in weight_table(cfg).items()}
    assert sum(math.prod(a.shape) for a in shapes.values()) == count
    assert sum(math.prod(slot.shape) for slot in hf_slots(cfg).values()) == count


@pytest.mark.parametrize("name", ["Llama-2-70b", "Llama-3.2-1b"])
def test_the_forward_pass_of_real_models_has_the_right_shapes(name):
    cfg = from_hf(PUBLISHED[name][0])
    decoder = jax.eval_shape(lambda key: Decoder.init(cfg, key, jax.numpy.bfloat16), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((2, 16), jax.numpy.int32)
    mask = jax.ShapeDtypeStruct((2, 16), bool)
    edits = Edits.none(cfg.d_model).for_batch(2, cfg.n_layers, cfg.d_model)
    logits, taps = jax.eval_shape(
        lambda d, t, m, e: _forward(d, t, m, e, taps=Taps(TAP_SITES, 5), last=True), decoder, tokens, mask, edits
    )
    assert logits.shape == (2, cfg.vocab_size) and logits.dtype == jax.numpy.float32
    for tapped in taps.values():
        assert tapped.shape == (cfg.n_layers, 2, 5, cfg.d_model) and tapped.dtype == jax.numpy.bfloat16

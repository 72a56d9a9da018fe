"""Every real checkpoint's config is read, and gives the published number of parameters, without their memory."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from families import CODE_OF
from real_models import REAL_MODELS

from refusal_jax import Edits
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.families import hf_shapes
from refusal_jax.models.generate import admit, decode, empty
from refusal_jax.models.hf_config import from_hf
from refusal_jax.models.hf_readers import READERS
from refusal_jax.models.predict import predict
from refusal_jax.models.structure import structure
from refusal_jax.models.weights import weight_table
from refusal_jax.taps import RESIDUAL_SITES, Taps

BY_TYPE = {real.config["model_type"]: name for name, real in REAL_MODELS.items()}  # one of each family, the last listed
KNOWN_TO_TRANSFORMERS = [name for name, real in REAL_MODELS.items() if real.config["model_type"] != "qwen"]


def total(shapes) -> int:
    return sum(map(math.prod, shapes))


def hf_config(name: str, whole: bool = False):
    """Transformers' config of a model; of its text part, if it has several and the whole is not wanted."""
    from transformers import CONFIG_MAPPING

    config = REAL_MODELS[name].config
    kind = CODE_OF.get(config["model_type"], config["model_type"])
    config = CONFIG_MAPPING[kind].from_dict(config | {"model_type": kind})
    return config if whole else getattr(config, "text_config", config)


def has_rope(attention) -> bool:
    """Returns whether a layer's own code rotates its queries and keys, which families write in ways of their own."""
    if hasattr(attention, "is_sliding") and hasattr(attention, "sliding_window_pattern"):  # EXAONE 4
        return attention.sliding_window is None or attention.is_sliding
    if type(attention).__name__ == "Cohere2Attention":
        return attention.sliding_window is not None
    return bool(getattr(attention, "use_rope", True))


@functools.cache
def hf_model(name: str):
    """Transformers' own model, without the memory of its weights; the language model only."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    with torch.device("meta"):
        if type(hf_config(name)) in MODEL_FOR_CAUSAL_LM_MAPPING:
            return AutoModelForCausalLM.from_config(hf_config(name))
        whole, text = AutoModelForImageTextToText.from_config(hf_config(name, whole=True)), torch.nn.Module()
        text.model, text.lm_head = whole.model.language_model, whole.lm_head
        return text


def test_every_family_has_a_real_model():
    assert set(BY_TYPE) == set(READERS)


@pytest.mark.parametrize("name", REAL_MODELS)
def test_parameter_counts_of_real_models(name):
    cfg, count = from_hf(REAL_MODELS[name].config, name), REAL_MODELS[name].parameters
    weights = jax.eval_shape(lambda key: Decoder.init(cfg, key).weights(), jax.random.key(0))
    assert {path: a.shape for path, a in weights.items()} == {path: w.shape for path, w in weight_table(cfg).items()}
    assert total(a.shape for a in weights.values()) == count
    assert total(hf_shapes(cfg).values()) == count


@pytest.mark.parametrize("name", KNOWN_TO_TRANSFORMERS)
def test_transformers_has_the_same_tensors(name):
    """Of mixtures only their number, as transformers fuses experts that the hub keeps apart."""
    cfg, model = from_hf(REAL_MODELS[name].config, name), hf_model(name)
    found, kept = dict(model.named_parameters()), ("_correction_bias", "expert_bias", "layer_scalar")
    found |= {n: buffer for n, buffer in model.named_buffers() if n.endswith(kept)}  # a tied matrix counts once
    assert sum(p.numel() for p in found.values()) == REAL_MODELS[name].parameters
    if not cfg.sparse_layers:
        theirs = {tensor: tuple(p.shape) for tensor, p in found.items()}
        ours = {t.replace("language_model.", "").replace("backbone.", "model."): s for t, s in hf_shapes(cfg).items()}
        assert ours == theirs


@pytest.mark.parametrize("name", KNOWN_TO_TRANSFORMERS)
def test_transformers_computes_with_the_same_numbers(name):
    """Windows, rotary angles, scales and norms of every layer, and the rest of what only the config says."""
    cfg, model, config = from_hf(REAL_MODELS[name].config, name), hf_model(name).model, hf_config(name)
    embedding = getattr(model, "rotary_emb", None) or getattr(model, "pos_emb", None)
    rotary = embedding and type(embedding)(config)
    attentions = [getattr(layer, "self_attn", getattr(layer, "mixer", None)) for layer in model.layers]
    attentions = [one if hasattr(one, "scaling") else None for one in attentions]
    layers = structure(cfg)
    has_heads = [getattr(layers.mixers[index], "has_heads", False) for index in layers.mixer_l]
    assert has_heads == [one is not None for one in attentions]
    for index, attention in ((index, one) for index, one in enumerate(attentions) if one is not None):
        kind = cfg.kinds[cfg.layer_kinds[index]]
        windowed = getattr(config, "layer_types", ["sliding_attention"] * cfg.n_layers)[index] == "sliding_attention"
        assert kind.window == (getattr(config, "sliding_window", None) if windowed else None)
        chunked = getattr(config, "layer_types", [""] * cfg.n_layers)[index] == "chunked_attention"
        assert kind.chunk == (config.attention_chunk_size if chunked else None)
        assert (kind.unit_eps is not None) == hasattr(attention, "qk_norm")
        assert cfg.query_scale == pytest.approx(attention.scaling * getattr(config, "key_multiplier", 1.0))
        if rotary is None:
            assert kind.rope.kind == "none"
            continue
        which = f"{config.layer_types[index]}_" if hasattr(rotary, "full_attention_inv_freq") else ""
        angles, length = getattr(rotary, f"{which}inv_freq"), getattr(rotary, f"{which}attention_scaling")
        np.testing.assert_allclose(kind.rope.inverse_frequencies(16), angles * has_rope(attention), rtol=3e-6)
        assert kind.rope.attention_factor == pytest.approx(length)
    norms = [module for module in model.modules() if type(module).__name__.endswith(("RMSNorm", "LayerNorm"))]
    own = {mixer.norm_eps for mixer in cfg.mixers if hasattr(mixer, "norm_eps")}  # of norms inside a mixer
    assert {getattr(norm, "variance_epsilon", getattr(norm, "eps", None)) for norm in norms} == {cfg.norm_eps} | own
    activations = (getattr(config, one, None) for one in ("hidden_activation", "mlp_hidden_act", "hidden_act"))
    assert cfg.activation == next(filter(None, activations), "silu")
    assert cfg.context_length == config.max_position_embeddings
    assert cfg.attention_softcap == getattr(config, "attn_logit_softcapping", None)
    assert cfg.logit_softcap == getattr(config, "final_logit_softcapping", None)


@pytest.mark.parametrize(
    "name,d_mlp,theta,context",
    [
        ("Qwen-1_8B-Chat", 5504, 1e4, 8192),
        ("Qwen-7B-Chat", 11008, 1e4, 8192),
        ("Qwen-14B-Chat", 13696, 1e4, 2048),
        ("Qwen-72B-Chat", 24576, 1e6, 32768),
    ],
)
def test_the_first_qwen(name, d_mlp, theta, context):
    """One MLP branch is half of what its config says, and its context ends where its code would start to stretch it."""
    cfg = from_hf(REAL_MODELS[name].config, name)
    assert (cfg.d_mlp, cfg.context_length, cfg.head_dim, cfg.qkv_bias) == (d_mlp, context, 128, True)
    assert [kind.rope.theta for kind in cfg.kinds] == [theta] and not cfg.o_bias and not cfg.mlp_bias


@pytest.mark.parametrize("name", KNOWN_TO_TRANSFORMERS)
def test_defaults_are_those_of_transformers(name):
    """What a config leaves out, its class supplies: written out by transformers, it must read the same."""
    whole = hf_config(name).model_type not in READERS
    written = hf_config(name, whole).to_dict()
    assert from_hf(written, name).__dict__ == from_hf(REAL_MODELS[name].config, name).__dict__ | {
        "family": written["model_type"]
    }


@pytest.mark.parametrize("name", BY_TYPE.values(), ids=BY_TYPE)
def test_the_forward_pass_of_real_models_has_the_right_shapes(name):
    cfg = from_hf(REAL_MODELS[name].config, name)
    decoder = jax.eval_shape(lambda key: Decoder.init(cfg, key, jnp.bfloat16), jax.random.key(0))
    tokens, mask = jax.ShapeDtypeStruct((2, 16), jnp.int32), jax.ShapeDtypeStruct((2, 16), bool)
    edits = Edits.none(cfg.d_model).for_batch(2, cfg.n_layers, cfg.d_model)
    out = jax.eval_shape(
        lambda *args: predict(*args, taps=Taps(RESIDUAL_SITES, 5), last=True), decoder, tokens, mask, edits
    )
    logits, taps = out.logits, out.taps
    assert logits.shape == (2, cfg.vocab_size) and logits.dtype == jnp.float32
    assert set(taps) == set(RESIDUAL_SITES)
    for tapped in taps.values():
        assert tapped.shape == (cfg.n_layers, 2, 5, cfg.d_model) and tapped.dtype == jnp.bfloat16
    sizes, rows = {"rows": 2, "length": 16, "max_new_tokens": 3, "pad_id": 0}, jax.ShapeDtypeStruct((2,), jnp.int32)
    state = jax.eval_shape(lambda model: empty(model, **sizes), decoder)
    ending = {"pad_id": 0, "eos_ids": (1,)}
    admitted = jax.eval_shape(lambda *args: admit(*args, **ending), decoder, state, tokens, mask, edits, rows)
    assert jax.tree.map(jnp.shape, admitted) == jax.tree.map(jnp.shape, state)
    out = jax.eval_shape(lambda *args: decode(*args, 1, 3, eos_ids=(1,)), decoder, admitted)[2]
    assert out.shape == (2, 3) and out.dtype == jnp.int32

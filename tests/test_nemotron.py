"""Falcon-H1 and Nemotron-H beyond what all families are tested for: configs, names, and biases of projections."""

import json

import families
import numpy as np
import pytest
import tiny
import torch
from exports import DIRECTION, exported
from safetensors.torch import load_file, save_file

from refusal_jax import Edits, UserError
from refusal_jax.checkpoints.load import load_decoder
from refusal_jax.checkpoints.tensor_files import SINGLE
from refusal_jax.models.hf_config import from_hf
from refusal_jax.models.predict import predict
from refusal_jax.taps import NO_TAPS


def hf(family="nemotron_h", **more) -> dict:
    return {name: value for name, value in (families.hf_config(family) | more).items() if value is not None}


def logits(decoder, tokens, mask) -> np.ndarray:
    edits = Edits.none(decoder.cfg.d_model).for_batch(len(tokens), decoder.cfg.n_layers, decoder.cfg.d_model)
    return np.asarray(predict(decoder, tokens, mask, edits, taps=NO_TAPS, last=False).logits)


@pytest.mark.parametrize(
    "names",
    [
        {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp", "linear_attention"]},
        {"layers_block_type": ["mamba", "mlp", "attention", "mlp", "mamba"]},
        {"layers_block_type": None, "layer_types": ["mamba", "mlp", "attention", "mlp", "mamba"]},
        {"layers_block_type": None, "hybrid_override_pattern": "M-*-M"},
        {"hybrid_override_pattern": "M-*-M", "num_hidden_layers": 5},
        {"norm_eps": 1e-5, "rms_norm_eps": 1e-5, "attention_head_dim": 16, "rope_theta": 10000, "sliding_window": None},
        {"head_dim": None, "attention_head_dim": 16},
        {"mtp_hybrid_override_pattern": "*E", "num_nextn_predict_layers": 1, "partial_rotary_factor": 1.0},
    ],
)
def test_configs_that_say_the_same(names):
    assert from_hf(hf(**names)) == from_hf(hf(layers_block_type=None, hybrid_override_pattern="M-*-M"))


@pytest.mark.parametrize(
    "family,changes,message",
    [
        (
            "nemotron_h",
            {"hybrid_override_pattern": "M-M-M"},
            "layers_block_type = .* and hybrid_override_pattern = .* disagr",
        ),
        (
            "nemotron_h",
            {"hybrid_override_pattern": "Mx"},
            "hybrid_override_pattern = 'Mx', expected one of M, \\*, -, E for each",
        ),
        (
            "nemotron_h",
            {"layers_block_type": ["conv"]},
            r"layers_block_type = \['conv'\], expected one of linear_attention, full",
        ),
        ("nemotron_h", {"layers_block_type": []}, r"layers_block_type = \[\], expected one of"),
        ("nemotron_h", {"mamba_num_heads": 7}, "mamba_num_heads = 7 is not a multiple of n_groups = 2"),
        ("nemotron_h", {"norm_eps": 1e-6}, "layer_norm_epsilon = 1e-05 and norm_eps = 1e-06 disagree"),
        ("nemotron_h", {"tie_word_embeddings": True}, "tie_word_embeddings = True is not supported"),
        ("nemotron_h", {"mamba_hidden_act": "tanh"}, "mamba_hidden_act = 'tanh' is not one of silu"),
        ("falcon_h1", {"mlp_multipliers": [1.0]}, r"mlp_multipliers = \[1.0\], expected 2 positive numbers"),
        ("falcon_h1", {"ssm_multipliers": [1, 1, 1, 1, "x"]}, "ssm_multipliers = .*, expected 5 positive numbers"),
        ("falcon_h1", {"mamba_use_mlp": False}, "mamba_use_mlp = False is not supported"),
    ],
)
def test_configs_that_cannot_be_right(family, changes, message):
    with pytest.raises(UserError, match=message):
        from_hf(hf(family, **changes))


@pytest.mark.parametrize("prefix", ["model.", "backbone.", ""])
def test_names_of_all_origins(tmp_path, prefix):
    """Tells that files of transformers and of NVIDIA load alike, layers that guess tokens ahead or not."""
    source = families.tiny_model(tmp_path / "source", "nemotron_h", "mixture")
    decoder, tensors = load_decoder(source), load_file(source / SINGLE)
    tensors = {name.replace("backbone.", prefix): tensor for name, tensor in tensors.items()}
    tensors |= {"mtp.layers.0.norm.weight": torch.ones(3)}
    save_file(tensors, source / SINGLE, {"format": "pt"})
    for path, weight in load_decoder(source).weights().items():
        np.testing.assert_array_equal(weight, decoder.weights()[path])


@pytest.mark.parametrize("family,bias", [("falcon_h1", "mamba_proj_bias"), ("nemotron_h", "use_bias")])
def test_biases_of_input_projections(tmp_path, family, bias):
    """Tells by rows without padding: with it, transformers lets such a bias into the convolution of the first real tokens."""
    source = families.tiny_model(tmp_path / "source", family, **{bias: True})
    decoder, theirs = load_decoder(source), families.reference(source)
    tokens, mask = tiny.left_padded((9, 4), decoder.cfg.vocab_size)
    ours = logits(decoder, tokens, mask)
    for row, length in enumerate((9, 4)):
        alone = tokens[[row], -length:]
        want = tiny.hf_forward(theirs, alone, np.ones_like(alone, bool)).logits.numpy()
        np.testing.assert_allclose(ours[[row], -length:], want, atol=1e-4, rtol=1e-4)
    assert "blocks.ssm_x_bias" in decoder.weights() and "blocks.ssm_dt_bias" in decoder.weights()


def test_models_without_attention(tmp_path):
    source = families.tiny_model(tmp_path / "source", "nemotron_h", hybrid_override_pattern="M-MM")
    decoder = load_decoder(source)
    tokens, mask = tiny.left_padded((3, 20), decoder.cfg.vocab_size)
    want = tiny.hf_forward(families.reference(source), tokens, mask, use_cache=False).logits.numpy()
    np.testing.assert_allclose(logits(decoder, tokens, mask)[mask], want[mask], atol=1e-4, rtol=1e-4)
    assert not exported(source, tmp_path / "out")["verification"]["problems"]


def test_additions_go_where_an_mlp_is(tmp_path):
    falcon = families.tiny_model(tmp_path / "falcon", "falcon_h1")
    report = exported(falcon, tmp_path / "out", kind="add", layers=[2], scale=-1.5)
    assert report["verification"]["problems"] == []
    assert report["verification"]["export"]["max_logit_difference"] < 1e-3
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mlp_bias"]
    nemotron = families.tiny_model(tmp_path / "nemotron", "nemotron_h")
    with pytest.raises(UserError, match="MLP of a nemotron_h model has no bias"):
        exported(nemotron, tmp_path / "none", DIRECTION, kind="add", layers=[2])

"""Qwen3-Next and Qwen 3.5 as people have them: long prompts, other parts of a checkpoint, experts in one tensor, odd configs."""

import json
import re

import families
import numpy as np
import pytest
import tiny
import torch
from exports import UNIT, exported, tensors_of, transformers_agrees
from safetensors.torch import load_file, save_file
from test_config import hf

from refusal_jax import Edits, Taps, UserError
from refusal_jax.checkpoints.load import load_decoder
from refusal_jax.checkpoints.tensor_files import SINGLE
from refusal_jax.models.hf_config import from_hf
from refusal_jax.models.predict import predict

TEXT = {"model_type": "qwen3_5_text", "num_hidden_layers": 8}


def logits(folder, lengths=(150, 3, 70)) -> tuple[np.ndarray, np.ndarray]:
    """Our logits of real tokens of left-padded rows, and transformers'."""
    ours = load_decoder(folder)
    tokens, mask = tiny.left_padded(lengths, ours.cfg.vocab_size)
    edits = Edits.none(ours.cfg.d_model).for_batch(len(tokens), ours.cfg.n_layers, ours.cfg.d_model)
    found = predict(ours, tokens, mask, edits, taps=Taps(), last=False).logits
    return np.asarray(found)[mask], tiny.hf_forward(families.reference(folder), tokens, mask).logits.numpy()[mask]


def test_prompts_of_several_chunks(tmp_path):
    ours, theirs = logits(families.tiny_model(tmp_path, "qwen3_5_text"))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def together(folder) -> None:
    """Rewrites a checkpoint with all experts of a layer in one tensor, as the published ones of Qwen 3.5 have them."""
    tensors = load_file(folder / SINGLE)
    names = {re.sub(r"\.\d+\.(gate|up|down)_proj\.weight$", "", name) for name in tensors if ".experts." in name}
    for name in sorted(names):
        gate, up, down = (
            torch.stack([tensors.pop(f"{name}.{e}.{part}_proj.weight") for e in range(6)])
            for part in ("gate", "up", "down")
        )
        tensors |= {f"{name}.gate_up_proj": torch.cat([gate, up], dim=1), f"{name}.down_proj": down}
    save_file(tensors, folder / SINGLE, {"format": "pt"})


def test_experts_in_one_tensor(tmp_path):
    """Beside a layer that guesses tokens ahead, which transformers passes over, too."""
    folder = families.tiny_model(tmp_path / "source", "qwen3_5_moe")
    before, _ = logits(folder, (20,))
    together(folder)
    ahead = {"mtp.fc.weight": torch.ones(32, 64), "mtp.layers.0.self_attn.o_proj.weight": torch.ones(32, 64)}
    save_file(load_file(folder / SINGLE) | ahead, folder / SINGLE, {"format": "pt"})
    ours, theirs = logits(folder, (20,))
    np.testing.assert_array_equal(ours, before)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_an_export_edits_every_expert_and_every_rule(tmp_path):
    """Whose matrices others have left as they were, in silence."""
    folder = families.tiny_model(tmp_path / "source", "qwen3_5_moe")
    together(folder)
    ahead = {"mtp.fc.weight": torch.ones(32, 64), "mtp.layers.0.mlp.experts.down_proj": torch.ones(6, 32, 24)}
    save_file(load_file(folder / SINGLE) | ahead, folder / SINGLE, {"format": "pt"})
    exported(folder, tmp_path / "out", verify=False)
    tensors = tensors_of(tmp_path / "out")
    edited = [name for name in tensors if re.search(r"language_model.*\.(out_proj|o_proj|down_proj)\.weight", name)]
    assert len(edited) == 4 * (1 + 6 + 1)
    assert all(np.array_equal(tensors[name], value) for name, value in ahead.items())
    assert max(np.abs(UNIT @ tensors[name]).max() for name in edited) < 1e-5
    transformers_agrees(tmp_path / "out")


def test_experts_of_another_number_are_unknown(tmp_path):
    folder = families.tiny_model(tmp_path, "qwen3_5_moe_text")
    together(folder)
    tiny.edit_json(folder / "config.json", num_experts=5)
    with pytest.raises(UserError, match=r"unknown: model\.layers\.0\.mlp\.experts\.down_proj"):
        load_decoder(folder)


def test_keys_of_published_configs():
    """Checks those of Qwen 3.6 and 3.8, which have the model types of Qwen 3.5."""
    said = {"attn_output_gate": True, "output_gate_type": "swish", "mamba_ssm_dtype": "float32", "mlp_only_layers": []}
    said |= {"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False}
    types = ["linear_attention"] * 3 + ["full_attention"]
    config = from_hf(hf(**TEXT, **said, full_attention_interval=4))
    assert config == from_hf(hf(**TEXT)) == from_hf(hf(**TEXT, layer_types=types * 2, full_attention_interval=2))
    assert config == from_hf(hf(**TEXT, layer_types=["mamba", "mamba", "mamba", "attention"] * 2))
    assert config.layer_mixers == (0, 0, 0, 1) * 2 and not config.mixers[0].has_heads and config.mixers[1].gated


@pytest.mark.parametrize(
    "keys,message",
    [
        ({"output_gate_type": "sigmoid"}, r"output_gate_type = 'sigmoid' is not supported \(only 'swish' is\)"),
        ({"attn_output_gate": False}, r"attn_output_gate = False is not supported"),
        ({"linear_num_value_heads": 24}, "linear_num_value_heads = 24 is not a multiple of linear_num_key_heads = 16"),
        ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim = 1, expected an integer from 2 up"),
        (
            {"layer_types": ["full_attention"]},
            "layer_types = .* expected 'full_attention' or 'linear_attention' for each of 8",
        ),
        (
            {"layer_types": [["full_attention"]] * 8},
            "layer_types = .* expected 'full_attention' or 'linear_attention' for",
        ),
        (
            {"layer_types": ["sliding_attention"] * 8},
            "layer_types = .* expected 'full_attention' or 'linear_attention' fo",
        ),
    ],
)
def test_what_is_not_computed_is_refused(keys, message):
    with pytest.raises(UserError, match=message):
        from_hf(hf(**TEXT, **keys))


def test_a_text_model_saved_out_of_its_multimodal_wrapper(tmp_path):
    """With the wrapper's names, and with the vision part left in: transformers takes both."""
    whole = families.tiny_model(tmp_path, "qwen3_5")
    before, _ = logits(whole, (20,))
    text = json.loads((whole / "config.json").read_text())["text_config"]
    (whole / "config.json").write_text(json.dumps(text | {"architectures": ["Qwen3_5ForCausalLM"]}))
    ours, theirs = logits(whole, (20,))
    np.testing.assert_array_equal(ours, before)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)

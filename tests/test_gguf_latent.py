"""GGUF files of models with latent attention: old and new ones, in parts, and those that do not say enough."""

import json

import numpy as np
import pytest
from families import tiny_model
from gguf import GGMLQuantizationType as Type
from gguf_files import write_gguf
from safetensors.numpy import load_file, save_file

from refusal_jax.checkpoints.remote import checkpoint_folder
from refusal_jax.checkpoints.tensor_files import TensorFiles
from refusal_jax.errors import UserError
from refusal_jax.models.hf_config import load_config

WIDE = {"kv_lora_rank": 32, "qk_nope_head_dim": 32, "num_nextn_predict_layers": 0, "num_hidden_layers": 2}
WIDE |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}}
ATTENTION = "deepseek2.attention"
OLD = {f"{ATTENTION}.key_length": 38, f"{ATTENTION}.value_length": 14, f"{ATTENTION}.head_count_kv": 4}
OLD |= {f"{ATTENTION}.key_length_mla": None, f"{ATTENTION}.value_length_mla": None}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Writes a tiny DeepSeek V3 as GGUF, with changed metadata, and returns its folder and the file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def write(name: str = "tiny", config: dict | None = None, **changes):
        folder = tiny_model(tmp_path / f"hf-{name}", "deepseek_v3", "grouped", **WIDE | (config or {}))
        return folder, write_gguf(folder, tmp_path / f"{name}.gguf", Type.Q8_0, **changes)

    return write


def whole(files: TensorFiles, name: str) -> np.ndarray:
    """A tensor's values in float32."""
    out = np.empty(files.tensors[name].shape, np.float32)
    files.read_into(name, (), out)
    return out


def test_old_files_have_keys_and_values_of_latents_in_one_tensor(tiny):
    folder, path = tiny(**OLD)
    ours, theirs = TensorFiles.open(mirror := checkpoint_folder(path)), TensorFiles.open(folder)
    assert load_config(mirror) == load_config(folder)
    for name in ours.tensors:
        np.testing.assert_array_equal(whole(ours, name), whole(theirs, name))


def test_parts_of_tensors_that_are_stored_apart(tiny):
    """Rows and columns of what is stored of each head, transposed or not."""
    folder, path = tiny()
    files, rng = TensorFiles.open(checkpoint_folder(path)), np.random.default_rng(0)
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    want = whole(TensorFiles.open(folder), name)
    for _ in range(8):
        index = tuple(slice(*map(int, sorted(rng.integers(0, size + 1, 2)))) for size in want.shape)
        out = np.empty(want[index].shape, np.float32)
        files.read_into(name, index, out)
        np.testing.assert_array_equal(out, want[index])


def test_layers_that_guess_tokens_ahead_are_left_out(tiny, tmp_path):
    """Newer files of GLM 4.7 Flash have them behind the others, and count them."""
    folder, _ = tiny()
    weights = load_file(folder / "model.safetensors")
    weights |= {name.replace(".1.", ".2."): w for name, w in weights.items() if name.startswith("model.layers.1.")}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    path = write_gguf(folder, tmp_path / "drafts.gguf", **{"deepseek2.nextn_predict_layers": 1})
    files, cfg = TensorFiles.open(mirror := checkpoint_folder(path)), load_config(mirror)
    assert (cfg.n_layers, cfg.draft_layers) == (2, 1)
    assert {name.split(".")[2] for name in files.tensors if "layers" in name} == {"0", "1"}


@pytest.mark.parametrize(
    ("config", "changes", "match"),
    [
        (
            {"n_routed_experts": 160},
            {"deepseek2.expert_group_count": None},
            "before llama.cpp's converter kept the groups",
        ),
        ({}, {"deepseek2.rope.dimension_count": 38}, "dimension_count = 38, expected less than a head's 38 entries"),
        ({}, {"deepseek2.expert_gating_func": 3}, "expert_gating_func = 3, and only 1 is computed"),
        ({}, {"deepseek2.expert_gating_func": 1}, "expert_weights_norm = True, and only False is computed"),
        ({}, {"deepseek2.attention.temperature_scale": 0.1}, "temperature_scale = .* is not supported"),
    ],
)
def test_what_cannot_be_computed_is_said(tiny, config, changes, match):
    _, path = tiny(config=config, **changes)
    with pytest.raises(UserError, match=match):
        checkpoint_folder(path)


def test_keys_of_another_shape(tiny):
    _, path = tiny(**{f"{ATTENTION}.value_length_mla": 12})
    with pytest.raises(UserError, match=r"blk.0.attn_v_b.weight is \[4, 14, 32\], expected \[4, 12, 32\]"):
        TensorFiles.open(checkpoint_folder(path))

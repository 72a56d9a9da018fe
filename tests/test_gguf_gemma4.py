"""GGUF files of Gemma 4: what first releases stored and nobody uses, parts of fused experts, and files that do not fit."""

import json

import numpy as np
import pytest
from families import tiny_model
from gguf import GGMLQuantizationType as Type
from gguf_files import write_gguf
from safetensors.numpy import load_file, save_file
from test_gguf import GEMMA4, whole
from transformers import AutoTokenizer

from refusal_jax.checkpoints.remote import checkpoint_folder
from refusal_jax.checkpoints.tensor_files import TensorFiles
from refusal_jax.errors import UserError


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Writes a tiny Gemma 4 as GGUF, with changed metadata, and returns its folder and the file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def write(variant: str = "gqa", kind: Type = Type.F32, config: dict | None = None, **changes):
        folder = tiny_model(tmp_path / "hf", "gemma4_text", variant, **GEMMA4 | (config or {}))
        return folder, write_gguf(folder, tmp_path / "tiny.gguf", kind, **changes)

    return write


def test_keys_and_values_of_layers_that_share_others_are_passed_over(tiny, tmp_path):
    """The first releases stored them, and files of those still do."""
    folder, _ = tiny()
    weights = load_file(folder / "model.safetensors")
    spare = {name.replace(".2.", ".5."): w for name, w in weights.items() if ".2.self_attn" in name}
    spare = {name: w for name, w in spare.items() if name not in weights}
    assert sorted(name.split(".")[4] for name in spare) == ["k_norm", "k_proj", "v_proj"]
    save_file(weights | spare, folder / "model.safetensors", {"format": "pt"})
    ours = TensorFiles.open(checkpoint_folder(write_gguf(folder, tmp_path / "spare.gguf")))
    assert set(ours.tensors) == set(weights)


def test_parts_of_experts_whose_gates_are_fused(tiny):
    folder, path = tiny("experts", Type.Q8_0, {"moe_intermediate_size": 32})
    files, rng = TensorFiles.open(checkpoint_folder(path)), np.random.default_rng(0)
    for part in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.experts.{part}"
        want = whole(TensorFiles.open(folder), name)
        for _ in range(6):
            index = tuple(slice(*map(int, sorted(rng.integers(0, size + 1, 2)))) for size in want.shape)
            out = np.empty(want[index].shape, np.float32)
            files.read_into(name, index, out)
            np.testing.assert_array_equal(out, want[index])


def test_its_tokenizer_is_one_of_sentencepiece_with_merges(tiny):
    tokens = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "\u2581a", "\u2581ab"]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    roles = {f"tokenizer.ggml.{key}_token_id": i for i, key in enumerate(("unknown", "bos", "eos", "padding"))}
    own = {
        "model": "gemma4",
        "pre": None,
        "tokens": tokens + [f"[PAD{i}]" for i in range(len(tokens), 312)],
        "token_type": [2, 3, 3] + [1] * 5 + [6] * 256 + [5] * 48,
        "merges": ["\u2581 a", "\u2581a b"],
        "add_space_prefix": False,
        "add_bos_token": True,
    }
    _, path = tiny(**roles, **{f"tokenizer.ggml.{key}": value for key, value in own.items()})
    ours = AutoTokenizer.from_pretrained(checkpoint_folder(path))
    assert ours("a abé\n")["input_ids"] == [1, 4, 7, 8 + 0xC3, 8 + 0xA9, 8 + 10]
    assert ours.decode([4, 7, 8 + 0xC3, 8 + 0xA9]) == "a abé"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"feed_forward_length": [48] * 4 + [96] * 2},
            "expected one number, twice as much in the last 3 layers or not",
        ),
        ({"feed_forward_length": [48]}, "expected a whole number for each of 6 layers"),
        ({"attention.head_count_kv": [2, 1, 2, 2, 2, 2]}, "expected one number for all sliding_attention layers"),
        ({"rope.dimension_count": 8}, "dimension_count = 8, and only 16 is computed"),
        (
            {"attention.key_length": 32},
            "rope_freqs.weight holds .* expected for each of 16 pairs 1, or 1e30 behind these",
        ),
        ({"rope.scaling.factor": 2.0}, "rope.scaling.factor = 2.0 is not supported"),
    ],
)
def test_what_cannot_be_computed_is_said(tiny, changes, match):
    _, path = tiny(**{f"gemma4.{key}": value for key, value in changes.items()})
    with pytest.raises(UserError, match=match):
        checkpoint_folder(path)


def test_full_layers_of_other_heads_than_the_file_has(tiny):
    folder, path = tiny("experts", **{"gemma4.attention.head_count_kv": 2})
    assert json.loads((folder / "config.json").read_text())["num_key_value_heads"] == 2
    with pytest.raises(UserError, match=r"blk.2.attn_k.weight is \[16, 32\], expected \[32, 32\]"):
        TensorFiles.open(checkpoint_folder(path))

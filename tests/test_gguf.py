"""GGUF files as checkpoints: equal to the HF checkpoints that they were made of, for every architecture and type."""

import dataclasses
import io
import json
import math
import os
import pathlib

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from exports import exported, transformers_agrees
from families import tiny_model
from gguf import GGMLQuantizationType as Type
from gguf_files import add, tokenizer, write_gguf
from gguf_settings import settings
from tiny import hf_forward, left_padded
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from refusal_jax import load_model
from refusal_jax.checkpoints import gguf_tensors
from refusal_jax.checkpoints.gguf_blocks import READABLE, UNPACKED, as_bfloat16, block_of, dequantise
from refusal_jax.checkpoints.gguf_tokenizer import write_tokenizer
from refusal_jax.checkpoints.load import load_decoder
from refusal_jax.checkpoints.remote import checkpoint_folder
from refusal_jax.checkpoints.tensor_files import TensorFiles
from refusal_jax.errors import UserError
from refusal_jax.models.hf_config import load_config
from refusal_jax.models.sharding import make_mesh


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GEMMA2 = {"head_dim": 8, "query_pre_attn_scalar": 8, "num_hidden_layers": 4, "sliding_window": 6}
GEMMA4 = {
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "rope_theta": 1000.0, "partial_rotary_factor": 0.5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
}
LLAMA4 = {
    "rope_parameters": LLAMA_3 | {"factor": 16.0, "high_freq_factor": 1.0},
    "head_dim": 16,
    "intermediate_size": 64,
}
LLAMA4 |= {"moe_layers": [1, 3], "no_rope_layer_interval": 4, "max_position_embeddings": 131072}
LLAMA4 |= {
    "attention_chunk_size": 8192,
    "floor_scale": 8192,
    "attn_scale": 0.1,
}  # as in all models, which files do not say
FOLDED = ("embedding", "lm_head", "key", "attention_in", "attention_out", "ssm_in", "ssm_out")
ALONE = {f"{name}_multiplier": 1.0 for name in FOLDED} | {"ssm_multipliers": [1.0] * 5, "mlp_multipliers": [1.0] * 2}
STEEP = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
STEEP |= {"mscale": 0.707, "mscale_all_dim": 0.707}
WIDE = {"kv_lora_rank": 32, "qk_nope_head_dim": 32}  # so that what is transposed may have blocks
CASES = {
    "llama": ("llama", "gqa", {}),
    "llama-biased": ("llama", "biased", {"hidden_act": "silu"}),
    "llama-tied": ("llama", "tied", {"hidden_act": "silu"}),
    "llama-3": ("llama", "gqa", {"rope_parameters": LLAMA_3, "head_dim": 16, "max_position_embeddings": 131072}),
    "llama-linear": ("llama", "rope-linear", {}),
    "llama-yarn": ("llama", "rope-yarn", {}),
    "mistral": ("mistral", "window", {}),
    "llama4": ("llama4_text", "mqa", LLAMA4),
    "mixtral": ("mixtral", "gqa", {}),
    "qwen2": ("qwen2", "gqa", {}),
    "qwen3": ("qwen3", "gqa", {}),
    "qwen3-biased": ("qwen3", "biased", {}),
    "qwen3moe": ("qwen3_moe", "renormalised", {"num_experts": 5, "moe_intermediate_size": 32}),
    "gemma": ("gemma", "gqa", {}),
    "gemma2": ("gemma2", "capped", GEMMA2),
    "gemma3": (
        "gemma3_text",
        "gqa",
        GEMMA2 | {"num_hidden_layers": 6, "layer_types": (["sliding_attention"] * 5 + ["full_attention"])},
    ),
    "gpt-oss": ("gpt_oss", "gqa", {"swiglu_limit": 7.0, "intermediate_size": 64}),
    "phi3": ("phi3", "gqa", {"sliding_window": 9}),
    "lfm2": ("lfm2", "gqa", {}),
    "lfm2moe": ("lfm2_moe", "gqa", {"moe_intermediate_size": 32, "routed_scaling_factor": 1.0}),
    "granitehybrid": ("granitemoehybrid", "gqa", {"time_step_limit": [0.0, math.inf]}),
    "granitehybrid-dense": ("granitemoehybrid", "dense", {}),
    "qwen35": ("qwen3_5_text", "gqa", {}),
    "qwen35-tied": ("qwen3_5_text", "tied", {}),
    "qwen35moe": ("qwen3_5_moe_text", "gqa", {}),
    "falcon-h1": ("falcon_h1", "gqa", ALONE),
    "falcon-h1-normed": ("falcon_h1", "mqa", ALONE | {"hidden_act": "silu", "mamba_d_ssm": 64}),
    "nemotron-h": ("nemotron_h", "gqa", {"time_step_min": 0.001, "mlp_bias": True}),
    "nemotron-h-moe": ("nemotron_h", "mixture", {"mlp_bias": False}),
    "nemotron-h-latent": ("nemotron_h", "latent", {"mlp_bias": False, "mlp_hidden_act": "relu2"}),
    "gemma4": ("gemma4_text", "gqa", GEMMA4),
    "gemma4-mqa": ("gemma4_text", "mqa", GEMMA4 | {"vocab_size_per_layer_input": 312}),
    "gemma4-experts": ("gemma4_text", "experts", GEMMA4),
    "deepseek2": ("deepseek_v2", "grouped", {"rope_parameters": STEEP, "routed_scaling_factor": 1.0}),
    "deepseek2-lite": ("deepseek_v2", "greedy", {"attention_bias": False}),
    "deepseek3": ("deepseek_v3", "grouped", {"rope_parameters": STEEP, "num_nextn_predict_layers": 0} | WIDE),
    "glm4.7": ("glm4_moe_lite", "mha", {"num_nextn_predict_layers": 0}),
    "phi3-long": ("phi3", "longrope", {}),
}
LOADED = (
    "llama",
    "qwen2",
    "qwen3moe",
)  # by transformers too, which reads no rope, window or cap, nor other architectures


def made(tmp_path: pathlib.Path, case: str, kind: Type = Type.F32, **more):
    """The folder of a tiny checkpoint, and the GGUF file of the same."""
    family, variant, config = CASES[case]
    folder = tiny_model(tmp_path / "hf", family, variant, **config)
    return folder, write_gguf(folder, tmp_path / "tiny.gguf", kind, **more)


def whole(files: TensorFiles, name: str) -> np.ndarray:
    """A tensor's values in float32."""
    out = np.empty(files.tensors[name].shape, np.float32)
    files.read_into(name, (), out)
    return out


@pytest.mark.parametrize("case", CASES)
def test_every_architecture_is_the_checkpoint_it_was_made_of(tmp_path, case):
    """Equal configs and equal tensors: so logits, taps and edits are equal too."""
    folder, path = made(tmp_path, case, Type.MXFP4 if case == "gpt-oss" else Type.Q8_0)
    mirror = checkpoint_folder(path)
    cfg = load_config(mirror)
    assert cfg == dataclasses.replace(
        load_config(folder), family=cfg.family
    )  # GLM 4.7 Flash computes what DeepSeek V3 does
    ours, theirs = TensorFiles.open(mirror), TensorFiles.open(folder)
    assert set(ours.tensors) == set(theirs.tensors) - (
        {"lm_head.weight"} if load_config(folder).tied_embeddings else set()
    )
    for name, tensor in ours.tensors.items():
        assert tensor.dtype in ("BF16", "F32") and tensor.shape == theirs.tensors[name].shape
        exact = "norm" not in name and "A_log" not in name  # stored plus 1, or as - exp
        np.testing.assert_allclose(whole(ours, name), whole(theirs, name), rtol=0, atol=0 if exact else 2.5e-7)
    assert ours.bytes_read == sum(tensor.nbytes for tensor in ours.tensors.values())


def test_the_larger_llama_4_does_not_norm_queries_and_keys(tmp_path):
    """As llama.cpp knows by the number of its experts."""
    _, path = made(tmp_path, "llama4", **{"llama4.expert_count": 128})
    cfg = load_config(checkpoint_folder(path))
    assert cfg.n_experts == 128 and all(kind.unit_eps is None for kind in cfg.kinds)
    _, path = made(tmp_path / "other", "llama4", **{"llama4.attention.sliding_window": 0})
    with pytest.raises(UserError, match="sliding_window = 0, and only 8192 is computed"):
        checkpoint_folder(path)


def test_multipliers_of_falcon_h1_are_in_the_weights(tmp_path):
    """The converter multiplies weights with them, which gives other weights and the same outputs."""
    folder = tiny_model(tmp_path / "hf", "falcon_h1", "gqa")
    path = write_gguf(folder, tmp_path / "tiny.gguf")
    theirs, ours = load_model(folder), load_model(path)
    tokens, mask = left_padded([11, 24], ours.decoder.cfg.vocab_size)
    np.testing.assert_allclose(ours.logits(tokens, mask), theirs.logits(tokens, mask), atol=1e-4)
    tied = tiny_model(tmp_path / "tied", "falcon_h1", "gqa", tie_word_embeddings=True)
    with pytest.raises(UserError, match="the embedding alone holds one of two multipliers"):
        checkpoint_folder(write_gguf(tied, tmp_path / "tied.gguf"))


def test_the_norm_before_the_unembedding_goes_by_two_names(tmp_path):
    """Versions of llama.cpp call LFM2's by one or the other."""
    folder, path = made(tmp_path, "lfm2")
    data = path.read_bytes()
    old, new = (len(name).to_bytes(8, "little") + name for name in (b"token_embd_norm.weight", b"output_norm.weight"))
    assert data.count(old) == 1
    header = gguf.GGUFReader(path)
    shorter = data.replace(old, new)
    start = header.data_offset
    padding = bytes(start - (start - (len(old) - len(new))))
    path.write_bytes(shorter[: start - len(padding)] + padding + shorter[start - len(padding) :])
    ours, theirs = TensorFiles.open(checkpoint_folder(path)), TensorFiles.open(folder)
    name = "model.embedding_norm.weight"
    np.testing.assert_array_equal(whole(ours, name), whole(theirs, name))


@pytest.mark.parametrize("case", ("llama", "qwen2", "gemma2", "mixtral", "gpt-oss"))
def test_logits_are_those_of_transformers(tmp_path, case):
    folder, path = made(tmp_path, case, Type.Q8_0)
    loader = {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
    where = (path.parent, loader) if case in LOADED else (folder, {})
    theirs = AutoModelForCausalLM.from_pretrained(
        where[0], dtype=torch.float32, attn_implementation="eager", **where[1]
    )
    ours = load_model(path)
    tokens, mask = left_padded([11, 24], ours.decoder.cfg.vocab_size)
    want = hf_forward(theirs.eval(), tokens, mask).logits.numpy()[:, -1]
    np.testing.assert_allclose(np.asarray(ours.logits(tokens, mask)), want, atol=1e-4)


def test_blocks_of_every_type_are_the_librarys():
    """Bit for bit, on random bytes: whatever the scales are."""
    rng = np.random.default_rng(0)
    for kind in READABLE:
        values, size = block_of(kind)
        data = rng.integers(0, 256, (70, size), dtype=np.uint8)
        out = np.empty((70, values), np.float32)
        dequantise(kind, data, out)
        with np.errstate(all="ignore"):
            if kind is Type.Q8_K:  # which the library lacks
                want = data[:, :4].copy().view(np.float32) * data[:, 4:260].view(np.int8).astype(np.float32)
            else:
                want = gguf.dequantize(data, kind).astype(np.float32)
        np.testing.assert_array_equal(out, want, err_msg=kind.name)
        if kind in UNPACKED:
            rounded = np.empty(out.shape, ml_dtypes.bfloat16)
            as_bfloat16(out, rounded)
            with np.errstate(all="ignore"):
                np.testing.assert_array_equal(
                    rounded.astype(np.float32), out.astype(ml_dtypes.bfloat16).astype(np.float32)
                )


def random_gguf(path: pathlib.Path, kind: Type, seed: int = 0) -> pathlib.Path:
    """A llama of one layer whose matrices are random blocks of a type."""
    values, size = block_of(kind)
    rng, width = np.random.default_rng(seed), 512
    sizes = {"hidden_size": width, "intermediate_size": width, "head_dim": 128}
    folder = tiny_model(path.parent / f"hf-{kind.name}", "llama", **sizes)
    hf = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 1}
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (settings(hf, "llama") | tokenizer(folder)).items():
        if value is not None:
            add(writer, key, value)
    shapes = {"token_embd": 328, "output": 328, "blk.0.attn_q": 512, "blk.0.attn_k": 256, "blk.0.attn_v": 256}
    shapes |= {f"blk.0.{name}": width for name in ("attn_output", "ffn_gate", "ffn_up", "ffn_down")}
    for name, rows in shapes.items():
        data = rng.integers(0, 100, (rows, width // values * size), dtype=np.uint8)  # small bytes: scales are finite
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", (Type.Q4_K, Type.Q5_1, Type.BF16), ids=lambda kind: kind.name)
def test_parts_of_tensors_are_read_with_their_blocks_only(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(gguf_tensors, "CHUNK_VALUES", 3000)  # many chunks of a tensor
    files = TensorFiles.open(checkpoint_folder(random_gguf(tmp_path / "tiny.gguf", kind)))
    block, size = block_of(kind)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        want = whole(files, name)
        for rows, columns in (
            ((0, 512), (0, 512)),
            ((128, 384), (0, 512)),
            ((0, 512), (256, 512)),
            ((5, 130), (100, 301)),
        ):
            before, out = files.bytes_read, np.empty((rows[1] - rows[0], columns[1] - columns[0]), np.float32)
            files.read_into(name, (slice(*rows), slice(*columns)), out)
            np.testing.assert_array_equal(out, want[slice(*rows), slice(*columns)])
            blocks = -(-columns[1] // block) - columns[0] // block
            least = (rows[1] - rows[0]) * blocks * size
            assert least <= files.bytes_read - before <= least * (2 if "q_proj" in name and rows[0] % 128 else 1)
        np.testing.assert_array_equal(files.read(name), want.astype(files.read(name).dtype))  # rounded once
    with pytest.raises(ValueError, match="cannot take"):
        files.read_into(name, (), np.empty((1, 2), np.float32))


def test_a_mesh_reads_what_its_devices_hold(tmp_path):
    path = random_gguf(tmp_path / "tiny.gguf", Type.Q8_0)
    want = load_decoder(path).weights()
    got = load_decoder(path, mesh=make_mesh(fsdp=2, model=4)).weights()
    for name, weight in want.items():
        np.testing.assert_array_equal(got[name], weight)


TEXTS = (
    "How do I bake bread?",
    "  two spaces",
    "naïve café 12 ½",
    "def f(x):\n\treturn x\n\n",
    "中文 🙂",
    "don't WE'LL",
    "",
    " ",
)


def test_sentencepiece_vocabularies(tmp_path):
    """The merges that the scores imply give the library's own ids, bytes of unknown signs included."""
    sentencepiece = pytest.importorskip("sentencepiece")
    words = " ".join(f"{a}{b}" for a in ("bak", "bread", "how", "retur", "de") for b in ("e", "ing", "n", "f", "s"))
    trainer = {
        "model_type": "bpe",
        "vocab_size": 340,
        "byte_fallback": True,
        "minloglevel": 2,
        "character_coverage": 1.0,
    }
    exact = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "hard_vocab_limit": False}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([words, *TEXTS[:2]] * 4), model_writer=model, **trainer, **exact
    )
    piece = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(piece.vocab_size())
    kinds = [2 if piece.is_unknown(i) else 3 if piece.is_control(i) else 6 if piece.is_byte(i) else 1 for i in ids]
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [piece.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": piece.bos_id(),
        "tokenizer.ggml.eos_token_id": piece.eos_id(),
        "tokenizer.ggml.unknown_token_id": piece.unk_id(),
    }
    write_tokenizer(metadata, tmp_path / "tiny.gguf", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    ours = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        want = piece.encode(text)
        assert ours(text, add_special_tokens=False)["input_ids"] == want, text
        assert ours(text)["input_ids"] == [piece.bos_id(), *want]
        assert ours.decode(want) == piece.decode(want)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": [piece.eos_id()]}


def test_byte_level_vocabularies(tmp_path):
    """A mirror's tokenizer gives the ids of the tokenizer that the file was made of, marks of turns and template included."""
    folder = tiny_model(tmp_path / "hf", "llama", num_hidden_layers=1)
    path = write_gguf(folder, tmp_path / "tiny.gguf", **{"tokenizer.ggml.pre": "gpt-2"})
    mirror = checkpoint_folder(path)
    ours, theirs = AutoTokenizer.from_pretrained(mirror), AutoTokenizer.from_pretrained(folder)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in (*TEXTS, "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"):
        assert ours(text)["input_ids"] == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.get_added_vocab() == theirs.get_added_vocab() and len(ours) == len(theirs)
    assert ours.chat_template == theirs.chat_template
    names = ("bos_token", "eos_token", "pad_token")
    assert [getattr(ours, name) for name in names] == [getattr(theirs, name) for name in names]


def test_parts_of_experts_in_one_tensor(tmp_path):
    """gpt-oss: rows in turn from two tensors, transposed, and their biases."""
    _, path = made(tmp_path, "gpt-oss", Type.Q8_0)
    files, rng = TensorFiles.open(checkpoint_folder(path)), np.random.default_rng(0)
    names = [name for name in files.tensors if ".layers.1.mlp.experts." in name]
    assert len(names) == 4
    for name in names:
        want = whole(files, name)
        for _ in range(6):
            edges = [sorted(rng.integers(0, size + 1, 2)) for size in want.shape]
            index = tuple(slice(int(a), int(b)) for a, b in edges)
            out = np.empty(want[index].shape, np.float32)
            files.read_into(name, index, out)
            np.testing.assert_array_equal(out, want[index])
        with pytest.raises(ValueError, match="cannot take"):
            files.read_into(name, (), np.empty((1, 1), np.float32))


def test_an_export_is_a_checkpoint_in_bfloat16(tmp_path):
    """It loads in transformers, names the file that it was made of, and says that it was dequantised."""
    _, path = made(tmp_path, "llama", Type.Q8_0)
    source, target = checkpoint_folder(path), tmp_path / "out"
    report = exported(source, target)
    assert report["base"]["name"] == path.name and "GGUF (Q8_0)" in report["dequantised"]
    assert not report["verification"]["problems"]
    config = json.loads((target / "config.json").read_text())
    assert "quantization_config" not in config and config["torch_dtype"] == "bfloat16"
    assert {t.dtype for t in TensorFiles.open(target).tensors.values() if len(t.shape) > 1} == {"BF16"}
    transformers_agrees(target)
    assert not any(name.startswith(".gguf") for name in os.listdir(target))

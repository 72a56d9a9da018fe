"""Quantised checkpoints are dequantised as they are read, to exactly what their formats say, in any part; and exported in
bfloat16."""

import json
import pathlib

import families
import ml_dtypes
import numpy as np
import pytest
import quantised
import tiny
import torch
from exports import exported, transformers_agrees
from safetensors.numpy import load_file
from safetensors.torch import load_file as torch_load
from safetensors.torch import save_file as torch_save

from refusal_jax.checkpoints import rewrite
from refusal_jax.checkpoints.load import load_decoder
from refusal_jax.checkpoints.rewrite import Checkpoint
from refusal_jax.checkpoints.tensor_files import INDEX, SINGLE, TensorFiles
from refusal_jax.errors import UserError
from refusal_jax.models.quantisation import read_quantisation
from refusal_jax.study.directions import setup_lines

SOME = ("fp8-block", "nf4-double", "int8", "gptq-4-ordered-asymmetric", "awq-gemm", "ct-int4-asymmetric")
PARTS = ((), (slice(3, 41),), (slice(0, 5), slice(7, 90)), (slice(33, 34), slice(40, 41)), (slice(2, 2),))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.tiny_llama(tmp_path_factory.mktemp("source"), head_dim=16, mlp=96, layers=2)


@pytest.fixture(scope="module", params=quantised.FORMATS)
def case(request, source, tmp_path_factory):
    """A quantised checkpoint's folder and the weights that it stands for."""
    folder = tmp_path_factory.mktemp("quantised") / request.param
    return folder, quantised.quantise(source, folder, quantised.FORMATS[request.param])


def test_values_are_those_of_the_format_in_any_part(case):
    folder, meant = case
    files = TensorFiles.open(folder)
    assert files.tensors.keys() == meant.keys()
    for name, values in meant.items():
        for part in PARTS if values.ndim == 2 else ((),):
            np.testing.assert_array_equal(files.read(name, part), values.numpy()[part], err_msg=f"{name} {part}")
    name = "model.layers.0.mlp.down_proj.weight"
    rounded, counted = np.empty(meant[name].shape, ml_dtypes.bfloat16), [files.bytes_read]
    for part in ((), (slice(0, 8),), (slice(None), slice(32, 64))):
        files.read_into(name, part, rounded[part])
        counted.append(files.bytes_read)
    np.testing.assert_array_equal(rounded, meant[name].numpy().astype(rounded.dtype))
    every, rows, columns = np.diff(counted)
    padded = folder.name == "awq-gemv"  # which has more zeros and scales than groups
    assert every == files.tensors[name].nbytes or padded
    flat = "4-" in folder.name or folder.name == "nf4"  # blocks that run over the ends of rows
    assert rows < every and (columns < every or flat)


@pytest.mark.parametrize("case", SOME, indirect=True)
def test_the_decoder_computes_what_the_weights_stand_for(case):
    folder, plain = case[0], case[0].with_name(f"{case[0].name}-plain")
    ours, theirs = (load_decoder(path) for path in (folder, plain))
    for path, weight in theirs.weights().items():
        np.testing.assert_array_equal(ours.weights()[path], weight)


def test_a_mixture_with_latent_attention_in_fp8(tmp_path):
    """As DeepSeek V3 and Kimi K2 are published, with the layer that guesses ahead in fp8, too."""
    source = families.tiny_model(tmp_path / "source", "deepseek_v3", "grouped")
    tensors = torch_load(source / SINGLE)
    ahead = {n.replace("layers.2", "layers.3"): t.clone() for n, t in tensors.items() if "layers.2" in n}
    torch_save(tensors | ahead, source / SINGLE)
    settings = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [16, 24]}
    folder, form = tmp_path / "fp8", (settings, quantised.fp8_block)
    quantised.quantise(source, folder, form, r"(_proj|kv_a_proj_with_mqa)\.weight$")
    ours, theirs = (load_decoder(path).weights() for path in (folder, tmp_path / "fp8-plain"))
    for path, weight in theirs.items():
        np.testing.assert_array_equal(ours[path], weight)


@pytest.mark.parametrize("case", ("fp8-tensor", "gptq-4-ordered-asymmetric"), indirect=True)
def test_an_export_is_a_bfloat16_checkpoint(case, tmp_path):
    folder, meant = case
    report = exported(folder, tmp_path / "out")
    assert report["verification"]["problems"] == []
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == meant.keys()
    for name, values in meant.items():
        assert written[name].dtype == (ml_dtypes.bfloat16 if values.ndim > 1 else np.float32)
        if name not in report["edited_tensors"]:
            np.testing.assert_array_equal(written[name], values.numpy().astype(written[name].dtype))
    transformers_agrees(tmp_path / "out")
    what = TensorFiles.open(folder).quantisation.what
    assert what in report["dequantised"] and what in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "refusal_jax.json").read_text())["dequantised"] == report["dequantised"]


def broken(source, folder, name: str, **changes) -> pathlib.Path:
    """A quantised checkpoint with tensors changed: by module of the first layer and ending, a tensor or None."""
    quantised.quantise(source, folder, quantised.FORMATS[name])
    tensors = torch_load(folder / SINGLE)
    for key, value in changes.items():
        key = "model.layers.0.self_attn.q_proj." + key
        tensors.pop(key, None)
        tensors |= {} if value is None else {key: value}
    torch_save(tensors, folder / SINGLE, {"format": "pt"})
    return folder


BNB = "weight.quant_state.bitsandbytes__"
Q = r"model\.layers\.0\.self_attn\.q_proj"


@pytest.mark.parametrize(
    "name,changes,settings,found",
    [
        ("fp8-block", {"weight_scale_inv": None}, {}, rf"{Q}\.weight, F8_E4M3, has no scale"),
        ("fp8-block", {"weight_scale": torch.ones(1)}, {}, rf"{Q}\.weight, F8_E4M3, has two scales"),
        (
            "fp8-block",
            {},
            {"weight_block_size": [32, 32]},
            r"scale_inv is F32 \[\d, \d\], which does not fit .* blocks of 32 x",
        ),
        ("fp8-block", {}, {"modules_to_not_convert": ["self_attn.q_proj"]}, "names self_attn.q_proj as not quantised"),
        (
            "mxfp8",
            {"weight_scale_inv": torch.ones(64, 1, dtype=torch.int32)},
            {},
            r"scale_inv is I32 \[64, 1\], which does",
        ),
        ("gptq-4", {"qzeros": None, "scales": None}, {}, rf"{Q} has no qzeros, scales"),
        ("gptq-4", {"scales": torch.ones(32)}, {}, rf"{Q} has tensors of other than two axes"),
        ("gptq-4", {}, {"bits": 8}, r"qzeros is \[1, 8\] beside scales \[1, 64\], 4 bits"),
        ("gptq-4", {}, {"group_size": 16}, r"scales is F16 \[\d, \d+\], expected F16 or BF16 or F32 \["),
        ("gptq-4", {"weight": torch.ones(64, 32)}, {}, rf"{Q}.weight is there as it is and quantised"),
        ("gptq-4", {"g_idx": torch.arange(3)}, {}, r"g_idx is \[3\] from 0 to 2, expected 32 numbers below 1"),
        (
            "gptq-4-ordered-asymmetric",
            {},
            {"desc_act": False},
            "g_idx orders the inputs otherwise than in groups of 32",
        ),
        ("awq-gemm", {}, {"group_size": 16}, r"qzeros is I32 \[\d, \d+\], expected I32 \["),
        ("awq-gemv", {}, {"version": "gemm"}, r"qzeros is I32 \[\d+, 4\], expected I32 \["),
        ("awq-gemm", {}, {"version": "gemv"}, "qzeros is I32 .* expected I32"),
        ("nf4", {"weight.absmax": None}, {}, rf"{Q} has no weight.absmax"),
        ("nf4", {"weight.absmax": torch.ones(3)}, {}, "holds 1024 bytes and 3 absmax for 2048 values in blocks of 64"),
        ("nf4-double", {"weight.nested_absmax": torch.ones(3)}, {}, r"absmax is \[3\] for 32 absmax in blocks of 4"),
        (
            "nf4",
            {f"{BNB}nf4": torch.tensor([123], dtype=torch.uint8)},
            {},
            "quant_state of .* does not fit its tensors",
        ),
        (
            "int8",
            {"weight_format": torch.tensor(2, dtype=torch.uint8)},
            {},
            "weight_format is 2, expected 0, rows one after",
        ),
        ("int8", {"SCB": torch.ones(3)}, {}, r"SCB is F32 \[3\], expected F32 \[64\]"),
        ("int8", {"weight": torch.ones(3, dtype=torch.int8)}, {}, r"weight is \[3\], expected a matrix"),
        ("ct-int4", {"weight_shape": torch.tensor([64, 99])}, {}, r"packed is \[64, 4\] for a weight \[64, 99\]"),
        ("ct-int4", {"weight_scale": torch.ones(64, 5)}, {}, r"scale is \[64, 5\], which fits no group of config.json"),
        ("ct-int4-asymmetric", {"weight_zero_point": torch.ones(3)}, {}, r"zero_point does not fit scales \[64, 2\]"),
        (
            "ct-int4-ordered",
            {"weight_g_idx": torch.arange(32)},
            {},
            "g_idx does not name one of 2 groups for each column",
        ),
        (
            "ct-int8",
            {"weight": torch.ones(64, 32)},
            {},
            r"weight is F32 \[64, 32\], expected a matrix of integers or fp8",
        ),
        ("ct-nvfp4", {"weight_global_scale": torch.ones(3)}, {}, r"global_scale is F32 \[3\], expected F32 \[1\]"),
        (
            "fp8-row",
            {"weight_scale": torch.ones(3)},
            {},
            r"is F32 \[3\], which does not fit .*with a scale for all of it or",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_config(source, tmp_path, name, changes, settings, found):
    folder = broken(source, tmp_path / "broken", name, **changes)
    spec = json.loads((folder / "config.json").read_text())["quantization_config"]
    tiny.edit_json(folder / "config.json", quantization_config=spec | settings)
    with pytest.raises(UserError, match=f"do not fit the quantization_config of its config.json.*{found}"):
        TensorFiles.open(folder)


def test_a_config_that_says_otherwise_than_the_tensors(source, tmp_path):
    quantised.quantise(source, tmp_path / "fp8", quantised.FORMATS["fp8-block"])
    config = tmp_path / "fp8" / "config.json"
    tiny.edit_json(config, quantization_config=None)
    with pytest.raises(
        UserError, match=r"are quantised \(fp8.*its config.json has no quantization_config, which says how"
    ):
        load_decoder(tmp_path / "fp8")
    tiny.edit_json(tmp_path / "fp8-plain" / "config.json", quantization_config={"quant_method": "fp8"})
    with pytest.raises(UserError, match=r"no tensor is quantised so \(found: .*F32"):
        TensorFiles.open(tmp_path / "fp8-plain")


def test_biases_of_zeros_that_the_model_does_not_have(source, tmp_path):
    name = "model.layers.0.self_attn.q_proj.bias"
    folder = broken(source, tmp_path / "gptq", "gptq-4", bias=torch.zeros(64, dtype=torch.float16))
    assert load_decoder(folder).cfg.n_layers == 2
    assert name in TensorFiles.open(folder).tensors and name not in Checkpoint.open(folder).tensors
    folder = broken(source, tmp_path / "other", "gptq-4", bias=torch.ones(64, dtype=torch.float16))
    with pytest.raises(UserError, match=f"1 unknown: {name}"):
        load_decoder(folder)


def test_a_copy_in_several_files(source, tmp_path, monkeypatch):
    meant = quantised.quantise(source, tmp_path / "int4", quantised.FORMATS["ct-int4"])
    (tmp_path / "int4" / "recipe.yaml").write_text("of llm-compressor")
    monkeypatch.setattr(rewrite, "SHARD_BYTES", 30_000)
    monkeypatch.setattr(rewrite, "DEQUANTISED_BYTES", 1000)
    report = exported(tmp_path / "int4", tmp_path / "out")
    assert report["verification"]["problems"] == [] and not (tmp_path / "out" / "recipe.yaml").exists()
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["weight_map"].keys() == meant.keys() and set(index["weight_map"].values()) == set(files)
    layers = [index["weight_map"][f"model.layers.{n}.mlp.up_proj.weight"] for n in range(2)]
    assert layers == sorted(layers)
    transformers_agrees(tmp_path / "out")


def test_an_adapter_of_quantised_weights(source, tmp_path):
    quantised.quantise(source, tmp_path / "nf4", quantised.FORMATS["nf4-double"])
    report = exported(tmp_path / "nf4", tmp_path / "lora", form="lora")
    assert report["verification"]["problems"] == []
    assert "verified with, these weights in bfloat16" in (tmp_path / "lora" / "README.md").read_text()


def test_what_is_said_of_quantised_weights(source, tmp_path, caplog):
    quantised.quantise(source, tmp_path / "fp8", quantised.FORMATS["fp8-row"])
    note = read_quantisation(tmp_path / "fp8").note
    assert note.startswith("The weights are dequantised from fp8 with a scale for each row as they are read.")
    with caplog.at_level("INFO", logger="refusal_jax"):
        load_decoder(tmp_path / "fp8")
    assert [record.message for record in caplog.records if note in record.message] == [f"{tmp_path / 'fp8'}: {note}"]
    setup = {"openings": [], "refusal_tokens": [], "bundled_prompts": [], "post_instruction_tokens": []}
    setup |= {"chat_template": "tokenizer", "thinking": False, "refusal_tokens_from": "data"}
    assert setup_lines(setup | {"dequantised": note})[0] == note and note not in setup_lines(setup)


@pytest.mark.parametrize("name", quantised.FORMATS)
def test_a_changed_tensor_is_read_or_is_an_error(name, tmp_path):
    """It is never a failure of our own."""
    settings, store = quantised.FORMATS[name]
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    tensors = {f"m{ending}": t.contiguous() for ending, t in store(weight)[0].items()}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    errors = 0
    for key, tensor in tensors.items():
        shapes = ((), (0,), (1,), (64,), (0, 96), (64, 0), (64, 96), (2, 2, 2))
        for changed in (
            *(torch.zeros(shape, dtype=tensor.dtype) for shape in shapes),
            tensor.reshape(-1).view(torch.uint8),
            None,
        ):
            kept = {k: t for k, t in tensors.items() if k != key} | ({} if changed is None else {key: changed})
            torch_save(kept, tmp_path / SINGLE)
            try:
                files = TensorFiles.open(tmp_path)
                for found, one in files.tensors.items():
                    files.read(found) if one.dtype == "F32" else None
            except UserError:
                errors += 1
    assert errors > 4 * len(tensors)

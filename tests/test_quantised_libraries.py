"""Quantised checkpoints as the formats' own libraries write them, and what these and transformers make of them."""

import json
import pathlib

import families
import numpy as np
import pytest
import quantised
import tiny
import torch
from safetensors.torch import save_file
from tiny import hf_forward, left_padded
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from refusal_jax import Edits, UserError
from refusal_jax.checkpoints.load import load_decoder
from refusal_jax.checkpoints.tensor_files import SINGLE, TensorFiles
from refusal_jax.models.predict import predict
from refusal_jax.taps import Taps

WEIGHT = torch.randn(64, 192, generator=torch.Generator().manual_seed(1))


def stored(folder: pathlib.Path, settings: dict, tensors: dict) -> np.ndarray:
    """The weight of the module "m" that is stored as these tensors, by the endings of their names."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    save_file({f"m{ending}": t.contiguous() for ending, t in tensors.items()}, folder / SINGLE)
    files = TensorFiles.open(folder)
    assert list(files.tensors) == ["m.weight"]
    return files.read("m.weight")


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(64, 192), (30, 50), (7, 9)])  # of whole blocks, and not
def test_bitsandbytes_with_four_bits(kind, double, shape, tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = WEIGHT[: shape[0], : shape[1]].contiguous()
    codes, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=double, blocksize=64)
    tensors = {".weight": codes} | {f".weight.{name}": t for name, t in state.as_dict(packed=True).items()}
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}
    values = stored(tmp_path / "bnb", settings, tensors)
    np.testing.assert_allclose(values, functional.dequantize_4bit(codes, state).numpy(), rtol=2e-7, atol=0)


def test_bitsandbytes_with_int8(tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, absmax, _ = functional.int8_vectorwise_quant(WEIGHT.half())
    values = stored(tmp_path / "bnb", {"load_in_8bit": True}, {".weight": codes, ".SCB": absmax})
    np.testing.assert_array_equal(values, functional.int8_vectorwise_dequant(codes, absmax).numpy())


@pytest.mark.parametrize(
    "form,weights",
    [
        ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}),
        ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "symmetric": False}),
        ("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
        ("pack-quantized", {"num_bits": 3, "type": "int", "strategy": "channel", "symmetric": False}),
        ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}),
        ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "tensor"}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 64]}),
    ],
)
def test_compressed_tensors(form, weights, tmp_path):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**{"symmetric": True} | weights)
    scheme, strategy = QuantizationScheme(targets=["Linear"], weights=args), weights["strategy"]
    rows, columns = {"tensor": WEIGHT.shape, "channel": (1, 192)}.get(strategy, (1, weights.get("group_size", 1)))
    rows, columns = weights.get("block_structure", (rows, columns))
    parts = WEIGHT.reshape(64 // rows, rows, 192 // columns, columns)
    scale, zero = calculate_qparams(parts.amin((1, 3)), parts.amax((1, 3)), args)
    scale = scale.to(torch.bfloat16).reshape(1 if strategy == "tensor" else scale.shape)
    state = {"weight": WEIGHT.bfloat16(), "weight_scale": scale}
    state |= {} if args.symmetric else {"weight_zero_point": zero.to(torch.int8)}
    compressor = BaseCompressor.get_value_from_registry("naive-quantized" if form != "pack-quantized" else form)
    tensors = compressor.compress(state, scheme)
    groups = {"group_0": {"targets": ["Linear"], "weights": args.model_dump(mode="json")}}
    settings = {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}
    values = stored(tmp_path / "ct", settings, {f".{name}": t for name, t in tensors.items()})
    theirs = compressor.decompress(tensors, scheme)["weight"]
    assert theirs.dtype == torch.bfloat16  # the library rounds to the dtype of the scales
    np.testing.assert_array_equal(torch.tensor(values).to(theirs.dtype).float(), theirs.float())
    assert (theirs.float() - WEIGHT).abs().max() < 0.6 * WEIGHT.abs().max()


def logits_agree(folder, settings) -> None:
    """Our logits are those of transformers' model, whose weights it dequantises while loading."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", quantization_config=settings
    ).eval()
    tokens, mask = left_padded((9, 5), 250)
    theirs = hf_forward(model, tokens, mask).logits[:, -1].numpy()
    ours = predict(load_decoder(folder), tokens, mask, Edits.none(32), taps=Taps(), last=True).logits
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)


def test_transformers_with_fp8(tmp_path):
    source = tiny.tiny_llama(tmp_path / "source", head_dim=16, mlp=96, layers=2)
    settings = {"quant_method": "fp8", "weight_block_size": [16, 32]}
    form = settings, lambda weight: quantised.fp8(weight, 16, 32, "_scale_inv")
    quantised.quantise(source, tmp_path / "fp8", form)
    logits_agree(tmp_path / "fp8", FineGrainedFP8Config(weight_block_size=(16, 32), dequantize=True))


def test_gpt_oss_with_mxfp4(tmp_path):
    source = families.tiny_model(tmp_path / "source", "gpt_oss", intermediate_size=64)
    folder = tmp_path / "mxfp4"
    meant = quantised.quantise(source, folder, quantised.MXFP4, r"experts\.(gate_up|down)_proj$")
    files = TensorFiles.open(folder)
    assert files.tensors.keys() == meant.keys()
    for name in (name for name in meant if name.endswith("_proj") and "experts" in name):
        for part in ((), (slice(1, 2), slice(3, 30), slice(2, 40)), (slice(0, 3), slice(5, 6))):
            np.testing.assert_array_equal(files.read(name, part), meant[name].numpy()[part])
        blocks, scales = quantised.mxfp4(meant[name])[0].values()
        theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        np.testing.assert_array_equal(files.read(name), theirs.numpy())
    logits_agree(folder, Mxfp4Config(dequantize=True))
    broken = {
        "x_blocks": torch.zeros(2, 3, 4, 8, dtype=torch.uint8),
        "x_scales": torch.zeros(2, 3, 4, dtype=torch.uint8),
    }
    save_file(broken, folder / SINGLE)
    with pytest.raises(UserError, match=r"x_blocks is U8 \[2, 3, 4, 8\], expected U8 \[2, 3, 4, 16\]"):
        TensorFiles.open(folder)

"""Quantised checkpoints, made of tiny ones by the formats' definitions, each with the weights that it stands for.

A format is a function: from a weight `[out, in]` it makes the tensors that are stored, by the endings of their names, and what
they stand for, written straight from the format's definition, one step after the other, in float32.
"""

import json
import pathlib
from collections.abc import Callable

import torch
from safetensors.torch import load_file, save_file

F8 = torch.float8_e4m3fn
Stored = tuple[dict[str, torch.Tensor], torch.Tensor]


def spread(shared: torch.Tensor, shape, rows: int, columns: int) -> torch.Tensor:
    """What blocks of rows x columns share, for each value of a matrix."""
    return shared.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]]


def fp8(weight: torch.Tensor, rows: int, columns: int, ending: str, shape=None, dtype=torch.float32) -> Stored:
    """fp8 with a scale for each block. shape: that of the stored scales, None: a matrix."""
    grid = [-(-n // most) for n, most in zip(weight.shape, (rows, columns), strict=True)]
    padded = torch.zeros(grid[0] * rows, grid[1] * columns)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    largest = padded.reshape(grid[0], rows, grid[1], columns).abs().amax((1, 3))
    scale = (largest / 448).clamp(min=1e-8)
    scale = torch.exp2(scale.log2().ceil()) if dtype in (torch.uint8, torch.float8_e8m0fnu) else scale.to(dtype).float()
    codes = (weight / spread(scale, weight.shape, rows, columns)).clamp(-448, 448).to(F8)
    kept = (scale.log2() + 127).to(dtype) if dtype == torch.uint8 else scale.to(dtype)
    tensors = {".weight": codes, f".weight{ending}": kept.reshape(shape if shape is not None else kept.shape)}
    return tensors, codes.float() * spread(scale, weight.shape, rows, columns)


def fp8_block(weight: torch.Tensor) -> Stored:
    return fp8(weight, 16, 24, "_scale_inv")


def fp8_tensor(weight: torch.Tensor) -> Stored:
    tensors, values = fp8(weight, *weight.shape, "_scale", shape=())
    return tensors | {".input_scale": torch.tensor(0.5)}, values


def fp8_row(weight: torch.Tensor) -> Stored:
    return fp8(weight, 1, weight.shape[1], "_scale")


def mxfp8(weight: torch.Tensor) -> Stored:
    return fp8(weight, 1, 32, "_scale_inv", dtype=torch.uint8)


# quantization_config and how weights are stored, by a name for the test.
FORMATS: dict[str, tuple[dict, Callable[[torch.Tensor], Stored]]] = {
    "fp8-block": ({"quant_method": "fp8", "weight_block_size": [16, 24], "activation_scheme": "dynamic"}, fp8_block),
    "fp8-tensor": ({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}, fp8_tensor),
    "fp8-row": ({"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]}, fp8_row),
    "mxfp8": ({"quant_method": "fp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}, mxfp8),
}


def quantise(source: pathlib.Path, folder: pathlib.Path, name: str) -> dict[str, torch.Tensor]:
    """Makes of a checkpoint a quantised one, and of the quantised weights one that stands for it, `folder-plain`, in float32.

    Returns all weights that the quantised checkpoint stands for.
    """
    settings, store = FORMATS[name]
    plain = folder.with_name(f"{folder.name}-plain")
    tensors = {n: t for path in sorted(source.glob("*.safetensors")) for n, t in load_file(path).items()}
    stored, meant = {}, {}
    for weight, values in tensors.items():
        if weight.endswith("_proj.weight"):
            found, meant[weight] = store(values.float())
            stored |= {weight.removesuffix(".weight") + ending: t.contiguous() for ending, t in found.items()}
        else:
            stored[weight] = values.to(torch.bfloat16) if values.ndim > 1 else values
            meant[weight] = stored[weight].float()
    config = json.loads((source / "config.json").read_text())
    for target, held, more in ((folder, stored, {"quantization_config": settings}), (plain, meant, {})):
        target.mkdir(parents=True)
        for path in source.iterdir():
            if path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
                (target / path.name).write_bytes(path.read_bytes())
        (target / "config.json").write_text(json.dumps(config | {"dtype": "float32"} | more))
        save_file({n: t.contiguous() for n, t in held.items()}, target / "model.safetensors", {"format": "pt"})
    return meant

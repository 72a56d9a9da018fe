"""fp8 weights with scales for each tensor, row or block: those of DeepSeek, Qwen and Mistral (`fp8`), FBGEMM and ModelOpt."""

import math

import ml_dtypes
import numpy as np
from jaxtyping import Float32

from refusal_jax.checkpoints.quantised.dequantised import Dequantised, Stacked
from refusal_jax.checkpoints.quantised.matrices import Numbers, part, reshaped
from refusal_jax.checkpoints.quantised.parts import Parts
from refusal_jax.checkpoints.tensors import EIGHTS, PlainTensor

SCALES = ("_scale_inv", "_scale")  # behind a weight's name; both are what codes are multiplied by
FLOATS = ("F32", "BF16", "F16")
EXPONENTS = ("F8_E8M0", "U8")  # of scales that are powers of two


def assemble(parts: Parts) -> None:
    """Puts every fp8 weight together with its scales."""
    block = parts.given.settings.get("weight_block_size")
    for name in [name for name, tensor in parts.left.items() if tensor.dtype in EIGHTS and not name.endswith(SCALES)]:
        weight = parts.left.pop(name)
        scales = [parts.left.pop(name + ending) for ending in SCALES if name + ending in parts.left]
        if len(scales) != 1:
            parts.problems.append(f"{name}, {weight.dtype}, has {'two scales' if scales else 'no scale'}")
            continue
        tensor = scaled(parts, weight, scales[0], tuple(block) if block else None)
        if tensor is not None:
            parts.add(name, tensor)


def scaled(
    parts: Parts, weight: PlainTensor, scale: PlainTensor, block: tuple[int, ...] | None
) -> Dequantised | Stacked | None:
    """Returns an fp8 weight `[out, in]` or `[experts, out, in]` with its scales; None, and a problem, if they do not fit.

    block: how many rows and columns share a scale; None: all of the weight, or of a row, by the shape of the scales.
    """
    if len(weight.shape) == 3 and scale.shape[:-2] == weight.shape[:1]:
        pairs = [(part(weight, i), part(scale, i)) for i in range(weight.shape[0])]
        found = [scaled(parts, *pair, block) for pair in pairs]
        whole = tuple(matrix for matrix in found if isinstance(matrix, Dequantised))
        return Stacked(whole) if len(whole) == len(found) else None
    blocks = scale_blocks(weight.shape, scale.shape, block)
    if blocks is None or scale.dtype not in FLOATS + EXPONENTS:
        expected = f"blocks of {' x '.join(map(str, block))}" if block else "a scale for all of it or for each row"
        parts.problems.append(
            f"{scale.name} is {scale.dtype} {list(scale.shape)}, which does not fit {weight.name}, {list(weight.shape)}, with "
            f"{expected}"
        )
        return None
    grid = [-(-size // most) for size, most in zip(weight.shape, blocks, strict=True)]
    meaning = ml_dtypes.float8_e8m0fnu if scale.dtype in EXPONENTS else None
    scales = Numbers(reshaped(scale, *grid), dtype=meaning)
    return Dequantised(weight.name, weight.path, Numbers(weight), scales, blocks, levels_of(weight.dtype))


def scale_blocks(
    weight: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, ...] | None
) -> tuple[int, int] | None:
    """Returns how many rows and columns of a matrix share a scale, None if the scales do not fit. Shapes are given."""
    if len(weight) != 2 or 0 in weight:
        return None
    rows, columns = weight
    if math.prod(scale) == 1:
        return rows, columns
    if block and scale == (-(-rows // block[0]), -(-columns // block[1])):
        return block[0], block[1]
    return (1, columns) if scale in ((rows,), (rows, 1)) else None


def levels_of(dtype: str) -> Float32[np.ndarray, "256"]:
    """Returns the values of the 256 codes of an fp8 dtype, by safetensors' name of it."""
    return np.arange(256, dtype=np.uint8).view(EIGHTS[dtype]).astype(np.float32)

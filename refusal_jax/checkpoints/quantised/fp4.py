"""fp4 (e2m1): mxfp4 as gpt-oss stores its experts, and nvfp4 as ModelOpt and compressed-tensors store weights."""

import ml_dtypes
import numpy as np

from refusal_jax.checkpoints.quantised import fp8
from refusal_jax.checkpoints.quantised.dequantised import Dequantised, Stacked
from refusal_jax.checkpoints.quantised.matrices import Mapped, Numbers, Packed, part, reshaped
from refusal_jax.checkpoints.quantised.parts import Parts
from refusal_jax.checkpoints.tensors import PlainTensor

HALF = np.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
LEVELS = np.concatenate([HALF, -HALF])  # of the 16 codes
MX_BLOCK, NV_BLOCK = 32, 16  # values that share a scale


def assemble_mxfp4(parts: Parts) -> None:
    """Puts the experts of each layer together: blocks `[E, out, in / 32, 16]` with scales `[E, out, in / 32]`, powers of two, are
    the weight `[E, in, out]`."""
    for owner in parts.owners("_blocks"):
        found = parts.need(owner, "_blocks", "_scales")
        if found is None:
            continue
        blocks, scales = found
        shape = blocks.shape
        if len(shape) != 4 or not parts.fits(blocks, (*shape[:3], MX_BLOCK // 2), "U8"):
            parts.problems.append(f"{blocks.name} is {list(shape)}, expected four axes, the last {MX_BLOCK // 2}")
        elif parts.fits(scales, shape[:3], "U8", "F8_E8M0"):
            experts = [_expert(owner, part(blocks, e), part(scales, e)) for e in range(shape[0])]
            parts.add(owner, Stacked(tuple(experts), transposed=True))


def _expert(name: str, blocks: PlainTensor, scales: PlainTensor) -> Dequantised:
    rows, count, half = blocks.shape
    codes = Packed(reshaped(blocks, rows, count * half), 4, 1, count * MX_BLOCK)
    powers = Numbers(scales, dtype=ml_dtypes.float8_e8m0fnu)
    return Dequantised(name, blocks.path, codes, powers, (1, MX_BLOCK), LEVELS)


def assemble_modelopt(parts: Parts) -> None:
    """Puts ModelOpt's fp8 or nvfp4 weights together with their scales."""
    if parts.given.settings["quant_algo"] == "FP8":
        return fp8.assemble(parts)
    for owner in parts.owners(".weight_scale_2"):
        found = parts.need(owner, ".weight", ".weight_scale", ".weight_scale_2")
        if found is None:
            continue
        tensor = nvfp4(parts, f"{owner}.weight", *found, divided=False)
        if tensor is not None:
            parts.add(f"{owner}.weight", tensor)
    return None


def nvfp4(
    parts: Parts, name: str, packed: PlainTensor, scales: PlainTensor, whole: PlainTensor, divided: bool
) -> Dequantised | None:
    """Returns a weight of fp4 codes, fp8 scales of blocks, and one scale of them all, by which those are divided or multiplied;
    None, and a problem, if they do not fit."""
    rows, columns = (packed.shape[0], packed.shape[1] * 2) if len(packed.shape) == 2 else (0, 0)
    fits = [
        parts.fits(packed, (rows, columns // 2), "U8"),
        parts.fits(scales, (rows, columns // NV_BLOCK), "F8_E4M3"),
        parts.fits(whole, whole.shape if whole.shape in ((), (1,)) else (1,), "F32"),
    ]
    if not all(fits):
        return None
    (value,) = parts.read([whole])
    one = value.reshape(())

    def scaled(stored: np.ndarray) -> np.ndarray:
        return stored.astype(np.float32) / one if divided else stored.astype(np.float32) * one

    codes = Packed(packed, 4, 1, columns)
    return Dequantised(name, packed.path, codes, Mapped(Numbers(scales), scaled), (1, NV_BLOCK), LEVELS)

"""compressed-tensors, the format of llm-compressor: integers packed or not, fp8, and nvfp4, with scales for tensors, rows, groups
of columns or blocks, and zeros where quantisation is asymmetric.

Which of config.json's groups a weight belongs to is told by its tensors' shapes and dtypes, so patterns of names need not be
matched.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from refusal_jax.checkpoints.quantised import fp8
from refusal_jax.checkpoints.quantised.dequantised import Dequantised
from refusal_jax.checkpoints.quantised.fp4 import nvfp4
from refusal_jax.checkpoints.quantised.matrices import Mapped, Matrix, Numbers, Packed, reshaped
from refusal_jax.checkpoints.quantised.parts import Parts
from refusal_jax.checkpoints.tensors import EIGHTS, PlainTensor

SCALES = ("F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How the weights of one of config.json's groups are quantised. block: rows and columns that share a scale, as far as it is
    said."""

    bits: int
    block: tuple[int, int] | None

    @classmethod
    def of(cls, weights: Mapping) -> "Scheme":
        """Reads the `weights` of a group."""
        block, size = weights.get("block_structure"), weights.get("group_size")
        bits = weights.get("num_bits")
        bits = bits if type(bits) is int and 1 <= bits <= 8 else 8
        if isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block):
            return cls(bits, (block[0], block[1]))
        return cls(bits, (1, size) if type(size) is int and size > 0 else None)


def assemble(parts: Parts) -> None:
    """Puts every weight together with its shape, scales, zeros and the groups of its columns."""
    groups = [group["weights"] for group in parts.given.settings["config_groups"].values() if group.get("weights")]
    schemes = [Scheme.of(weights) for weights in groups if isinstance(weights, Mapping)]
    for owner in parts.owners(".weight_global_scale"):
        found = parts.need(owner, ".weight_packed", ".weight_scale", ".weight_global_scale")
        tensor = nvfp4(parts, f"{owner}.weight", *found, divided=True) if found is not None else None
        if tensor is not None:
            parts.add(f"{owner}.weight", tensor)
    _assemble_packed(parts, schemes)
    for owner in parts.owners(".weight_scale"):
        found = parts.need(owner, ".weight", ".weight_scale")
        zeros = parts.take(f"{owner}.weight_zero_point")
        if found is None:
            continue
        if len(found[0].shape) == 3 and found[0].dtype in EIGHTS and zeros is None:  # all experts of a layer
            stacked = fp8.scaled(parts, found[0], found[1], next((s.block for s in schemes if s.bits == 8), None))
            if stacked is not None:
                parts.add(f"{owner}.weight", stacked)
        else:
            _add(parts, owner, schemes, found[0], found[1], zeros, None)


def _assemble_packed(parts: Parts, schemes: list[Scheme]) -> None:
    needed = []
    for owner in parts.owners(".weight_packed"):
        found = parts.need(owner, ".weight_packed", ".weight_scale", ".weight_shape")
        zeros, order = (parts.take(f"{owner}.weight_{name}") for name in ("zero_point", "g_idx"))
        if found is not None:
            needed.append((owner, found, zeros, order))
    shapes = parts.read([found[2] for _, found, _, _ in needed])
    orders = iter(parts.read([order for *_, order in needed if order is not None]))
    for (owner, (packed, scales, _), zeros, order), shape in zip(needed, shapes, strict=True):
        groups = next(orders) if order is not None else None
        rows, columns = (int(n) for n in shape) if shape.shape == (2,) else (0, 0)
        bits = {s.bits for s in schemes if packed.shape == (rows, -(-columns * s.bits // 32))}
        if len(bits) != 1 or not parts.fits(packed, packed.shape, "I32"):
            parts.problems.append(f"{packed.name} is {list(packed.shape)} for a weight {shape.tolist()}")
            continue
        one = Packed(packed, bits.pop(), 1, columns)
        _add(parts, owner, schemes, one, scales, zeros, groups)


def _add(
    parts: Parts,
    owner: str,
    schemes: list[Scheme],
    stored: PlainTensor | Packed,
    scales: PlainTensor,
    zeros: PlainTensor | None,
    groups: np.ndarray | None,
) -> None:
    """Adds a weight, or a problem if its tensors do not fit. groups: of each column, if they are stored."""
    name, path = f"{owner}.weight", scales.path
    bits = stored.bits if isinstance(stored, Packed) else 8
    kind = "I8" if isinstance(stored, Packed) else stored.dtype
    if len(stored.shape) != 2 or kind not in ("I8", *EIGHTS):
        parts.problems.append(f"{name} is {kind} {list(stored.shape)}, expected a matrix of integers or fp8")
        return
    blocks = next(
        (b for s in schemes if s.bits == bits and (b := fp8.scale_blocks(stored.shape, scales.shape, s.block))), None
    )
    if blocks is None or not parts.fits(scales, scales.shape, *SCALES):
        parts.problems.append(f"{scales.name} is {list(scales.shape)}, which fits no group of config.json for {name}")
        return
    grid = tuple(-(-size // most) for size, most in zip(stored.shape, blocks, strict=True))
    offset = 1 << (bits - 1) if isinstance(stored, Packed) else 0  # packed integers are stored as if unsigned
    zero: Matrix | int | None = offset if zeros is None else _zeros(zeros, grid, bits, offset)
    if zero is None:
        parts.problems.append(f"{owner}.weight_zero_point does not fit scales {list(grid)}")
        return
    if groups is not None and groups.shape == stored.shape[1:]:
        after_another = np.array_equal(groups, np.arange(len(groups)) // blocks[1])
        groups = None if (groups < 0).all() or after_another else groups  # then it need not be said
    if groups is not None and (groups.shape != stored.shape[1:] or groups.min() < 0 or groups.max() >= grid[1]):
        parts.problems.append(f"{owner}.weight_g_idx does not name one of {grid[1]} groups for each column")
        return
    codes = stored if isinstance(stored, Packed) else Numbers(stored)
    levels = fp8.levels_of(kind) if kind in EIGHTS else None
    blocks = blocks if groups is None else (blocks[0], 1)
    parts.add(name, Dequantised(name, path, codes, Numbers(reshaped(scales, *grid)), blocks, levels, zero, groups))


def _zeros(zeros: PlainTensor, grid: tuple[int, ...], bits: int, offset: int) -> Matrix | None:
    """Returns zeros for each scale, None if they do not fit. offset: what is added to packed integers, and to their zeros."""
    if zeros.dtype == "I32" and offset and zeros.shape == (-(-grid[0] * bits // 32), grid[1]):
        return Packed(zeros, bits, 0, grid[0])
    if math.prod(zeros.shape) != math.prod(grid):
        return None
    return Mapped(Numbers(reshaped(zeros, *grid)), lambda stored: stored.astype(np.float32) + np.float32(offset))

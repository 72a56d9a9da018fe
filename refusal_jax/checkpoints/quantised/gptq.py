"""GPTQ: integers of 2, 3, 4 or 8 bits, packed along the inputs, with scales and zeros for groups of inputs.

Zeros are stored less one (`gptq`) or as they are (`gptq_v2`). With desc_act the inputs of a group do not stand together, and
g_idx names the group of each.
"""

import numpy as np

from refusal_jax.checkpoints.quantised.dequantised import Dequantised
from refusal_jax.checkpoints.quantised.matrices import Mapped, Numbers, Packed
from refusal_jax.checkpoints.quantised.parts import Parts
from refusal_jax.checkpoints.tensors import PlainTensor
from refusal_jax.models.quantisation import GPTQ_BITS


def assemble(parts: Parts) -> None:
    """Puts every weight together with its scales and zeros."""
    needed = []
    for owner in parts.owners(".qweight"):
        found, order = parts.need(owner, ".qweight", ".qzeros", ".scales"), parts.take(f"{owner}.g_idx")
        if found is not None:
            needed.append((owner, found, order))
    orders = iter(parts.read([order for _, _, order in needed if order is not None]))
    for owner, found, order in needed:
        groups = next(orders) if order is not None else None
        tensor = grouped(parts, owner, found, groups)
        if tensor is not None:
            parts.add(f"{owner}.weight", tensor)


def grouped(parts: Parts, owner: str, found: list[PlainTensor], groups: np.ndarray | None) -> Dequantised | None:
    """Returns a weight `[out, in]`; None, and a problem, if its tensors do not fit. groups: g_idx, if it is stored."""
    (weight, zeros, scales), settings = found, parts.given.settings
    if any(len(tensor.shape) != 2 or 0 in tensor.shape for tensor in found):
        parts.problems.append(f"{owner} has tensors of other than two axes, or empty ones")
        return None
    count, rows = scales.shape
    bits = zeros.shape[1] * 32 // rows
    # GPTQModel may name other bits and groups for some modules (`dynamic`), which the shapes tell.
    if bits not in GPTQ_BITS or (bits != settings["bits"] and not settings.get("dynamic")):
        parts.problems.append(f"{zeros.name} is {list(zeros.shape)} beside scales {list(scales.shape)}, {bits} bits")
        return None
    columns = weight.shape[0] * 32 // bits
    size = parts.given.setting("group_size", int, -1)
    if size < 1 or -(-columns // size) != count:
        size = -(-columns // count) if size < 1 or settings.get("dynamic") else size
    expected = (-(-columns // size), rows)
    fits = [
        parts.fits(weight, (columns * bits // 32, rows), "I32"),
        parts.fits(scales, expected, "F16", "BF16", "F32"),
        parts.fits(zeros, (expected[0], -(-rows * bits // 32)), "I32"),
    ]
    if groups is not None:
        fits.append(groups_fit(parts, owner, groups, (columns, size, count)))
    if not all(fits):
        return None
    ordered = groups is not None and not np.array_equal(groups, np.arange(columns) // size)
    return Dequantised(
        f"{owner}.weight",
        weight.path,
        Packed(weight, bits, 0, columns, transposed=True),
        Numbers(scales, transposed=True),
        (1, 1 if ordered else size),
        zeros=Mapped(Packed(zeros, bits, 1, rows, transposed=True), Zeros(bits, settings)),
        groups=groups if ordered else None,
    )


def groups_fit(parts: Parts, owner: str, groups: np.ndarray, sizes: tuple[int, int, int]) -> bool:
    """Returns whether a g_idx fits the columns, the size of a group and the number of groups; it is a problem if not."""
    columns, size, count = sizes
    found = ""
    if groups.shape != (columns,) or groups.min(initial=0) < 0 or groups.max(initial=0) >= count:
        least, most = groups.min(initial=0), groups.max(initial=0)
        found = f"is {list(groups.shape)} from {least} to {most}, expected {columns} numbers below {count}"
    elif not parts.given.settings.get("desc_act") and not np.array_equal(groups, np.arange(columns) // size):
        found = f"orders the inputs otherwise than in groups of {size}, but desc_act is not set"
    if found:
        parts.problems.append(f"{owner}.g_idx {found}")
    return not found


class Zeros:
    """Makes of stored zeros what is subtracted.

    Some tools write zeros as they are and name the format whose zeros are less one. Where quantisation is symmetric, the zero is
    known to be the middle, which tells the two apart.
    """

    def __init__(self, bits: int, settings):
        self.less_one = settings.get("checkpoint_format") != "gptq_v2"
        self.middle = 1 << (bits - 1) if settings.get("sym") else None
        self.most = (1 << bits) - 1

    def __call__(self, stored: np.ndarray) -> np.ndarray:
        if not self.less_one or (self.middle is not None and (stored == self.middle).all()):
            return stored
        return (stored + np.uint8(1)) & np.uint8(self.most)

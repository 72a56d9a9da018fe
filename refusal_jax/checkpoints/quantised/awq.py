"""AWQ: integers of 4 bits with scales and zeros for groups of inputs, packed along the outputs (gemm) or the inputs (gemv)."""

from refusal_jax.checkpoints.quantised.dequantised import Dequantised
from refusal_jax.checkpoints.quantised.matrices import Numbers, Packed
from refusal_jax.checkpoints.quantised.parts import Parts
from refusal_jax.checkpoints.tensors import PlainTensor

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output of each number of a word, in the layout for gemm
BITS, IN_A_WORD = 4, 8


def assemble(parts: Parts) -> None:
    """Puts every weight together with its scales and zeros."""
    gemv = parts.given.setting("version", str, "gemm").lower() == "gemv"
    for owner in parts.owners(".qweight"):
        found = parts.need(owner, ".qweight", ".qzeros", ".scales")
        if found is None:
            continue
        tensor = (_gemv if gemv else _gemm)(parts, owner, *found)
        if tensor is not None:
            parts.add(f"{owner}.weight", tensor)


def group_size(parts: Parts, columns: int) -> int:
    """Returns how many inputs share a scale."""
    size = parts.given.setting("group_size", int, parts.given.setting("q_group_size", int, -1))
    return size if size > 0 else max(columns, 1)


def _gemm(parts: Parts, owner: str, weight: PlainTensor, zeros: PlainTensor, scales: PlainTensor) -> Dequantised | None:
    columns, rows = (weight.shape[0], weight.shape[1] * IN_A_WORD) if len(weight.shape) == 2 else (0, 0)
    size = group_size(parts, columns)
    count = -(-columns // size)
    fits = [
        parts.fits(weight, (columns, rows // IN_A_WORD), "I32"),
        parts.fits(zeros, (count, rows // IN_A_WORD), "I32"),
        parts.fits(scales, (count, rows), "F16", "BF16", "F32"),
    ]
    if not all(fits):
        return None
    return Dequantised(
        f"{owner}.weight",
        weight.path,
        Packed(weight, BITS, 1, rows, ORDER, transposed=True),
        Numbers(scales, transposed=True),
        (1, size),
        zeros=Packed(zeros, BITS, 1, rows, ORDER, transposed=True),
    )


def _gemv(parts: Parts, owner: str, weight: PlainTensor, zeros: PlainTensor, scales: PlainTensor) -> Dequantised | None:
    rows, columns = (weight.shape[0], weight.shape[1] * IN_A_WORD) if len(weight.shape) == 2 else (0, 0)
    size = group_size(parts, columns)
    count = -(-columns // size)
    words = -(-count // IN_A_WORD)
    padded = -(-words // (multiple := {64: 2, 32: 4}.get(size, 1))) * multiple
    fits = [
        parts.fits(weight, (rows, columns // IN_A_WORD), "I32"),
        parts.fits(zeros, (rows, padded), "I32"),
        parts.fits(scales, (rows, padded * IN_A_WORD), "F16", "BF16", "F32"),
    ]
    if not all(fits):
        return None
    return Dequantised(
        f"{owner}.weight",
        weight.path,
        Packed(weight, BITS, 1, columns),
        Numbers(scales),
        (1, size),
        zeros=Packed(zeros, BITS, 1, count),
    )

"""Dequantises GGUF's blocks of values, with NumPy and outside Python's lock, so that several threads can at a time.

The arithmetic is that of the gguf library, bit for bit, and many times as fast, because every step works on whole
arrays. Layouts are ggml's: a block holds scales and then the values' bits, of which a byte holds
those of values that lie half a group apart. Types without an entry here are left to the library.
"""

from collections.abc import Callable

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import IQ4_NL, MXFP4, dequantize
from jaxtyping import Float32, Shaped, UInt8

PLAIN = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
BY_LIBRARY = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0")  # rare
BLOCKS = 1 << 10  # at a time: their values stay in a core's cache

Out = np.ndarray  # float32, `[blocks, values of a block]`


def dequantise(
    kind: GGMLQuantizationType, data: UInt8[np.ndarray, "n size"], out: Float32[np.ndarray, "n values"]
) -> None:
    """Writes the values of whole blocks of a type of `READABLE` to `out`."""
    if kind in PLAIN:
        out[:] = data.view(PLAIN[kind])
        return
    with np.errstate(
        over="ignore", invalid="ignore"
    ):  # damaged scales; what is not finite is reported once all is loaded
        if kind not in _UNPACK:
            out[:] = dequantize(data, kind)
            return
        step = BLOCKS * 256 // out.shape[1]
        for at in range(0, len(data), step):
            _UNPACK[kind](data[at : at + step], out[at : at + step])


def as_bfloat16(values: Float32[np.ndarray, "n m"], out: Shaped[np.ndarray, "n m"]) -> None:
    """Rounds what `dequantise` made of quantised blocks to bfloat16, to the nearest and to even, as a cast does: in NumPy's own
    numbers, because casts to bfloat16 hold Python's lock."""
    bits = values.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    np.right_shift(rounded, 16, out=out.view(np.uint16), casting="unsafe")


def _cut(data: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Returns bytes of each block, one block's after the other's; as one item each, which NumPy copies ten times as fast."""
    return data[:, start:stop].view(f"V{stop - start}").copy().view(np.uint8)


def _half(data: np.ndarray, at: int) -> np.ndarray:
    """Returns the float16 at byte `at` of each block, `[n, 1]`."""
    values = data[:, at : at + 2].view(np.float16).astype(np.float32)
    np.copyto(values, np.nan, where=np.isnan(values))  # of one kind, which `as_bfloat16` relies on
    return values


def _woven(parts: list[np.ndarray], run: int, shape: tuple[int, ...]) -> np.ndarray:
    """Returns runs of bytes of several arrays in turn: the first of each, the second of each, and so on."""
    out = np.empty((parts[0].size // run, len(parts)), f"V{run}")
    for i, part in enumerate(parts):
        out[:, i] = part.reshape(-1, run).view(out.dtype)[:, 0]
    return out.view(np.uint8).reshape(shape)


def _nibbles(packed: np.ndarray, run: int, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the lower halves of `run` bytes, then their upper halves, and so on."""
    return _woven([packed & 15, packed >> 4], run, shape)


def _fields(packed: np.ndarray, bits: int, run: int, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the lowest bits of `run` bytes, then the next ones, and so on."""
    return _woven([packed >> i & (1 << bits) - 1 for i in range(0, 8, bits)], run, shape)


def _write(out: Out, numbers: np.ndarray, less: int, scales: np.ndarray, minima: np.ndarray | None = None) -> None:
    """Writes small whole numbers, less `less`, times the scale of their group, `[n, groups]`, less the group's minimum."""
    numbers = numbers.view(np.int8)
    numbers -= np.int8(less)
    out[:] = numbers.reshape(out.shape)
    groups = out.reshape(*scales.shape, -1)
    groups *= scales[:, :, None]
    if minima is not None:
        groups -= minima[:, :, None]


def _q4_0(data: np.ndarray, out: Out) -> None:
    _write(out, _nibbles(_cut(data, 2, 18), 16, out.shape), 8, _half(data, 0))


def _q4_1(data: np.ndarray, out: Out) -> None:
    _write(out, _nibbles(_cut(data, 4, 20), 16, out.shape), 0, _half(data, 0))
    out += _half(data, 2)


def _fives(data: np.ndarray, at: int, shape: tuple[int, ...]) -> np.ndarray:
    """Returns numbers of five bits, whose highest bits stand apart, in the order of the values."""
    numbers = _nibbles(_cut(data, at + 4, at + 20), 16, shape)
    bits = np.unpackbits(_cut(data, at, at + 4).reshape(-1), bitorder="little").reshape(shape)
    bits <<= 4
    numbers |= bits
    return numbers


def _q5_0(data: np.ndarray, out: Out) -> None:
    _write(out, _fives(data, 2, out.shape), 16, _half(data, 0))


def _q5_1(data: np.ndarray, out: Out) -> None:
    _write(out, _fives(data, 4, out.shape), 0, _half(data, 0))
    out += _half(data, 2)


def _q8_0(data: np.ndarray, out: Out) -> None:
    _write(out, _cut(data, 2, 34), 0, _half(data, 0))


def _q8_k(data: np.ndarray, out: Out) -> None:
    scales = data[:, :4].view(np.float32)
    _write(out, _cut(data, 4, 260), 0, np.where(np.isnan(scales), np.float32(np.nan), scales))


def _q2_k(data: np.ndarray, out: Out) -> None:
    scales = data[:, :16]
    numbers = _fields(_cut(data, 16, 80), 2, 32, (len(data), 4, 2, 32))
    _write(out, numbers, 0, _half(data, 80) * (scales & 15), _half(data, 82) * (scales >> 4))


def _q3_k(data: np.ndarray, out: Out) -> None:
    low, top = data[:, 96:104], data[:, 104:108]  # of the scales' six bits
    scales = np.empty((len(data), 4, 4), np.uint8)
    for i in range(4):
        scales[:, i] = (low[:, i % 2 * 4 : i % 2 * 4 + 4] >> i // 2 * 4 & 15) | (top >> 2 * i & 3) << 4
    numbers = _fields(_cut(data, 32, 96), 2, 32, out.shape)
    numbers |= _fields(_cut(data, 0, 32), 1, 32, out.shape) << 2
    _write(out, numbers, 4, _half(data, 108) * (scales.reshape(-1, 16).astype(np.float32) - 32))


def _six_bit_scales(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the scales and minima of the eight groups of Q4_K and Q5_K, `[n, 8]`, which take 12 bytes."""
    a, b, c = data[:, 4:8], data[:, 8:12], data[:, 12:16]
    scales, minima = np.empty((2, len(data), 8), np.float32)
    scales[:, :4], minima[:, :4] = a & 63, b & 63
    scales[:, 4:], minima[:, 4:] = c & 15 | a >> 2 & 48, c >> 4 | b >> 2 & 48
    scales *= _half(data, 0)
    minima *= _half(data, 2)
    return scales, minima


def _q4_k(data: np.ndarray, out: Out) -> None:
    _write(out, _nibbles(_cut(data, 16, 144), 32, out.shape), 0, *_six_bit_scales(data))


def _q5_k(data: np.ndarray, out: Out) -> None:
    numbers = _nibbles(_cut(data, 48, 176), 32, out.shape)
    numbers |= _fields(_cut(data, 16, 48), 1, 32, out.shape) << 4
    _write(out, numbers, 0, *_six_bit_scales(data))


def _q6_k(data: np.ndarray, out: Out) -> None:
    numbers = _nibbles(_cut(data, 0, 128), 64, out.shape)
    numbers |= _fields(_cut(data, 128, 192), 2, 32, out.shape) << 4
    _write(out, numbers, 32, _half(data, 208) * data[:, 192:208].view(np.int8))


def _by_table(table: tuple[int, ...], packed: np.ndarray, run: int, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the numbers of a table that the halves of bytes name, as `_nibbles` orders them."""
    return np.asarray(table, np.int8)[_nibbles(packed, run, shape)]


def _iq4_nl(data: np.ndarray, out: Out) -> None:
    _write(out, _by_table(IQ4_NL.kvalues, _cut(data, 2, 18), 16, out.shape), 0, _half(data, 0))


def _iq4_xs(data: np.ndarray, out: Out) -> None:
    low, high = data[:, 4:8], data[:, 2:4, None] >> np.asarray([0, 2, 4, 6], np.uint8) & 3
    scales = np.stack([low & 15, low >> 4], axis=-1).reshape(-1, 8) | high.reshape(-1, 8) << 4
    numbers = _by_table(IQ4_NL.kvalues, _cut(data, 8, 136), 16, out.shape)
    _write(out, numbers, 0, _half(data, 0) * (scales.astype(np.float32) - 32))


def _mxfp4(data: np.ndarray, out: Out) -> None:
    _write(out, _by_table(MXFP4.kvalues, _cut(data, 1, 17), 16, out.shape), 0, MXFP4.e8m0_to_fp32_half(data[:, :1]))


_UNPACK: dict[GGMLQuantizationType, Callable[[np.ndarray, Out], None]] = {
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q5_0: _q5_0,
    GGMLQuantizationType.Q5_1: _q5_1,
    GGMLQuantizationType.Q8_0: _q8_0,
    GGMLQuantizationType.Q8_K: _q8_k,
    GGMLQuantizationType.Q2_K: _q2_k,
    GGMLQuantizationType.Q3_K: _q3_k,
    GGMLQuantizationType.Q4_K: _q4_k,
    GGMLQuantizationType.Q5_K: _q5_k,
    GGMLQuantizationType.Q6_K: _q6_k,
    GGMLQuantizationType.IQ4_NL: _iq4_nl,
    GGMLQuantizationType.IQ4_XS: _iq4_xs,
    GGMLQuantizationType.MXFP4: _mxfp4,
}
UNPACKED = tuple(_UNPACK)
READABLE = (*PLAIN, *UNPACKED, *(GGMLQuantizationType[name] for name in BY_LIBRARY))


def block_of(kind: GGMLQuantizationType) -> tuple[int, int]:
    """Returns how many values a block of a type holds, and how many bytes it takes."""
    return GGML_QUANT_SIZES[kind]

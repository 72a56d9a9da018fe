"""Quantised checkpoints, made of tiny ones by the formats' definitions, each with the weights that it stands for.

A format is a function: from a weight `[out, in]` it makes the tensors that are stored, by the endings of their names, and what
they stand for, written straight from the format's definition, one step after the other, in float32.
"""

import json
import pathlib
import re
from collections.abc import Callable

import torch
from safetensors.torch import load_file, save_file

F8 = torch.float8_e4m3fn
Stored = tuple[dict[str, torch.Tensor], torch.Tensor]


def spread(shared: torch.Tensor, shape, rows: int, columns: int) -> torch.Tensor:
    """Repeats what blocks of rows x columns share for each value of a matrix."""
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


def grouped(weight: torch.Tensor, bits: int, size: int, symmetric: bool, dtype=torch.float16):
    """Unsigned codes with scales and zeros of groups of columns; all are matrices of the weight's rows."""
    rows, columns = weight.shape
    parts = torch.nn.functional.pad(weight, (0, -columns % size)).reshape(rows, -1, size)
    most = (1 << bits) - 1
    low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scale = ((high - low) / most).clamp(min=1e-4).to(dtype)
    zero = torch.full_like(scale, 1 << (bits - 1)) if symmetric else (-low / scale.float()).round().clamp(0, most)
    each = [spread(one.float(), weight.shape, 1, size) for one in (scale, zero)]
    codes = (weight / each[0] + each[1]).round().clamp(0, most)
    return codes.int(), scale, zero.int(), (codes - each[1]) * each[0]


def pack(codes: torch.Tensor, bits: int, order=None) -> torch.Tensor:
    """Codes as bits, the lowest first, one row after the other, in words of 32; order: the column of each number of a word."""
    rows, columns = codes.shape
    if order is not None:
        codes = codes.reshape(rows, -1, len(order))[..., list(order)].reshape(rows, columns)
    all_bits = [int(c) >> i & 1 for c in codes.flatten().tolist() for i in range(bits)]
    table = torch.tensor(all_bits, dtype=torch.int64).reshape(rows, -1)
    table = torch.nn.functional.pad(table, (0, -table.shape[1] % 32)).reshape(rows, -1, 32)
    words = (table << torch.arange(32)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def gptq(
    bits: int, size: int = 32, symmetric: bool = True, version: int = 1, ordered: bool = False, says: int | None = None
):
    def store(weight: torch.Tensor) -> Stored:
        columns = weight.shape[1]
        order = (
            torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
            if ordered
            else torch.arange(columns)
        )
        one = columns if size < 1 else size
        codes, scale, zero, values = grouped(weight[:, order], bits, one, symmetric)
        back = torch.argsort(order)
        kept = (zero - int(version == 1)) & ((1 << bits) - 1)
        tensors = {
            ".qweight": pack(codes[:, back], bits).T,
            ".scales": scale.T,
            ".qzeros": pack(kept.T, bits),
            ".g_idx": (back // one).int(),
        }
        return tensors, values[:, back]

    settings = {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": symmetric, "desc_act": ordered}
    return settings | {"checkpoint_format": {1: "gptq", 2: "gptq_v2"}[says or version]}, store


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def awq_gemm(weight: torch.Tensor) -> Stored:
    codes, scale, zero, values = grouped(weight, 4, 32, False)
    tensors = {".qweight": pack(codes.T, 4, AWQ_ORDER), ".qzeros": pack(zero.T, 4, AWQ_ORDER), ".scales": scale.T}
    return tensors, values


def awq_gemv(weight: torch.Tensor) -> Stored:
    codes, scale, zero, values = grouped(weight, 4, 32, False)
    more = 32 - scale.shape[1]  # a multiple of 4 words
    padded = [torch.nn.functional.pad(one, (0, more)) for one in (zero, scale)]
    return {".qweight": pack(codes, 4), ".qzeros": pack(padded[0], 4), ".scales": padded[1]}, values


NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334)
NF4 += (-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194972992, 0.33791524171829224)
NF4 += (0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
FP4 = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)
FP4 += tuple(-value for value in FP4)


def nearest(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    return (values[..., None] - levels).abs().argmin(-1)


def bnb(kind: str, double: bool, block: int = 64, skip: int = 0):
    """bitsandbytes with 4 bits. skip: how many columns a weight is cut short by, so that blocks run over rows."""

    def store(weight: torch.Tensor) -> Stored:
        levels = torch.tensor(NF4 if kind == "nf4" else FP4)
        flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % block)).reshape(-1, block)
        absmax = flat.abs().amax(1)
        codes = nearest(flat / absmax[:, None], levels).flatten()[: weight.numel()]
        padded = torch.nn.functional.pad(codes, (0, len(codes) % 2)).reshape(-1, 2)
        state = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(weight.shape)}
        tensors = {".weight": (padded[:, :1] * 16 + padded[:, 1:]).to(torch.uint8), ".weight.quant_map": levels}
        tensors[".weight.absmax"] = absmax
        if double:
            map8 = torch.linspace(-1, 1, 256)
            offset = absmax.mean()
            rest = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % 4)).reshape(-1, 4)
            nested = rest.abs().amax(1)
            codes8 = nearest(rest / nested[:, None], map8).flatten()[: len(absmax)]
            absmax = map8[codes8] * nested.repeat_interleave(4)[: len(absmax)] + offset
            tensors |= {
                ".weight.absmax": codes8.to(torch.uint8),
                ".weight.nested_absmax": nested,
                ".weight.nested_quant_map": map8,
            }
            state |= {"nested_blocksize": 4, "nested_dtype": "float32", "nested_offset": offset.item()}
        text = json.dumps(state).encode()
        tensors[f".weight.quant_state.bitsandbytes__{kind}"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return tensors, (levels[codes] * absmax.repeat_interleave(block)[: len(codes)]).reshape(weight.shape)

    settings = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": kind,
    }
    return settings | {"bnb_4bit_use_double_quant": double, "llm_int8_skip_modules": ["lm_head"]}, store


def int8(weight: torch.Tensor) -> Stored:
    absmax = weight.abs().amax(1)
    codes = (weight * 127 / absmax[:, None]).round().to(torch.int8)
    tensors = {".weight": codes, ".SCB": absmax, ".weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, codes.float() * absmax[:, None] * 7.874015718698502e-3


def compressed(form: str, store, **weights):
    """The settings of compressed-tensors with one group of weights."""
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}, store


def ct_packed(bits: int, size: int, symmetric: bool, ordered: bool = False):
    def store(weight: torch.Tensor) -> Stored:
        columns = weight.shape[1]
        order = (
            torch.randperm(columns, generator=torch.Generator().manual_seed(7)) if ordered else torch.arange(columns)
        )
        one = columns if size < 1 else size
        codes, scale, zero, values = grouped(weight[:, order], bits, one, symmetric, torch.bfloat16)
        back = torch.argsort(order)
        tensors = {
            ".weight_packed": pack(codes[:, back], bits),
            ".weight_scale": scale,
            ".weight_shape": torch.tensor(weight.shape),
        }
        tensors |= {} if symmetric else {".weight_zero_point": pack(zero.T, bits).T}
        tensors |= {".weight_g_idx": (back // one).int()} if ordered else {}
        return tensors, values[:, back]

    strategy = {"strategy": "channel"} if size < 1 else {"strategy": "group", "group_size": size}
    return compressed("pack-quantized", store, num_bits=bits, type="int", symmetric=symmetric, **strategy)


def ct_int8(symmetric: bool):
    def store(weight: torch.Tensor) -> Stored:
        codes, scale, zero, values = grouped(weight, 8, weight.shape[1], symmetric, torch.bfloat16)
        tensors = {".weight": (codes - 128).to(torch.int8), ".weight_scale": scale}
        return tensors | ({} if symmetric else {".weight_zero_point": (zero - 128).to(torch.int8)}), values

    return compressed("int-quantized", store, num_bits=8, type="int", symmetric=symmetric, strategy="channel")


def ct_fp8(strategy: str, rows: int, columns: int, **more):
    def store(weight: torch.Tensor) -> Stored:
        sizes = [n if most < 1 else most for n, most in zip(weight.shape, (rows, columns), strict=True)]
        return fp8(weight, *sizes, "_scale", dtype=torch.bfloat16)

    return compressed("float-quantized", store, num_bits=8, type="float", symmetric=True, strategy=strategy, **more)


E2M1 = torch.tensor((0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6))


def nvfp4(weight: torch.Tensor, multiplied: bool) -> Stored:
    """fp4 in blocks of 16 with fp8 scales, which one scale of the weight is multiplied to (ModelOpt), or divides."""
    whole = (weight.abs().max() / (6 * 448)).reshape(())
    scale = (weight.reshape(len(weight), -1, 16).abs().amax(-1) / 6 / whole).to(F8)
    other = whole if multiplied else 1 / whole
    each = scale.float() * other if multiplied else scale.float() / other
    codes = nearest(weight / spread(each, weight.shape, 1, 16), E2M1)
    packed = (codes[:, 1::2] * 16 + codes[:, ::2]).to(torch.uint8)
    names = (".weight", ".weight_scale_2") if multiplied else (".weight_packed", ".weight_global_scale")
    tensors = {names[0]: packed, ".weight_scale": scale, names[1]: other if multiplied else other.reshape(1)}
    return tensors, E2M1[codes] * spread(each, weight.shape, 1, 16)


# quantization_config and how weights are stored, by a name for the test.
FORMATS: dict[str, tuple[dict, Callable[[torch.Tensor], Stored]]] = {
    "fp8-block": (
        {"quant_method": "fp8", "weight_block_size": [16, 24], "modules_to_not_convert": ["mlp.gate", "lm_head"]},
        fp8_block,
    ),
    "fp8-tensor": ({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}, fp8_tensor),
    "fp8-row": ({"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]}, fp8_row),
    "mxfp8": ({"quant_method": "fp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}, mxfp8),
    "modelopt-fp8": ({"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["lm_head"]}, fp8_tensor),
    "modelopt-nvfp4": ({"quant_method": "modelopt", "quantization": {"quant_algo": "NVFP4"}}, lambda w: nvfp4(w, True)),
    "nf4": bnb("nf4", False),
    "nf4-double": bnb("nf4", True),
    "fp4-double": bnb("fp4", True, block=128),
    "int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}, int8),
    "gptq-4": gptq(4),
    "gptq-8-v2-asymmetric": gptq(8, symmetric=False, version=2),
    "gptq-4-ordered-asymmetric": gptq(4, symmetric=False, ordered=True),
    "gptq-3-ordered": gptq(3, ordered=True, version=2),
    "gptq-2-rows-asymmetric": gptq(2, size=-1, symmetric=False),
    "gptq-4-mislabelled": gptq(4, version=2, says=1),
    "awq-gemm": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}, awq_gemm),
    "awq-gemv": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "GEMV", "zero_point": True}, awq_gemv),
    "ct-int4": ct_packed(4, 32, True),
    "ct-int4-asymmetric": ct_packed(4, 16, False),
    "ct-int4-ordered": ct_packed(4, 16, True, ordered=True),
    "ct-int8-packed-rows": ct_packed(8, -1, True),
    "ct-int3": ct_packed(3, 32, True),
    "ct-int8": ct_int8(True),
    "ct-int8-asymmetric": ct_int8(False),
    "ct-fp8-row": ct_fp8("channel", 1, -1),
    "ct-fp8-tensor": ct_fp8("tensor", -1, -1),
    "ct-fp8-block": ct_fp8("block", 16, 32, block_structure=[16, 32]),
    "ct-nvfp4": compressed("nvfp4-pack-quantized", lambda w: nvfp4(w, False), num_bits=4, type="float", group_size=16),
}


def mxfp4(weight: torch.Tensor) -> Stored:
    """gpt-oss's experts `[E, in, out]`: blocks of 32 inputs with a scale that is a power of two."""
    turned = weight.transpose(1, 2)
    parts = turned.reshape(*turned.shape[:2], -1, 32)
    power = (parts.abs().amax(-1) / 6).log2().ceil().clamp(-126, 126)
    codes = nearest(parts / torch.exp2(power)[..., None], E2M1)
    blocks = (codes[..., 1::2] * 16 + codes[..., ::2]).to(torch.uint8)
    values = (E2M1[codes] * torch.exp2(power)[..., None]).reshape(turned.shape).transpose(1, 2)
    return {"_blocks": blocks, "_scales": (power + 127).to(torch.uint8)}, values.contiguous()


MXFP4 = ({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}, mxfp4)


def quantise(
    source: pathlib.Path, folder: pathlib.Path, form, chosen: str = r"_proj\.weight$"
) -> dict[str, torch.Tensor]:
    """Makes of a checkpoint a quantised one, and of the quantised weights one that stands for it, `folder-plain`, in float32.

    form: quantization_config and how weights are stored. chosen: a pattern of the names of the weights. Returns all weights that
    the quantised checkpoint stands for.
    """
    settings, store = form
    plain = folder.with_name(f"{folder.name}-plain")
    tensors = {n: t for path in sorted(source.glob("*.safetensors")) for n, t in load_file(path).items()}
    stored, meant = {}, {}
    for weight, values in tensors.items():
        if re.search(chosen, weight):
            found, meant[weight] = store(values.float())
            stored |= {weight.removesuffix(".weight") + ending: t.contiguous().clone() for ending, t in found.items()}
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

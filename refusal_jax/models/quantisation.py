"""Reads from `quantization_config` in a config.json by which method the weights of a checkpoint were quantised, and how.

Which methods can be read is decided here, so that a config alone tells it. How tensors are read is in checkpoints/quantised.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from refusal_jax.errors import UserError, shown
from refusal_jax.files import read_json

KEYS = ("quantization_config", "compression_config")  # the latter is the older name of compressed-tensors
GGUF = "gguf"  # the method that the mirror of a GGUF file names, with the types of its tensors
METHODS = ("fp8", "fbgemm_fp8", "modelopt", "bitsandbytes", "gptq", "awq", "compressed-tensors", "mxfp4")
ALIASES = {"compressed_tensors": "compressed-tensors"}
# AutoRound stores weights as GPTQ or AWQ do, if it is told to.
AUTO_ROUND = ("auto-round", "intel/auto-round")
AUTO_ROUND_PACKING = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}
AWQ_VERSIONS, GPTQ_FORMATS, GPTQ_BITS = ("gemm", "exllama", "gemv"), ("gptq", "gptq_v2"), (2, 3, 4, 8)
# The formats of compressed-tensors, and what the weights in each are called.
COMPRESSED_FORMATS = {
    "pack-quantized": "packed integers",
    "int-quantized": "integers",
    "float-quantized": "fp8",
    "naive-quantized": "integers or fp8",
    "mixed-precision": "several formats",
    "dense": "plain numbers",
    "nvfp4-pack-quantized": "nvfp4",
}


@dataclasses.dataclass(frozen=True)
class Quantisation:
    """How the weights of a checkpoint are quantised.

    method: one of METHODS, or GGUF. settings: the quantization_config. what: the format, in words. activations: whether the
    format's own runtime quantises activations too.
    """

    method: str
    settings: Mapping[str, Any]
    what: str
    activations: bool = False

    @property
    def note(self) -> str:
        """Returns a sentence that says how the weights are read, and what is not computed."""
        text = f"The weights are dequantised from {self.what} as they are read."
        if self.activations:
            text += " The format's own runtime quantises activations too, which is not computed here."
        if self.settings.get("kv_cache_scheme") or self.settings.get("kv_cache_quant_algo"):
            text += " Nor is the cache of keys and values quantised, as it may be there."
        return text

    def setting(self, name: str, kind: type, default=None) -> Any:
        """Returns a setting of this type, or the default where it is missing or null. Raises UserError for another type."""
        value = self.settings.get(name)
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise unreadable(f"{name} = {shown(value)} is no {kind.__name__}")
        return value


def unreadable(found: str) -> UserError:
    """Returns the error for a quantization_config that says something that cannot be read."""
    return UserError(
        f"The quantization_config of config.json cannot be read: {found}. Use the original float16, bfloat16 or float32 "
        f"checkpoint of the model, or one quantised with {', '.join(METHODS)}."
    )


def quantisation_of(hf: Mapping) -> Quantisation | None:
    """Returns how the weights are quantised by a config.json, of a multimodal model those of its text part; None: they are not.

    Raises UserError for methods and variants that cannot be read.
    """
    text = hf.get("text_config")
    parts = [hf, text] if isinstance(text, Mapping) else [hf]
    found = next((part[key] for part in parts for key in KEYS if part.get(key)), None)
    if found is None:
        return None
    if not isinstance(found, Mapping):
        raise unreadable(f"it is {shown(found)}, expected an object with a quant_method")
    bits = found.get("load_in_4bit") or found.get("load_in_8bit")
    method = found.get("quant_method") or ("bitsandbytes" if bits else None)
    method = ALIASES.get(str(method), method)
    if method in AUTO_ROUND:
        method = AUTO_ROUND_PACKING.get(str(found.get("packing_format")), f"{method}, {found.get('packing_format')}")
    if method == GGUF and isinstance(found.get("types"), list):
        return Quantisation(GGUF, found, f"GGUF ({', '.join(map(str, found['types']))})")
    if method not in METHODS:
        raise unreadable(f"quant_method = {shown(method)} is not supported")
    plain = Quantisation(str(method), found, str(method))
    return DESCRIBE[plain.method](plain)


def read_quantisation(folder: pathlib.Path) -> Quantisation | None:
    """Returns how the weights of a checkpoint folder are quantised; None where they are not, or nothing says so.

    Raises UserError as `quantisation_of` does.
    """
    path = folder / "config.json"
    return quantisation_of(read_json(path)) if path.is_file() else None


def without_quantisation(hf: Mapping) -> dict:
    """Returns a config.json without what it says of quantisation, in its text part neither."""
    left = {key: value for key, value in hf.items() if key not in KEYS}
    if isinstance(left.get("text_config"), Mapping):
        left["text_config"] = {key: value for key, value in left["text_config"].items() if key not in KEYS}
    return left


def _fp8(given: Quantisation) -> Quantisation:
    block = given.settings.get("weight_block_size")
    if block is not None and (
        not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block)
    ):
        raise unreadable(f"weight_block_size = {shown(block)}, expected two positive integers")
    if given.settings.get("expert_dtype") not in (None, "fp8"):
        raise unreadable(f"expert_dtype = {shown(given.settings['expert_dtype'])} is not supported")
    what = f"fp8 with a scale for {f'each block of {block[0]} x {block[1]}' if block else 'each tensor'}"
    return dataclasses.replace(given, what=what, activations=True)


def _fbgemm(given: Quantisation) -> Quantisation:
    return dataclasses.replace(given, what="fp8 with a scale for each row", activations=True)


def _modelopt(given: Quantisation) -> Quantisation:
    inner = given.settings.get("quantization")
    settings = {**given.settings, **inner} if isinstance(inner, Mapping) else given.settings
    algorithm = settings.get("quant_algo")
    if algorithm not in ("FP8", "NVFP4"):
        raise unreadable(f"quant_method = 'modelopt' with quant_algo = {shown(algorithm)} is not supported")
    return Quantisation("modelopt", settings, f"ModelOpt's {str(algorithm).lower()}", True)


def _bitsandbytes(given: Quantisation) -> Quantisation:
    if given.settings.get("load_in_8bit"):
        return dataclasses.replace(given, what="bitsandbytes int8", activations=True)
    kind = given.setting("bnb_4bit_quant_type", str, "fp4")
    if kind not in ("nf4", "fp4"):
        raise unreadable(f"bnb_4bit_quant_type = {shown(kind)}, expected nf4 or fp4")
    double = " with double quantisation" * bool(given.settings.get("bnb_4bit_use_double_quant"))
    return dataclasses.replace(given, what=f"bitsandbytes {kind}{double}")


def _gptq(given: Quantisation) -> Quantisation:
    form = given.settings.get("checkpoint_format") or "gptq"
    if form not in GPTQ_FORMATS or given.settings.get("is_marlin_format"):
        raise unreadable(
            f"checkpoint_format = {shown(form if form not in GPTQ_FORMATS else 'marlin')} is not supported"
        )
    bits = given.setting("bits", int)
    if bits not in GPTQ_BITS:
        raise unreadable(f"bits = {shown(bits)} of GPTQ, expected one of {', '.join(map(str, GPTQ_BITS))}")
    return dataclasses.replace(given, what=f"GPTQ with {bits} bits")


def _awq(given: Quantisation) -> Quantisation:
    version = given.setting("version", str, "gemm").lower()
    bits = given.setting("bits", int, given.setting("w_bit", int, 4))
    if version not in AWQ_VERSIONS or bits != 4:
        raise unreadable(
            f"AWQ with version = {shown(version)} and bits = {shown(bits)}, expected 4 bits and {', '.join(AWQ_VERSIONS)}"
        )
    if given.settings.get("backend") not in (None, "autoawq", "llm-awq", "gptqmodel", "auto") or version == "marlin":
        raise unreadable(f"AWQ with backend = {shown(given.settings['backend'])} is not supported")
    return dataclasses.replace(given, what="AWQ with 4 bits")


def _compressed(given: Quantisation) -> Quantisation:
    form = given.settings.get("format") or "dense"
    groups = given.settings.get("config_groups")
    if form not in COMPRESSED_FORMATS:
        raise unreadable(f"format = {shown(form)} of compressed-tensors is not supported")
    sparse = given.settings.get("sparsity_config")
    if isinstance(sparse, Mapping) and sparse.get("format") not in (None, "dense"):
        raise unreadable(f"sparsity_config with format = {shown(sparse['format'])} is not supported")
    if given.settings.get("transform_config"):
        raise unreadable(f"transform_config = {shown(given.settings['transform_config'])} is not supported")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise unreadable(f"config_groups = {shown(groups)}, expected an object of objects")
    activations = any(
        group.get(key) for group in groups.values() for key in ("input_activations", "output_activations")
    )
    return dataclasses.replace(
        given, what=f"compressed-tensors, {form} ({COMPRESSED_FORMATS[form]})", activations=activations
    )


def _mxfp4(given: Quantisation) -> Quantisation:
    return dataclasses.replace(given, what="mxfp4")


DESCRIBE: dict[str, Callable[[Quantisation], Quantisation]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm,
    "modelopt": _modelopt,
    "bitsandbytes": _bitsandbytes,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
    "mxfp4": _mxfp4,
}

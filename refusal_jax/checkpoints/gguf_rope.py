"""Makes HF's `rope_scaling` of what a GGUF file says of its rope: in its metadata, and in tensors of factors."""

import itertools
import math
from typing import Any

import numpy as np

from refusal_jax.checkpoints.gguf_metadata import Metadata, plain
from refusal_jax.checkpoints.gguf_tensors import as_values
from refusal_jax.errors import shown

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
LLAMA_3_SPANS = (8192, 4096, 16384, 32768)  # tokens of the context before rescaling; 8192 in all models of Meta


def rope_scaling(read: Metadata, config: dict) -> dict | None:
    """Returns HF's `rope_scaling` of a model, None if there is none."""
    kind, factor = scaling_kind(read), read.take("rope.scaling.factor", float) or read.take("rope.scale_linear", float)
    read.seen.add("rope.scale_linear")
    span = read.take("rope.scaling.original_context_length", int)
    if kind != "longrope":
        read.only("rope.scaling.attn_factor", 1.0)
    scaling = None
    if kind in ("linear", "yarn") and factor not in (None, 0.0, 1.0):
        scaling = {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            scaling |= {"original_max_position_embeddings": span or config["max_position_embeddings"]} | _yarn(read)
    elif kind == "longrope":
        scaling = longrope(read, config, span)
    if "rope_freqs.weight" in read.header.tensors:
        if scaling:
            read.problems.append(f"rope_freqs.weight together with a rope of type {kind}")
        scaling = _by_factors(read, config)
    return scaling


def scaling_kind(read: Metadata) -> str:
    """Returns the kind of a rope's rescaling: llama.cpp takes a factor without a kind for a linear one."""
    read.seen.add("rope.scaling.type")
    kind = read.header.metadata.get(f"{read.architecture}.rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn", "longrope"):
        read.problems.append(f"{read.architecture}.rope.scaling.type = {shown(kind)} is not supported")
        return "none"
    return kind


def _yarn(read: Metadata) -> dict:
    read.only("rope.scaling.yarn_ext_factor", 1.0)
    names = {"attention_factor": "attn_factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow"}
    found = {name: read.take(f"rope.scaling.yarn_{key}", float) for name, key in names.items()}
    return {name: value for name, value in found.items() if value is not None}


def factors_of(read: Metadata, name: str, config: dict) -> list[float]:
    """Returns the numbers that a tensor divides the frequencies of rotated pairs by."""
    stored, pairs = read.header.tensors.get(name), (config["head_dim"] or 0) // 2
    values = as_values(stored) if stored else np.empty(0, np.float32)
    if not len(values) or len(values) > pairs or not (np.isfinite(values) & (values > 0)).all():
        read.problems.append(f"{name} is missing or malformed, expected {pairs} positive numbers or fewer")
        return [1.0]
    return [plain(float(value)) for value in values]


def longrope(read: Metadata, config: dict, span: int | None) -> dict | None:
    """Returns LongRoPE's settings, if the file has its factors: Phi-3's own files with a short context have none."""
    if ROPE_TENSORS[1] not in read.header.tensors:
        return None
    span = span or config["max_position_embeddings"] or 1
    scaling: dict[str, Any] = {"rope_type": "longrope", "original_max_position_embeddings": span}
    scaling |= {f"{kind}_factor": factors_of(read, f"rope_factors_{kind}.weight", config) for kind in ("short", "long")}
    attention, grown = read.take("rope.scaling.attn_factor", float), (config["max_position_embeddings"] or 1) / span
    usual = math.sqrt(1 + math.log(grown) / math.log(span)) if grown > 1 and span > 1 else 1.0
    if attention is not None and abs(attention - usual) > 1e-5:
        scaling["attention_factor"] = attention
    return scaling


def _by_factors(read: Metadata, config: dict) -> dict | None:
    """Returns the settings of a rope whose pairs are slowed by given factors: Llama 3's formula where it gives them, else as
    LongRoPE of one length, which computes the same."""
    factors = np.asarray(factors_of(read, ROPE_TENSORS[0], config))
    if (factors == 1).all() or 2 * len(factors) != config["head_dim"]:
        if 2 * len(factors) != config["head_dim"]:
            read.problems.append(
                f"{ROPE_TENSORS[0]} has {len(factors)} numbers, expected {(config['head_dim'] or 0) // 2}"
            )
        return None
    turns = config["rope_theta"] ** -(np.arange(len(factors)) / len(factors)) / (2 * math.pi)  # in a token
    most = float(factors.max())
    for high, span in itertools.product((4.0, 1.0), LLAMA_3_SPANS):  # 1 in Llama 4
        kept = np.clip((span * turns - 1) / 3, 0, 1) if high > 1 else np.float64(span * turns > 1)
        if np.allclose(1 / ((1 - kept) / most + kept), factors, rtol=2e-6):
            names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            return {"rope_type": "llama3"} | dict(zip(names, (most, 1.0, high, span), strict=True))
    listed = factors.tolist()
    span = {"original_max_position_embeddings": config["max_position_embeddings"], "attention_factor": 1.0}
    return {"rope_type": "longrope", "short_factor": listed, "long_factor": listed} | span


def whole_heads(read: Metadata, config: dict) -> dict:
    """Returns the rope of an architecture that rotates whole heads."""
    read.only("rope.dimension_count", config["head_dim"])
    return {"rope_scaling": rope_scaling(read, config)}

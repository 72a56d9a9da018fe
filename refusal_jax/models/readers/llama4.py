"""Reads configs of Llama 4: its text model, alone or in the multimodal one.

Most layers rotate queries and keys and see a chunk of the text; the others do neither, and their queries grow with the position.
"""

import dataclasses
from functools import partial

from refusal_jax.errors import shown
from refusal_jax.models.config import AttentionKind, ModelConfig
from refusal_jax.models.hf_attributes import Reader
from refusal_jax.models.rope import Rope


def llama4(read: Reader, family: str) -> ModelConfig:
    """Reads Llama 4. An expert reads its input times its score; one expert is shared by all tokens."""
    sizes = read.sizes(LLAMA4)
    read.ignore("for_llm_compressor")
    bias = read.take("attention_bias", False, bool)
    rope = read.main_rope(sizes, 5e5, interleaved=True)
    return read.config(
        family,
        sizes,
        rope=rope,
        kinds=_kinds(read, sizes, rope),
        qkv_bias=bias,
        o_bias=bias,
        **_mixture(read, sizes),
    )


# What its config class supplies.
LLAMA4 = {
    "vocab_size": 202048,
    "d_model": 5120,
    "n_layers": 48,
    "n_heads": 40,
    "n_kv_heads": 8,
    "head_dim": 128,
    "d_mlp": 8192,
    "context_length": 131072,
    "norm_eps": 1e-5,
}


def _kinds(read: Reader, sizes: dict, rope: Rope) -> list[AttentionKind]:
    """Reads each layer's kind. `no_rope_layers` says 1 where there is a rope; an empty list says nothing."""
    count, every = sizes["n_layers"], read.take("no_rope_layer_interval", 4, int)
    roped = read.take("no_rope_layers") or [int((layer + 1) % every > 0) for layer in range(count)]
    if not isinstance(roped, list) or len(roped) < count or not all(flag in (0, 1) for flag in roped):
        read.problems.append(f"no_rope_layers = {shown(roped)}, expected 0 or 1 for each of {count} layers")
        roped = [1] * count
    chunk = read.take_optional("attention_chunk_size", 8192, int)
    types = read.take("layer_types")
    if types is None:
        types = ["chunked_attention" if flag and chunk else "full_attention" for flag in roped[:count]]
    known = isinstance(types, list) and all(kind in ("full_attention", "chunked_attention") for kind in types)
    if not known or len(types) != count:
        read.problems.append(
            f"layer_types = {shown(types)}, expected 'full_attention' or 'chunked_attention' for each of {count} layers"
        )
        types = ["full_attention"] * count
    elif chunk is None and "chunked_attention" in types:
        read.problems.append("attention_chunk_size is null, but there are layers of type 'chunked_attention'")
    unit_eps = sizes["norm_eps"] if read.take("use_qk_norm", True, bool) else None
    still = _tuned(read, rope.off())
    return [
        AttentionKind(
            rope if flag else still,
            chunk=chunk if kind == "chunked_attention" else None,
            unit_eps=unit_eps if flag else None,
        )
        for flag, kind in zip(roped, types, strict=False)
    ]


def _tuned(read: Reader, still: Rope) -> Rope:
    """Returns the rope that is none, with the growth of its queries. Older files have a number for whether there is any."""
    tuned, span = read.take("attn_temperature_tuning", True), read.take("floor_scale", 8192, int)
    growth = 0.0 if read.take("attn_scale", 0.1) == 0 else read.take("attn_scale", 0.1, float)
    if not isinstance(tuned, int) or tuned < 0:
        read.problems.append(f"attn_temperature_tuning = {shown(tuned)}, expected true or false")
    if not tuned or not growth:
        return still
    return dataclasses.replace(still, query_growth=float(growth), original_context=span, query_first=1)


def _mixture(read: Reader, sizes: dict) -> dict:
    """Reads which layers have experts, and how wide the MLP of the others is."""
    count = sizes["n_layers"]
    sparse = read.take("moe_layers")
    every = read.take("interleave_moe_layer_step", 1, int, least=0 if sparse is not None else 1)
    if sparse is None:
        sparse = list(range(every - 1, count, every))
    if not isinstance(sparse, list) or not all(type(layer) is int for layer in sparse):
        read.problems.append(f"moe_layers = {shown(sparse)}, expected a list of layers")
        sparse = []
    named = set(sparse)
    dense = tuple(layer for layer in range(count) if layer not in named)
    least = int(len(dense) < count)  # where no layer has experts, the file may say that there are none
    experts = read.take("num_local_experts", 16, int, least=least)
    used = read.take("num_experts_per_tok", 1, int, least=least)
    if used > experts:
        read.problems.append(f"num_experts_per_tok = {used} is more than the {experts} experts")
    width = read.take("intermediate_size_mlp", 16384, int)
    return {
        "n_experts": max(experts, 1),
        "experts_per_token": used,
        "router_scores": "sigmoid",
        "weighted_inputs": True,
        "d_shared": sizes["d_mlp"],
        "dense_layers": dense,
        "d_dense": width if dense else 0,
    }


READERS = {family: partial(llama4, family=family) for family in ("llama4", "llama4_text")}

"""Reads configs of Qwen3-Next and Qwen 3.5, in most of whose layers a gated delta rule stands where others have attention.

Qwen 3.6 and 3.8 have the model types of Qwen 3.5.
"""

from functools import partial

from refusal_jax.errors import shown
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.hf_attributes import Reader
from refusal_jax.models.mixers.attention import Attention
from refusal_jax.models.mixers.delta import DeltaRule
from refusal_jax.models.readers.mixtures import experts, qwen_dense

FULL, LINEAR = "full_attention", "linear_attention"
OLD_TYPES = {"attention": FULL, "mamba": LINEAR}  # which transformers renames


def _types(read: Reader, count: int) -> list[str]:
    """Reads the kind of each layer: FULL or LINEAR."""
    every, types = read.take("full_attention_interval", 4, int), read.take("layer_types")
    if types is None:
        return [LINEAR if (layer + 1) % every else FULL for layer in range(count)]
    known = isinstance(types, list) and all(kind in (FULL, LINEAR, *OLD_TYPES) for kind in types)
    if not known or len(types) != count:
        read.problems.append(
            f"layer_types = {shown(types)}, expected {FULL!r} or {LINEAR!r} for each of {count} layers"
        )
        return [FULL] * count
    return [str(OLD_TYPES.get(kind, kind)) for kind in types]


def _delta_rule(read: Reader, by_head: bool) -> DeltaRule:
    """Reads the sizes of the delta rule. by_head: as in `DeltaRule`."""
    keys, values = read.take("linear_num_key_heads", 16, int), read.take("linear_num_value_heads", 32, int)
    if values % keys:
        read.problems.append(f"linear_num_value_heads = {values} is not a multiple of linear_num_key_heads = {keys}")
    key_dim, value_dim = (read.take(f"linear_{part}_head_dim", 128, int) for part in ("key", "value"))
    width = read.take("linear_conv_kernel_dim", 4, int, least=2)
    return DeltaRule(keys, values, key_dim, value_dim, width, by_head)


def _hybrid(read: Reader, family: str, sizes: dict, by_head: bool = False, **switches) -> ModelConfig:
    """Reads what all of them share. switches: fields of `ModelConfig`."""
    mixers = {LINEAR: _delta_rule(read, by_head), FULL: Attention(gated=True)}
    types = _types(read, sizes["n_layers"])
    used = [kind for kind in mixers if kind in types]
    bias = read.take("attention_bias", False, bool)
    read.only("attn_output_gate", True)  # which transformers does not read
    read.only("output_gate_type", "swish")  # nor this: the gate of the delta rule's norm
    return read.config(
        family,
        sizes,
        rope=read.main_rope(sizes, partial=read.take("partial_rotary_factor", 0.25, float)),
        norm_offset=1.0,
        qk_norm="head",
        qkv_bias=bias,
        o_bias=bias,
        mixers=tuple(mixers[kind] for kind in used),
        layer_mixers=tuple(map(used.index, types)),
        **switches,
    )


def _mixture(read: Reader, count: int, chosen: int, renormalise: bool) -> dict:
    """Reads the experts, and the one of each layer that every token goes through."""
    shared = read.take("shared_expert_intermediate_size", 512, int)
    return experts(read, count, chosen, renormalise) | {"d_shared": shared, "shared_gate": True}


def _qwen3_next(read: Reader) -> ModelConfig:
    sizes = read.sizes(
        {"n_kv_heads": 2, "head_dim": 256, "context_length": 32768, "d_mlp": 512}, d_mlp="moe_intermediate_size"
    )
    switches = _mixture(read, 512, 10, read.take("norm_topk_prob", True, bool))
    switches |= qwen_dense(read, sizes["n_layers"], 5632)
    return _hybrid(read, "qwen3_next", sizes, by_head=True, **switches)


def _qwen3_5(read: Reader, family: str) -> ModelConfig:
    return _hybrid(
        read, family, read.sizes({"n_kv_heads": 4, "head_dim": 256, "context_length": 32768, "d_mlp": 12288})
    )


def _qwen3_5_moe(read: Reader, family: str) -> ModelConfig:
    sizes = read.sizes(
        {"n_kv_heads": 2, "head_dim": 256, "context_length": 32768, "d_mlp": 512}, d_mlp="moe_intermediate_size"
    )
    read.only("norm_topk_prob", True)
    return _hybrid(read, family, sizes, **_mixture(read, 256, 8, True))


READERS = {
    "qwen3_next": _qwen3_next,
    **{name: partial(_qwen3_5, family=name) for name in ("qwen3_5", "qwen3_5_text")},
    **{name: partial(_qwen3_5_moe, family=name) for name in ("qwen3_5_moe", "qwen3_5_moe_text")},
}

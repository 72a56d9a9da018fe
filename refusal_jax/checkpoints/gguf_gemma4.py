"""Makes HF's config of Gemma 4 from the metadata of its GGUF files."""

from refusal_jax.checkpoints.gguf_metadata import Metadata, windows
from refusal_jax.checkpoints.gguf_rope import ROPE_TENSORS, factors_of
from refusal_jax.errors import shown

STILL = 1e29  # a pair that is slowed down as much is not rotated


def gemma4(read: Metadata, config: dict) -> dict:
    """Reads the text model of Gemma 4. The usual keys tell the size of heads in layers that see all tokens."""
    count, theta = min(config["num_hidden_layers"] or 0, len(read.header.tensors)), config.pop("rope_theta")
    window = read.take("attention.sliding_window", int, required=True)
    types = windows(read, config, 6)[:count]
    wide, narrow = config["head_dim"], read.take("attention.key_length_swa", int, required=True)
    for ending, width in (("", wide), ("_swa", narrow)):
        read.only(f"rope.dimension_count{ending}", width)
    read.only("attention.value_length_swa", narrow)
    shared = read.take("attention.shared_kv_layers", int, 0)
    local = read.take("rope.freq_base_swa", float, 10000.0)
    told = read.header.tensors.get("per_layer_token_embd.weight")
    return {
        "model_type": "gemma4_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": narrow,
        "global_head_dim": wide,
        "sliding_window": window,
        "layer_types": types,
        "num_kv_shared_layers": shared,
        "final_logit_softcapping": read.take("final_logit_softcapping", float) or None,
        "hidden_size_per_layer_input": read.take("embedding_length_per_layer_input", int, 0),
        "vocab_size_per_layer_input": told.shape[0] if told else None,
        "rope_parameters": {
            "full_attention": {"rope_theta": theta} | _proportional(read, wide),
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
        **_heads(read, types, shared),
        **_widths(read, count, shared),
        **_experts(read),
    }


def _proportional(read: Metadata, width: int | None) -> dict:
    """Returns the rope of layers that see all tokens, which rotates the first pairs of a head only. Files slow the others down
    so much that they stand still."""
    factors = factors_of(read, ROPE_TENSORS[0], {"head_dim": width})
    turned = sum(factor == 1 for factor in factors)
    expected = [1.0] * turned + [STILL] * (len(factors) - turned)
    if 2 * len(factors) != width or any(
        not (a == b or a >= b == STILL) for a, b in zip(factors, expected, strict=True)
    ):
        read.problems.append(
            f"{ROPE_TENSORS[0]} holds {shown(factors)}, expected for each of {(width or 0) // 2} pairs 1, or 1e30 behind these"
        )
    return {"rope_type": "proportional", "partial_rotary_factor": turned / len(factors)}


def _heads(read: Metadata, types: list[str], shared: int) -> dict:
    """Returns the numbers of key/value heads of both kinds of layers, and whether values are made as keys are: where a layer that
    sees all tokens lacks the matrix of its values."""
    counts = read.each("attention.head_count_kv", len(types))
    kinds = {kind: {n for n, own in zip(counts, types, strict=True) if own == kind} for kind in sorted(set(types))}
    for kind, found in kinds.items():
        if len(found) > 1:
            read.problems.append(
                f"gemma4.attention.head_count_kv = {shown(counts)}, expected one number for all {kind} layers"
            )
    first = next((layer for layer, kind in enumerate(types[: len(types) - shared]) if kind == "full_attention"), 0)
    made = not any(f"blk.{first}.attn_{part}.weight" in read.header.tensors for part in ("v", "qkv"))
    full = max(kinds.get("full_attention", {1}))
    heads = {"num_key_value_heads": max(kinds.get("sliding_attention", {full})), "attention_k_eq_v": made}
    return heads | ({"num_global_key_value_heads": full} if made else {})


def _widths(read: Metadata, count: int, shared: int) -> dict:
    """Returns the width of MLPs, which may be twice as wide in layers that use keys and values of others."""
    widths = read.each("feed_forward_length", count)
    narrow = widths[0] if widths else 1
    double = any(width != narrow for width in widths)
    expected = [narrow * (1 + (double and layer >= count - shared)) for layer in range(count)]
    if widths != expected:
        read.problems.append(
            f"gemma4.feed_forward_length = {shown(widths)}, expected one number, twice as much in the last {shared} layers or not"
        )
    return {"intermediate_size": narrow, "use_double_wide_mlp": double}


def _experts(read: Metadata) -> dict:
    """Returns the experts beside the MLP, which the largest model has."""
    read.only("expert_gating_func", 1)  # softmax
    experts = read.take("expert_count", int, 0)
    names = {"top_k_experts": "expert_used_count", "moe_intermediate_size": "expert_feed_forward_length"}
    sizes = {name: read.take(key, int, required=bool(experts)) for name, key in names.items()}
    return {"enable_moe_block": True, "num_experts": experts} | sizes if experts else {"enable_moe_block": False}

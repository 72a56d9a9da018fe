"""Makes HF's config of hybrid models from the metadata of their GGUF files."""

from refusal_jax.checkpoints.gguf_metadata import Metadata
from refusal_jax.checkpoints.gguf_rope import rope_scaling, whole_heads


def _types(read: Metadata, config: dict, ending: str, kinds: tuple[str, str]) -> list[str]:
    """Returns the kind of each layer, of two: the first where it has the tensor of that name, else the second."""
    count, tensors = config["num_hidden_layers"] or 0, read.header.tensors
    return [kinds[f"blk.{layer}.{ending}" not in tensors] for layer in range(min(count, len(tensors)))]


def _share(read: Metadata, config: dict) -> float:
    """Returns the share of a head that is rotated."""
    rotated = read.take("rope.dimension_count", int, config["head_dim"])
    return rotated / config["head_dim"] if config["head_dim"] else 1.0


def granite_hybrid(read: Metadata, config: dict) -> dict:
    """Reads Granite 4, whose layers without a rope a file tells by a key that other architectures do not use."""
    heads, inner = (read.take(f"ssm.{key}", int, required=True) or 1 for key in ("time_step_rank", "inner_size"))
    if inner % (config["hidden_size"] or 1) or inner % heads:
        read.problems.append(
            f"granitehybrid.ssm.inner_size = {inner} is no multiple of the residual stream and the heads"
        )
    experts = read.take("expert_count", int, 0)
    shared = read.take("expert_shared_feed_forward_length", int) or config["intermediate_size"]
    rope = read.header.metadata.get("granitehybrid.rope.scaling.finetuned") is True
    return whole_heads(read, config) | {
        "model_type": "granitemoehybrid",
        "layer_types": _types(read, config, "ssm_in.weight", ("mamba", "attention")),
        "position_embedding_type": "rope" if rope else "nope",
        "mamba_n_heads": heads,
        "mamba_d_head": inner // heads,
        "mamba_expand": inner // (config["hidden_size"] or 1),
        "mamba_d_state": read.take("ssm.state_size", int, required=True),
        "mamba_n_groups": read.take("ssm.group_count", int, required=True),
        "mamba_d_conv": read.take("ssm.conv_kernel", int, required=True),
        "mamba_conv_bias": read.has("ssm_conv1d.bias"),
        "mamba_proj_bias": False,
        "attention_bias": read.has("attn_q.bias"),
        "num_local_experts": experts,
        "num_experts_per_tok": read.take("expert_used_count", int, 0),
        "shared_intermediate_size": shared,
        "attention_multiplier": read.take("attention.scale", float, (config["head_dim"] or 1) ** -0.5),
        "embedding_multiplier": read.take("embedding_scale", float, 1.0),
        "residual_multiplier": read.take("residual_scale", float, 1.0),
        "logits_scaling": read.take("logit_scale", float, 1.0),
    }


def qwen35(read: Metadata, config: dict) -> dict:
    """Reads Qwen 3.5. Sections of its rope are for images."""
    values, inner = (read.take(f"ssm.{key}", int, required=True) or 1 for key in ("time_step_rank", "inner_size"))
    read.seen |= {"rope.dimension_sections", "full_attention_interval"}
    return {
        "model_type": "qwen3_5_text",
        "layer_types": _types(read, config, "ssm_a", ("linear_attention", "full_attention")),
        "rope_scaling": rope_scaling(read, config),
        "partial_rotary_factor": _share(read, config),
        "linear_num_key_heads": read.take("ssm.group_count", int, required=True),
        "linear_num_value_heads": values,
        "linear_key_head_dim": read.take("ssm.state_size", int, required=True),
        "linear_value_head_dim": inner // values,
        "linear_conv_kernel_dim": read.take("ssm.conv_kernel", int, required=True),
        "attention_bias": read.has("attn_q.bias"),
    }


def qwen35_moe(read: Metadata, config: dict) -> dict:
    """Reads the mixtures of Qwen 3.5, and Qwen3-Next, which computes the same with weights that its checkpoints fuse."""
    read.only("expert_gating_func", 1)  # softmax
    read.only("expert_weights_norm", True)
    return qwen35(read, config) | {
        "model_type": "qwen3_5_moe_text",
        "num_experts": read.take("expert_count", int, required=True),
        "num_experts_per_tok": read.take("expert_used_count", int, required=True),
        "moe_intermediate_size": read.take("expert_feed_forward_length", int, required=True),
        "shared_expert_intermediate_size": read.take("expert_shared_feed_forward_length", int, required=True),
        "intermediate_size": None,
    }


def qwen3_next(read: Metadata, config: dict) -> dict:
    if read.has("ssm_in.weight"):
        read.problems.append("its tensors ssm_in are those of an early converter; convert the model again")
    return qwen35_moe(read, config)


def nemotron_h(read: Metadata, config: dict) -> dict:
    """Reads Nemotron-H, each of whose layers is what its tensors say. There is no rope, whatever the file says of one."""
    read.seen |= {"rope.dimension_count", "rope.freq_base"}
    heads, inner = (read.take(f"ssm.{key}", int, required=True) or 1 for key in ("time_step_rank", "inner_size"))
    count = (config["num_hidden_layers"] or 0) - read.take("nextn_predict_layers", int, 0)
    tensors = read.header.tensors
    parts = {"linear_attention": "ssm_in", "full_attention": "attn_output", "moe": "ffn_gate_inp", "mlp": "ffn_up"}
    kinds = [
        next((kind for kind, part in parts.items() if f"blk.{layer}.{part}.weight" in tensors), "mlp")
        for layer in range(min(count, len(tensors)))
    ]
    wide = next((t for name, t in tensors.items() if name.endswith(".ffn_up.weight")), None)
    return {
        "model_type": "nemotron_h",
        "layers_block_type": kinds,
        "layer_norm_epsilon": config.pop("rms_norm_eps"),
        "mlp_hidden_act": "relu2",
        "mlp_bias": read.has("ffn_up.bias"),
        "intermediate_size": wide.shape[0] if wide else None,
        "mamba_num_heads": heads,
        "mamba_head_dim": inner // heads,
        "ssm_state_size": read.take("ssm.state_size", int, required=True),
        "n_groups": read.take("ssm.group_count", int, required=True),
        "conv_kernel": read.take("ssm.conv_kernel", int, required=True),
        "use_conv_bias": read.has("ssm_conv1d.bias"),
        **(_nemotron_experts(read) if "moe" in kinds else {}),
    }


def _nemotron_experts(read: Metadata) -> dict:
    read.only("expert_gating_func", 2)  # sigmoid
    read.only("expert_shared_count", 1)
    return {
        "n_routed_experts": read.take("expert_count", int, required=True),
        "num_experts_per_tok": read.take("expert_used_count", int, required=True),
        "moe_intermediate_size": read.take("expert_feed_forward_length", int, required=True),
        "moe_shared_expert_intermediate_size": read.take("expert_shared_feed_forward_length", int, required=True),
        "moe_latent_size": read.take("moe_latent_size", int) or None,
        "norm_topk_prob": read.take("expert_weights_norm", bool, False),
        "routed_scaling_factor": read.take("expert_weights_scale", float, 1.0),
        "n_group": read.take("expert_group_count", int, 1),
        "topk_group": read.take("expert_group_used_count", int, 1),
    }


def falcon_h1(read: Metadata, config: dict) -> dict:
    """Reads Falcon-H1, whose multipliers its files have in the weights; so all are 1. A norm comes after its gate."""
    heads, inner = (read.take(f"ssm.{key}", int, required=True) or 1 for key in ("time_step_rank", "inner_size"))
    if config["tie_word_embeddings"]:
        read.problems.append(
            "there is no tensor output.weight, and the embedding alone holds one of two multipliers that Falcon-H1 has for it"
        )
    return whole_heads(read, config) | {
        "model_type": "falcon_h1",
        "mamba_n_heads": heads,
        "mamba_d_head": inner // heads,
        "mamba_d_ssm": inner,
        "mamba_d_state": read.take("ssm.state_size", int, required=True),
        "mamba_n_groups": read.take("ssm.group_count", int, required=True),
        "mamba_d_conv": read.take("ssm.conv_kernel", int, required=True),
        "mamba_conv_bias": read.has("ssm_conv1d.bias"),
        "mamba_rms_norm": read.has("ssm_norm.weight"),
        "mamba_norm_before_gate": False,
        "mamba_proj_bias": False,
        "projectors_bias": False,
        "attention_bias": False,
    }

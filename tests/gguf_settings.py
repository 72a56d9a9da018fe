"""The metadata of tiny GGUF files: what llama.cpp's converter makes of HF's configs."""

import math


def settings(hf: dict, arch: str) -> dict:
    """The metadata of an HF config, as the converter of each architecture writes it."""
    head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    ropes = hf.get("rope_parameters") or {}
    rope = ropes.get("full_attention", ropes)
    found = {
        "context_length": hf["max_position_embeddings"],
        "embedding_length": hf["hidden_size"],
        "block_count": hf["num_hidden_layers"],
        "feed_forward_length": width_of(hf),
        "attention.head_count": hf["num_attention_heads"],
        "attention.head_count_kv": hf["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(
            hf.get("rms_norm_eps") or hf.get("norm_eps") or hf["layer_norm_epsilon"]
        ),
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
    }
    if arch != "phi3":
        found |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if arch in ("llama", "phi3"):
        found["rope.dimension_count"] = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    if rope.get("rope_type") in ("linear", "yarn"):
        found |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope.get("rope_type") == "yarn":
        found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if rope.get("rope_type") == "longrope":
        grown = hf["max_position_embeddings"] / hf["original_max_position_embeddings"]
        attention = math.sqrt(1 + math.log(grown) / math.log(hf["original_max_position_embeddings"]))
        found |= {"rope.scaling.attn_factor": attention}
    if arch == "phi3":
        found |= {"rope.scaling.original_context_length": hf["original_max_position_embeddings"]}
    if "sliding_attention" in ropes:
        found["rope.freq_base_swa"] = float(ropes["sliding_attention"]["rope_theta"])
    if hf.get("sliding_window") and not arch.startswith("qwen"):
        found["attention.sliding_window"] = hf["sliding_window"]
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if arch == "gemma2" or hf.get(key):
            found |= {key: float(hf[key])} if arch.startswith("gemma") else {}
    if experts := experts_of(hf):
        found |= {"expert_count": experts, "expert_used_count": hf.get("num_experts_per_tok") or hf["top_k_experts"]}
    if arch == "gpt-oss":
        found["expert_feed_forward_length"] = hf["intermediate_size"]
    if hf.get("moe_intermediate_size"):
        found["expert_feed_forward_length"] = hf["moe_intermediate_size"]
    if arch.startswith("lfm2"):
        heads = [hf["num_key_value_heads"] * (kind == "full_attention") for kind in hf["layer_types"]]
        found |= {"attention.head_count_kv": heads, "shortconv.l_cache": hf["conv_L_cache"]}
    if arch == "falcon-h1":
        inner = hf["mamba_d_ssm"] or hf["mamba_expand"] * hf["hidden_size"]
        found |= {"ssm.state_size": hf["mamba_d_state"], "ssm.group_count": hf["mamba_n_groups"]}
        found |= {
            "ssm.inner_size": inner,
            "ssm.time_step_rank": hf["mamba_n_heads"],
            "ssm.conv_kernel": hf["mamba_d_conv"],
        }
    if arch == "granitehybrid":
        heads = [hf["num_key_value_heads"] * (kind in ("attention", "full_attention")) for kind in hf["layer_types"]]
        found |= {"attention.head_count_kv": heads, "expert_shared_feed_forward_length": hf["shared_intermediate_size"]}
        names = {"attention.scale": "attention", "embedding_scale": "embedding", "residual_scale": "residual"}
        found |= {key: float(hf[f"{name}_multiplier"]) for key, name in names.items()}
        found |= {"logit_scale": float(hf["logits_scaling"]), "ssm.conv_kernel": hf["mamba_d_conv"]}
        found |= {"ssm.state_size": hf["mamba_d_state"], "ssm.group_count": hf["mamba_n_groups"]}
        found |= {"ssm.inner_size": hf["mamba_n_heads"] * hf["mamba_d_head"], "ssm.time_step_rank": hf["mamba_n_heads"]}
        found["rope.scaling.finetuned"] = hf["position_embedding_type"] == "rope"
    if arch.startswith("qwen35"):
        values, share = hf["linear_num_value_heads"], rope["partial_rotary_factor"]
        found |= {"ssm.conv_kernel": hf["linear_conv_kernel_dim"], "ssm.state_size": hf["linear_key_head_dim"]}
        found |= {"ssm.group_count": hf["linear_num_key_heads"], "ssm.time_step_rank": values}
        found |= {"ssm.inner_size": values * hf["linear_value_head_dim"], "full_attention_interval": 4}
        found |= {"rope.dimension_count": int(head_dim * share), "rope.dimension_sections": [1, 1, 2, 0]}
        if "shared_expert_intermediate_size" in hf:
            found["expert_shared_feed_forward_length"] = hf["shared_expert_intermediate_size"]
    if arch.startswith("nemotron_h"):
        found = only_parts(hf, found)
    if arch == "llama4":
        found |= {"feed_forward_length": hf["intermediate_size_mlp"], "rope.dimension_count": head_dim}
        found |= {"expert_feed_forward_length": hf["intermediate_size"]}
        found |= {"interleave_moe_layer_step": hf["interleave_moe_layer_step"]}
    if arch == "gemma4":
        found |= both_kinds(hf, head_dim)
    if arch == "deepseek2":
        found |= latent(hf, rope)
    if arch == "lfm2moe":
        found |= {"leading_dense_block_count": hf["num_dense_layers"], "expert_gating_func": 2}
    return {f"{arch}.{key}": value for key, value in found.items()}


def experts_of(hf: dict) -> int | None:
    """The number of experts, which goes by several names."""
    return hf.get("num_experts") or hf.get("num_local_experts") or hf.get("n_routed_experts")


def both_kinds(hf: dict, head_dim: int) -> dict:
    """The metadata of Gemma 4, whose layers of two kinds differ in their heads."""
    count, sliding = hf["num_hidden_layers"], [kind == "sliding_attention" for kind in hf["layer_types"]]
    own, shared = hf["per_layer_config"], hf["num_kv_shared_layers"]
    full = next(iter(own.values()))
    kv = [hf["num_key_value_heads"] if one else full.get("num_key_value_heads") for one in sliding]
    found = {"attention.shared_kv_layers": shared, "attention.sliding_window_pattern": sliding}
    found |= {"attention.key_length": full["head_dim"], "attention.value_length": full["head_dim"]}
    found |= {"attention.key_length_swa": head_dim, "attention.value_length_swa": head_dim}
    found |= {"rope.dimension_count": full["head_dim"], "rope.dimension_count_swa": head_dim}
    found |= {"attention.head_count_kv": kv} if None not in kv else {}
    found |= {"embedding_length_per_layer_input": hf["hidden_size_per_layer_input"]}
    if hf["use_double_wide_mlp"]:
        found["feed_forward_length"] = [
            hf["intermediate_size"] * (1 + (layer >= count - shared)) for layer in range(count)
        ]
    return found


def only_parts(hf: dict, found: dict) -> dict:
    """The metadata of Nemotron-H, each of whose layers is one part. found: what it has in common with others."""
    kinds, heads = hf["layers_block_type"], hf["mamba_num_heads"]
    experts = "moe" in kinds
    width = hf["moe_intermediate_size" if experts else "intermediate_size"]
    found = {key: value for key, value in found.items() if experts or not key.startswith("expert_")}
    found |= {"feed_forward_length": [width * (kind == ("moe" if experts else "mlp")) for kind in kinds]}
    found |= {"attention.head_count_kv": [hf["num_key_value_heads"] * (kind == "full_attention") for kind in kinds]}
    found |= {"ssm.conv_kernel": hf["conv_kernel"], "ssm.state_size": hf["ssm_state_size"]}
    found |= {"ssm.group_count": hf["n_groups"], "ssm.inner_size": heads * hf["mamba_head_dim"]}
    found |= {"ssm.time_step_rank": heads, "rope.dimension_count": hf["head_dim"]}
    if experts:
        found |= {"expert_shared_feed_forward_length": hf["moe_shared_expert_intermediate_size"]}
        found |= {"expert_shared_count": 1, "expert_weights_norm": hf["norm_topk_prob"]}
        found |= {"expert_weights_scale": hf["routed_scaling_factor"], "moe_latent_size": hf["moe_latent_size"] or 0}
        found |= {"expert_group_count": hf["n_group"], "expert_group_used_count": hf["topk_group"]}
    return found


def latent(hf: dict, rope: dict) -> dict:
    """The metadata of latent attention, in which all heads share one."""
    rank, turned, plain = hf["kv_lora_rank"], hf["qk_rope_head_dim"], hf["qk_nope_head_dim"]
    found = {"attention.head_count_kv": 1, "attention.kv_lora_rank": rank, "attention.q_lora_rank": hf["q_lora_rank"]}
    found |= {"attention.key_length": rank + turned, "attention.value_length": rank, "rope.dimension_count": turned}
    found |= {"attention.key_length_mla": plain + turned, "attention.value_length_mla": hf["v_head_dim"]}
    dense = [kind == "dense" for kind in hf.get("mlp_layer_types", ())]
    found |= {"leading_dense_block_count": sum(dense) if dense else hf["first_k_dense_replace"]}
    found |= {"expert_group_count": hf["n_group"], "expert_group_used_count": hf["topk_group"]}
    found |= {"expert_shared_count": hf["n_shared_experts"], "expert_weights_scale": hf["routed_scaling_factor"]}
    if hf["model_type"] == "deepseek_v3":
        found |= {"expert_gating_func": 2, "expert_weights_norm": hf["norm_topk_prob"]}
    if hf["model_type"] == "glm4_moe_lite":
        found |= {"expert_weights_norm": True}
    if rope.get("mscale_all_dim"):
        found["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    return {key: value for key, value in found.items() if value is not None}


def width_of(hf: dict) -> int:
    """The width of an MLP, which LFM2's configs say in a roundabout way."""
    width, multiple = hf["intermediate_size"], hf.get("block_multiple_of", 1)
    if hf.get("block_auto_adjust_ff_dim"):
        width = multiple * math.ceil(int(hf["block_ffn_dim_multiplier"] * int(2 * width / 3)) / multiple)
    return width


def rope_factors(hf: dict) -> dict[str, list[float]]:
    """The tensors that slow rotated pairs down, which Llama 3 and LongRoPE have."""
    ropes = hf.get("rope_parameters") or {}
    if ropes.get("rope_type") == "longrope":
        return {f"rope_factors_{kind}.weight": ropes[f"{kind}_factor"] for kind in ("short", "long")}
    if (rope := ropes.get("full_attention", {})).get("rope_type") == "proportional":
        width = next(iter(hf["per_layer_config"].values()))["head_dim"]
        turned = int(width * rope["partial_rotary_factor"] / 2)
        return {"rope_freqs.weight": [1.0] * turned + [1e30] * (width // 2 - turned)}
    if ropes.get("rope_type") != "llama3":
        return {}
    dim, span, factors = hf["head_dim"], ropes["original_max_position_embeddings"], []
    for i in range(0, dim, 2):
        length = 2 * math.pi * ropes["rope_theta"] ** (i / dim)
        low, high = ropes["low_freq_factor"], ropes["high_freq_factor"]
        between = (span / length - low) / (high - low) if high > low else float(span / length > low)
        smooth = min(max(between, 0), 1)
        factors.append(1 / ((1 - smooth) / ropes["factor"] + smooth))
    return {"rope_freqs.weight": factors}

"""Makes HF's config of models with latent attention from the metadata of their GGUF files.

These are DeepSeek V2 and V3, and what uses their architecture: Kimi K2, GLM 4.7 Flash.
"""

from refusal_jax.checkpoints.gguf_metadata import Metadata
from refusal_jax.checkpoints.gguf_rope import rope_scaling

SOFTMAX, SIGMOID = 1, 2  # what a router makes of its scores, by `expert_gating_func`
GROUPED = (160, 256)  # so many experts DeepSeek V2 and V3 have, which choose among groups of them


def deepseek2(read: Metadata, config: dict) -> dict:
    """Reads a model with latent attention. One whose router takes sigmoids computes what DeepSeek V3 does, whatever its name.

    Newer files say the widths of heads under keys of their own, and under the usual ones those of latents, of which there is one
    for all heads.
    """
    turned = read.take("rope.dimension_count", int, required=True) or 0
    names = ("attention.key_length", "attention.value_length")
    usual = [read.take(name, int, required=not read.named(f"{name}_mla")) or 0 for name in names]
    width, v_dim = (read.take(f"{name}_mla", int, default) for name, default in zip(names, usual, strict=True))
    if not 0 < turned < width:
        read.problems.append(f"deepseek2.rope.dimension_count = {turned}, expected less than a head's {width} entries")
    drafts = read.take("nextn_predict_layers", int, 0)
    own = {
        "num_hidden_layers": (config["num_hidden_layers"] or 0) - drafts,
        "num_key_value_heads": config["num_attention_heads"],
        "head_dim": None,
        "kv_lora_rank": read.take("attention.kv_lora_rank", int, required=True),
        "qk_nope_head_dim": max(width - turned, 1),
        "qk_rope_head_dim": turned,
        "v_head_dim": v_dim,
        "rope_scaling": _stretched(read, config | {"head_dim": turned}),
        "first_k_dense_replace": read.take("leading_dense_block_count", int, 0),
        "n_routed_experts": read.take("expert_count", int, required=True),
        "num_experts_per_tok": read.take("expert_used_count", int, required=True),
        "moe_intermediate_size": read.take("expert_feed_forward_length", int, required=True),
        "n_shared_experts": read.take("expert_shared_count", int, required=True),
        "routed_scaling_factor": read.take("expert_weights_scale", float, 1.0),
    }
    queries = read.take("attention.q_lora_rank", int) if read.has("attn_q_a.weight") else None
    return own | {"q_lora_rank": queries} | _router(read, own["n_routed_experts"], drafts)


def _router(read: Metadata, experts: int | None, drafts: int) -> dict:
    """Returns how experts are chosen. Files that do not say what is made of scores are those of DeepSeek V2, and some of GLM."""
    read.only("expert_gating_func", SOFTMAX, SIGMOID)
    corrected = read.has("exp_probs_b.bias")
    scores = read.take("expert_gating_func", int, SIGMOID if corrected else SOFTMAX)
    if experts in GROUPED and not read.named("expert_group_count"):
        read.problems.append(
            f"deepseek2.expert_group_count is missing: the file was made before llama.cpp's converter kept the groups that the "
            f"{experts} experts are in, and without them others would be chosen; make or download a newer one"
        )
    groups, chosen = read.take("expert_group_count", int, 1), read.take("expert_group_used_count", int, 1)
    if scores == SIGMOID:
        norm = read.take("expert_weights_norm", bool, False)
        return {
            "model_type": "deepseek_v3",
            "norm_topk_prob": norm,
            "n_group": groups,
            "topk_group": chosen,
            "num_nextn_predict_layers": drafts,
        }
    read.only("expert_weights_norm", False)
    named = {"topk_method": "group_limited_greedy", "n_group": groups, "topk_group": chosen}
    return {"model_type": "deepseek_v2"} | (named if groups > 1 else {"topk_method": "greedy"})


def _stretched(read: Metadata, config: dict) -> dict | None:
    """Returns the rope's rescaling. What makes scores steeper is stored as a tenth of itself, and as one number for the two that
    HF has, which are equal in all published models."""
    scaling = rope_scaling(read, config)
    steep = read.take("rope.scaling.yarn_log_multiplier", float)
    if scaling and steep:
        weight = round(10 * steep, 6)
        scaling |= {"mscale": weight, "mscale_all_dim": weight}
    return scaling

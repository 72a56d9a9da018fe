"""Reads configs of mixtures of experts."""

from refusal_jax.errors import shown
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.hf_attributes import Reader
from refusal_jax.models.readers.llama import granite_switches
from refusal_jax.models.readers.qwen import qwen_window


def experts(
    read: Reader,
    count: int,
    chosen: int | None,
    renormalise: bool,
    own_name: str = "num_experts",
    other_name: str = "num_local_experts",
) -> dict:
    """Reads the experts' settings; their number goes by two names, which transformers treats as the same. chosen: how many a
    token has where the config does not say, None: it must."""
    total = read.take(other_name, read.take(own_name, count, int), int)
    read.same(own_name, other_name)
    used = read.take("num_experts_per_tok", chosen or 1, int, required=chosen is None)
    if used > total:
        read.problems.append(f"num_experts_per_tok = {used} is more than the {total} experts")
    return {"n_experts": total, "experts_per_token": used, "renormalise_experts": renormalise}


def groups(read: Reader, switches: dict, count: int | None, chosen: int | None, best: int = 2) -> dict:
    """Reads into which groups the experts of `switches` are divided. count, chosen: how many groups there are, and are chosen,
    where the config does not say, None: it must. best: how many of its experts a group is judged by."""
    many = read.take("n_group", count or 1, int, required=count is None)
    open_ = read.take("topk_group", chosen or 1, int, required=chosen is None)
    each, total = switches["n_experts"] // many, switches["n_experts"]
    if each * many < total or (many > 1 and each < best) or open_ > many:
        read.problems.append(
            f"n_group = {many} and topk_group = {open_} do not divide {total} experts into groups of {best} or more, of which "
            "some are chosen"
        )
    elif each * open_ < switches["experts_per_token"]:
        read.problems.append(
            f"num_experts_per_tok = {switches['experts_per_token']} is more than the experts of topk_group = {open_} groups"
        )
    return {"expert_groups": many, "groups_per_token": open_, "group_best": best}


def dense(read: Reader, layers: tuple[int, ...], width: int) -> dict:
    """Reads how wide the MLP of the layers without experts is. width: where the config does not say."""
    if not layers:
        read.ignore("intermediate_size")
        return {}
    return {"dense_layers": layers, "d_dense": read.take("intermediate_size", width, int)}


def qwen_dense(read: Reader, n_layers: int, width: int) -> dict:
    """Reads which of Qwen's layers have no experts, and how wide their MLP is."""
    step, named = read.take("decoder_sparse_step", 1, int), read.take("mlp_only_layers", [])
    if not isinstance(named, list) or not all(type(layer) is int for layer in named):
        read.problems.append(f"mlp_only_layers = {shown(named)}, expected a list of layers")
        named = []
    return dense(read, tuple(layer for layer in range(n_layers) if layer in named or (layer + 1) % step), width)


def _mixtral(read: Reader) -> ModelConfig:
    sizes = read.sizes({"n_kv_heads": 8, "context_length": 131072, "norm_eps": 1e-5})
    windows = [read.take_optional("sliding_window", None, int)] * sizes["n_layers"]
    mixture = experts(read, 8, 2, True)
    return read.config("mixtral", sizes, rope=read.main_rope(sizes, 1e6), windows=windows, **mixture)


def _qwen2_moe(read: Reader) -> ModelConfig:
    sizes = read.sizes({"n_kv_heads": 16, "context_length": 32768, "d_mlp": 1408}, d_mlp="moe_intermediate_size")
    window, first = qwen_window(read), read.take("max_window_layers", 28, int, least=0)
    windows = read.windows(sizes["n_layers"], window, lambda layer: window and layer % 2 == 0 and layer < first)
    switches = experts(read, 60, 4, read.take("norm_topk_prob", False, bool))
    switches |= qwen_dense(read, sizes["n_layers"], 5632)
    switches |= {"d_shared": read.take("shared_expert_intermediate_size", 5632, int), "shared_gate": True}
    return read.config("qwen2_moe", sizes, windows=windows, qkv_bias=read.take("qkv_bias", True, bool), **switches)


def _qwen3_moe(read: Reader) -> ModelConfig:
    sizes = read.sizes({"n_kv_heads": 4, "context_length": 32768, "d_mlp": 768}, d_mlp="moe_intermediate_size")
    read.only("use_qk_norm", True)  # transformers does not read it, and always has these norms
    read.ignore("max_window_layers")
    bias = read.take("attention_bias", False, bool)
    switches = experts(read, 128, 8, read.take("norm_topk_prob", False, bool))
    switches |= qwen_dense(read, sizes["n_layers"], 6144)
    windows = [qwen_window(read)] * sizes["n_layers"]
    return read.config("qwen3_moe", sizes, windows=windows, qk_norm="head", qkv_bias=bias, o_bias=bias, **switches)


def _olmoe(read: Reader) -> ModelConfig:
    sizes = read.sizes({"context_length": 4096, "norm_eps": 1e-5})
    read.only("sliding_window", None)
    bias, clip = read.take("attention_bias", False, bool), read.take("clip_qkv", None, float)
    mixture = experts(read, 64, 8, read.take("norm_topk_prob", False, bool))
    return read.config("olmoe", sizes, qk_norm="all", qkv_bias=bias, o_bias=bias, qkv_clip=clip, **mixture)


def _glm4_moe(read: Reader) -> ModelConfig:
    sizes = read.sizes(
        {"n_kv_heads": 8, "context_length": 131072, "norm_eps": 1e-5, "d_mlp": 1408}, d_mlp="moe_intermediate_size"
    )
    rope = read.main_rope(sizes, partial=read.take("partial_rotary_factor", 0.5, float))
    switches = experts(read, 128, 8, read.take("norm_topk_prob", True, bool), "n_routed_experts")
    first = min(read.take("first_k_dense_replace", 1, int, least=0), sizes["n_layers"])
    return read.config(
        "glm4_moe",
        sizes,
        rope=rope,
        qkv_bias=read.take("attention_bias", False, bool),
        qk_norm="head" if read.take("use_qk_norm", False, bool) else "",
        router_scores="sigmoid",
        router_correction=True,
        routed_scale=read.take("routed_scaling_factor", 1.0, float),
        d_shared=sizes["d_mlp"] * read.take("n_shared_experts", 1, int),
        draft_layers=read.take("num_nextn_predict_layers", read.take("num_mtp_layers", 1, int, least=0), int, least=0),
        **switches,
        **groups(read, switches, 1, 1),
        **dense(read, tuple(range(first)), 10944),
    )


def _granitemoe(read: Reader) -> ModelConfig:
    sizes, mixture = read.sizes(), experts(read, 8, 2, True)
    return read.config("granitemoe", sizes, **granite_switches(read), **mixture)


def _granitemoeshared(read: Reader) -> ModelConfig:
    sizes, mixture = read.sizes(), experts(read, 8, 2, True)
    shared = read.take("shared_intermediate_size", 0, int, least=0)
    return read.config("granitemoeshared", sizes, d_shared=shared, **granite_switches(read), **mixture)


def _minimax_m2(read: Reader) -> ModelConfig:
    """Reads MiniMax M2. Its config describes further variants of its architecture, of which transformers computes none."""
    sizes = read.sizes({"n_kv_heads": 8, "head_dim": 128, "context_length": 196608})
    turned = read.take("rotary_dim", sizes["head_dim"], int) / sizes["head_dim"]
    rope = read.main_rope(sizes, 5e6, partial=read.take("partial_rotary_factor", turned, float))
    for name, value in {"scoring_func": "sigmoid", "use_qk_norm": True, "qk_norm_type": "per_layer"}.items():
        read.only(name, value)
    read.only("use_routing_bias", True)
    read.only("shared_intermediate_size", 0)
    for part in ("full_attention", "linear_attention", "mlp"):
        read.only(f"layernorm_{part}_beta", 1.0)
    mixture = experts(read, 256, 8, True)
    return read.config(
        "minimax_m2", sizes, rope=rope, qk_norm="all", router_scores="sigmoid", router_correction=True, **mixture
    )


def _gpt_oss(read: Reader) -> ModelConfig:
    """Reads gpt-oss, whose router makes probabilities of its choice's logits alone: as if it renormalised those of all."""
    sizes = read.sizes({"n_kv_heads": 8, "head_dim": 64, "context_length": 131072, "norm_eps": 1e-5}, activation=None)
    read.only("hidden_act", "silu")
    read.ignore("experts_per_token", "initial_context_length")  # which transformers does not read
    window, bias = read.take_optional("sliding_window", 128, int), read.take("attention_bias", True, bool)
    spec = read.take("rope_scaling") or read.take("rope_parameters") or GPT_OSS_ROPE
    limit = read.take("swiglu_limit", 7.0, float)
    return read.config(
        "gpt_oss",
        sizes,
        rope=read.main_rope(sizes, 1.5e5, spec),
        windows=read.windows(sizes["n_layers"], window, lambda layer: layer % 2 == 0),
        sinks=True,
        qkv_bias=bias,
        o_bias=bias,
        expert_bias=True,
        router_bias=True,
        gate_slope=read.take("swiglu_alpha", 1.702, float),
        gated_limit=limit,
        up_offset=1.0,
        **experts(read, 128, 4, True, "num_local_experts"),
    )


# What its config class supplies.
GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
READERS = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "glm4_moe": _glm4_moe,
    "granitemoe": _granitemoe,
    "granitemoeshared": _granitemoeshared,
    "minimax_m2": _minimax_m2,
    "gpt_oss": _gpt_oss,
}

"""Reads configs of mixtures of experts."""

from refusal_jax.models.config import ModelConfig
from refusal_jax.models.hf_attributes import Reader
from refusal_jax.models.readers.qwen import qwen_window


def _experts(read: Reader, count: int, chosen: int, renormalise: bool) -> dict:
    """Reads the experts' settings; their number goes by two names, which transformers treats as the same."""
    experts, used = read.take("num_experts", count, int), read.take("num_experts_per_tok", chosen, int)
    experts = read.take("num_local_experts", experts, int)
    read.same("num_experts", "num_local_experts")
    if used > experts:
        read.problems.append(f"num_experts_per_tok = {used} is more than the {experts} experts")
    return {"n_experts": experts, "experts_per_token": used, "renormalise_experts": renormalise}


def _mixtral(read: Reader) -> ModelConfig:
    sizes = read.sizes({"n_kv_heads": 8, "context_length": 131072, "norm_eps": 1e-5})
    windows = [read.take_optional("sliding_window", None, int)] * sizes["n_layers"]
    experts = _experts(read, 8, 2, True)
    return read.config("mixtral", sizes, rope=read.main_rope(sizes, 1e6), windows=windows, **experts)


def _qwen3_moe(read: Reader) -> ModelConfig:
    sizes = read.sizes({"n_kv_heads": 4, "context_length": 32768, "d_mlp": 768}, d_mlp="moe_intermediate_size")
    read.only("decoder_sparse_step", 1)
    read.only("mlp_only_layers", [])
    read.only("use_qk_norm", True)  # transformers does not read it, and always has these norms
    read.ignore(
        "intermediate_size", "max_window_layers"
    )  # of layers without experts, which `mlp_only_layers` would name
    bias = read.take("attention_bias", False, bool)
    experts = _experts(read, 128, 8, read.take("norm_topk_prob", False, bool))
    windows = [qwen_window(read)] * sizes["n_layers"]
    return read.config("qwen3_moe", sizes, windows=windows, qk_norm="head", qkv_bias=bias, o_bias=bias, **experts)


def _olmoe(read: Reader) -> ModelConfig:
    sizes = read.sizes({"context_length": 4096, "norm_eps": 1e-5})
    read.only("sliding_window", None)
    bias, clip = read.take("attention_bias", False, bool), read.take("clip_qkv", None, float)
    experts = _experts(read, 64, 8, read.take("norm_topk_prob", False, bool))
    return read.config("olmoe", sizes, qk_norm="all", qkv_bias=bias, o_bias=bias, qkv_clip=clip, **experts)


READERS = {"mixtral": _mixtral, "qwen3_moe": _qwen3_moe, "olmoe": _olmoe}

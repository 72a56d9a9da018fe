"""From HF's attributes to `ModelConfig`: one reader for each family."""

from functools import partial

from refusal_jax.errors import shown
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.hf_attributes import Reader
from refusal_jax.models.rope import SPAN


def _llama(read: Reader) -> ModelConfig:
    bias = read.take("attention_bias", False, bool)
    sizes = read.sizes()
    return read.config("llama", sizes, qkv_bias=bias, o_bias=bias, mlp_bias=read.take("mlp_bias", False, bool))


def _mistral(read: Reader) -> ModelConfig:
    sizes = read.sizes({"n_kv_heads": 8, "context_length": 131072})
    window = read.take_optional("sliding_window", 4096, int)
    return read.config("mistral", sizes, windows=[window] * sizes["n_layers"])


def _qwen(read: Reader) -> ModelConfig:
    """Reads Qwen 1, whose own code is the reference. Beyond `seq_length` that code changes its rope and scales its
    queries, so the context ends there."""
    sizes = read.sizes({"context_length": 8192, "head_dim": 128}, head_dim="kv_channels", norm_eps="layer_norm_epsilon")
    if sizes["d_mlp"] % 2:
        read.problems.append(f"intermediate_size = {sizes['d_mlp']} is odd, but counts two branches of equal width")
    sizes["d_mlp"] //= 2
    length = read.take("seq_length", 2048, int)
    if read.take("use_dynamic_ntk", True, bool) | read.take("use_logn_attn", True, bool):
        sizes["context_length"] = min(length, sizes["context_length"])
    theta, partial = read.take("rotary_emb_base", 1e4, float), read.take("rotary_pct", 1.0, float)
    bias = not read.take("no_bias", True, bool)
    read.only("scale_attn_weights", True)
    read.ignore("bf16", "fp16", "fp32", "use_flash_attn", "softmax_in_fp32", "onnx_safe", "use_cache_kernel")
    read.ignore("attn_dropout_prob", "emb_dropout_prob")
    rope = read.main_rope(sizes, theta, partial=partial)
    return read.config("qwen", sizes, rope=rope, qkv_bias=True, o_bias=bias, mlp_bias=bias)


def _qwen2(read: Reader, family: str = "qwen2", head_dim: int | None = None, **switches) -> ModelConfig:
    sizes = read.sizes({"context_length": 32768, "head_dim": head_dim})
    first, window = read.take("max_window_layers", 28, int, least=0), _qwen_window(read)
    windows = read.windows(sizes["n_layers"], window, lambda layer: window and layer >= first)
    return read.config(family, sizes, windows=windows, **{"qkv_bias": True} | switches)


def _qwen_window(read: Reader) -> int | None:
    window = read.take_optional("sliding_window", 4096, int)
    return window if read.take("use_sliding_window", False, bool) else None


def _qwen3(read: Reader) -> ModelConfig:
    bias = read.take("attention_bias", False, bool)
    return _qwen2(read, "qwen3", head_dim=128, qk_norm="head", qkv_bias=bias, o_bias=bias)


def _gemma(read: Reader) -> ModelConfig:
    sizes = read.sizes(GEMMA | {"n_kv_heads": 16, "activation": "gelu_pytorch_tanh"})
    if sizes["activation"] == "gelu":  # the first releases wrote this and meant the approximation
        sizes["activation"] = "gelu_pytorch_tanh"
    read.only("hidden_activation", sizes["activation"])  # which versions of transformers read one or the other of
    return _gemma_config(read, "gemma", sizes)


# Of the classes' defaults, those that published configs rely on.
GEMMA = {"context_length": 8192, "head_dim": 256, "tied_embeddings": True, "activation": "gelu_pytorch_tanh"}


def _gemma_config(read: Reader, family: str, sizes: dict, **more) -> ModelConfig:
    bias = read.take("attention_bias", False, bool)
    scale = sizes["d_model"] ** 0.5
    return read.config(family, sizes, norm_offset=1.0, embed_scale=scale, qkv_bias=bias, o_bias=bias, **more)


def _gemma2_switches(read: Reader) -> dict:
    return {"post_norm": True, "query_scale": read.take("query_pre_attn_scalar", 256, float) ** -0.5}


def _gemma2(read: Reader) -> ModelConfig:
    sizes = read.sizes(GEMMA | {"n_kv_heads": 4}, activation="hidden_activation")
    read.ignore("hidden_act", "sliding_window_size")  # older names of attributes that are there too
    window = read.take_optional("sliding_window", 4096, int)
    windows = read.windows(sizes["n_layers"], window, lambda layer: layer % 2 == 0)
    caps = {
        "attention_softcap": read.take_optional("attn_logit_softcapping", 50.0, float),
        "logit_softcap": read.take_optional("final_logit_softcapping", 30.0, float),
    }
    return _gemma_config(read, "gemma2", sizes, windows=windows, **_gemma2_switches(read), **caps)


def _gemma3(read: Reader, family: str = "gemma3_text") -> ModelConfig:
    """Reads Gemma 3. Layers with a window have their own rope; `rope_scaling` applies to the others. Of the soft caps
    that the config class has, transformers computes only the one of the logits, and not in the multimodal model."""
    more = {"vocab_size": 262208, "d_model": 2304, "n_layers": 26, "n_heads": 8, "n_kv_heads": 4, "d_mlp": 9216}
    sizes = read.sizes(GEMMA | {"context_length": 131072} | more, activation="hidden_activation")
    read.ignore("hidden_act", "_sliding_window_pattern")
    window, every = read.take_optional("sliding_window", 4096, int), read.take("sliding_window_pattern", 6, int)
    windows = read.windows(sizes["n_layers"], window, lambda layer: (layer + 1) % every)
    ropes = read.take("rope_parameters", {}, dict)
    unknown = sorted(set(ropes) - {"full_attention", "sliding_attention"})
    read.problems += [f"rope_parameters.{name} = {shown(ropes[name])} is not supported" for name in unknown]
    wide, narrow = ropes.get("full_attention") or {}, ropes.get("sliding_attention") or {}
    if isinstance(wide, dict):
        wide = wide | read.take("rope_scaling", {}, dict)
    theta = read.take("rope_local_base_freq", 1e4, float)
    more = {} if family == "gemma3" else {"logit_softcap": read.take("final_logit_softcapping", None, float)}
    return _gemma_config(
        read,
        family,
        sizes,
        windows=windows,
        rope=read.main_rope(sizes, 1e6, wide),
        local_rope=read.rope(narrow, theta=theta, head_dim=sizes["head_dim"], context=sizes["context_length"]),
        qk_norm="head",
        **_gemma2_switches(read),
        **more,
    )


def _phi3(read: Reader) -> ModelConfig:
    sizes = read.sizes({"context_length": 4096, "norm_eps": 1e-5})
    window = read.take_optional("sliding_window", None, int)
    spec, span = read.take("rope_scaling") or read.take("rope_parameters") or {}, read.take(SPAN, 4096, int)
    if isinstance(spec, dict) and spec.get("rope_type", spec.get("type", "default")) != "default":
        spec = spec | {SPAN: span, "rope_type": "longrope"}  # the only other rope it has, once called "su" or "yarn"
    read.only("full_attn_mod", 1)
    read.only("interpolate_factor", 1)
    rope = read.main_rope(sizes, spec=spec, partial=read.take("partial_rotary_factor", 1.0, float))
    return read.config("phi3", sizes, rope=rope, windows=[window] * sizes["n_layers"])


def _olmo2(read: Reader) -> ModelConfig:
    bias = read.take("attention_bias", False, bool)
    sizes = read.sizes({"norm_eps": 1e-5})
    return read.config("olmo2", sizes, pre_norm=False, post_norm=True, qk_norm="all", qkv_bias=bias, o_bias=bias)


def _granite(read: Reader) -> ModelConfig:
    bias = read.take("attention_bias", False, bool)
    return read.config(
        "granite",
        read.sizes(),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=read.take("mlp_bias", False, bool),
        embed_scale=read.take("embedding_multiplier", 1.0, float),
        residual_scale=read.take("residual_multiplier", 1.0, float),
        query_scale=read.take("attention_multiplier", 1.0, float),
        logit_divisor=read.take("logits_scaling", 1.0, float),
    )


def _glm4(read: Reader, family: str = "glm4", post_norm: bool = True) -> ModelConfig:
    sizes = read.sizes({"n_kv_heads": 2, "head_dim": 128, "context_length": 131072, "norm_eps": 1.5625e-07})
    rope = read.main_rope(sizes, partial=read.take("partial_rotary_factor", 0.5, float), interleaved=True)
    bias = read.take("attention_bias", True, bool)
    return read.config(family, sizes, rope=rope, post_norm=post_norm, qkv_bias=bias)


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
    read.ignore(
        "intermediate_size", "max_window_layers"
    )  # of layers without experts, which `mlp_only_layers` would name
    bias = read.take("attention_bias", False, bool)
    experts = _experts(read, 128, 8, read.take("norm_topk_prob", False, bool))
    windows = [_qwen_window(read)] * sizes["n_layers"]
    return read.config("qwen3_moe", sizes, windows=windows, qk_norm="head", qkv_bias=bias, o_bias=bias, **experts)


def _olmoe(read: Reader) -> ModelConfig:
    sizes = read.sizes({"context_length": 4096, "norm_eps": 1e-5})
    bias, clip = read.take("attention_bias", False, bool), read.take("clip_qkv", None, float)
    experts = _experts(read, 64, 8, read.take("norm_topk_prob", False, bool))
    return read.config("olmoe", sizes, qk_norm="all", qkv_bias=bias, o_bias=bias, qkv_clip=clip, **experts)


# model_type -> reader. A family whose architecture is Llama's needs a line here and one in families.py.
READERS = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen": _qwen,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gemma3": partial(_gemma3, family="gemma3"),
    "phi3": _phi3,
    "olmo2": _olmo2,
    "granite": _granite,
    "glm": partial(_glm4, family="glm", post_norm=False),
    "glm4": _glm4,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
}

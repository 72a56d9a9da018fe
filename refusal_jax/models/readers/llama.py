"""Reads configs of Llama and of families that differ from it by few switches."""

from functools import partial

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


READERS = {
    "llama": _llama,
    "mistral": _mistral,
    "phi3": _phi3,
    "olmo2": _olmo2,
    "granite": _granite,
    "glm": partial(_glm4, family="glm", post_norm=False),
    "glm4": _glm4,
}

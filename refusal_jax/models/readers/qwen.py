"""Reads configs of Qwen without experts."""

from refusal_jax.errors import shown
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.hf_attributes import Reader


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
    read.ignore("rope_theta")
    if read.hf.get("rope_theta") not in (None, theta):
        read.problems.append(
            f"rope_theta = {shown(read.hf['rope_theta'])} disagrees with rotary_emb_base = {theta}, "
            "the only one that Qwen 1's own code reads"
        )
    for name in ("rope_scaling", "rope_parameters"):  # which its code does not read
        read.only(name, None)
    bias = not read.take("no_bias", True, bool)
    read.only("scale_attn_weights", True)
    read.ignore("bf16", "fp16", "fp32", "use_flash_attn", "softmax_in_fp32", "onnx_safe", "use_cache_kernel")
    read.ignore("attn_dropout_prob", "emb_dropout_prob", "padded_vocab_size", "tokenizer_type", "params_dtype")
    rope = read.rope({}, sizes["context_length"], theta=theta, head_dim=sizes["head_dim"], partial=partial)
    return read.config("qwen", sizes, rope=rope, qkv_bias=True, o_bias=bias, mlp_bias=bias)


def _qwen2(read: Reader, family: str = "qwen2", head_dim: int | None = None, **switches) -> ModelConfig:
    sizes = read.sizes({"context_length": 32768, "head_dim": head_dim, "n_kv_heads": 32})
    first, window = read.take("max_window_layers", 28, int, least=0), qwen_window(read)
    windows = read.windows(sizes["n_layers"], window, lambda layer: window and layer >= first)
    return read.config(family, sizes, windows=windows, **{"qkv_bias": True} | switches)


def qwen_window(read: Reader) -> int | None:
    """Returns the window of Qwen's layers that have one, None if its config switches windows off."""
    if read.take("use_sliding_window", False, bool):
        return read.take_optional("sliding_window", 4096, int)
    read.ignore("sliding_window")
    return None


def _qwen3(read: Reader) -> ModelConfig:
    bias = read.take("attention_bias", False, bool)
    return _qwen2(read, "qwen3", head_dim=128, qk_norm="head", qkv_bias=bias, o_bias=bias)


READERS = {"qwen": _qwen, "qwen2": _qwen2, "qwen3": _qwen3}

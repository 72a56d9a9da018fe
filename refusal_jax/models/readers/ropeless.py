"""Readers of families in which some layers have no rotary embedding: SmolLM3, EXAONE 4 and Cohere's."""

from refusal_jax.errors import shown
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.hf_attributes import Reader


def _smollm3(read: Reader) -> ModelConfig:
    """Reads SmolLM3, whose layers without a rope are those that may have a window. `no_rope_layers` says 1 where there is one."""
    sizes = read.sizes({"n_kv_heads": 4, "context_length": 32768, "tied_embeddings": True})
    bias, mlp_bias = read.take("attention_bias", False, bool), read.take("mlp_bias", False, bool)
    read.ignore("max_window_layers")
    every, count = read.take("no_rope_layer_interval", 4, int), sizes["n_layers"]
    roped = read.take("no_rope_layers", [int((layer + 1) % every > 0) for layer in range(count)])
    if not isinstance(roped, list) or len(roped) < count or not all(flag in (0, 1) for flag in roped):
        read.problems.append(f"no_rope_layers = {shown(roped)}, expected 0 or 1 for each of {count} layers")
        roped = [1] * count
    ropeless = [layer for layer in range(count) if not roped[layer]]
    window = read.take_optional("sliding_window", None, int)
    window = window if read.take("use_sliding_window", False, bool) else None
    windows = read.windows(count, window, lambda layer: window and layer in ropeless)
    rope, biases = read.main_rope(sizes, 2e6), {"qkv_bias": bias, "o_bias": bias, "mlp_bias": mlp_bias}
    return read.config("smollm3", sizes, rope=rope, windows=windows, ropeless=ropeless, **biases)


def _exaone4(read: Reader) -> ModelConfig:
    """Reads EXAONE 4. Where the config has a window, layers without one have no rope either.

    The pattern of windows may be a text such as "LLLG", which is repeated; the last layer is then global, whatever it says.
    """
    sizes = read.sizes({"n_kv_heads": 32, "norm_eps": 1e-5})
    window, count = read.take_optional("sliding_window", 4096, int), sizes["n_layers"]
    pattern = read.take_optional("sliding_window_pattern", 4, None)
    if isinstance(pattern, str) and pattern and set(pattern) <= {"L", "G"}:
        is_windowed = {layer for layer in range(count - 1) if pattern[layer % len(pattern)] == "L"}
    elif pattern in (None, 0) or (isinstance(pattern, int) and pattern > 0):
        is_windowed = {layer for layer in range(count) if pattern and (layer + 1) % pattern}
    else:
        read.problems.append(f"sliding_window_pattern = {shown(pattern)}, expected a number or a text such as 'LLLG'")
        is_windowed = set()
    windows = read.windows(count, window, lambda layer: window and layer in is_windowed)
    ropeless = [layer for layer in range(count) if window and not windows[layer]]
    return read.config(
        "exaone4", sizes, windows=windows, ropeless=ropeless, pre_norm=False, post_norm=True, qk_norm="head"
    )


def _command(read: Reader, theta: float) -> tuple[dict, dict]:
    """Returns the sizes and the switches that all models of Cohere share: a parallel block, LayerNorm, scaled logits."""
    sizes = read.sizes({"context_length": 8192, "norm_eps": 1e-5, "tied_embeddings": True}, norm_eps="layer_norm_eps")
    bias, scale = read.take("attention_bias", False, bool), read.take("logit_scale", 0.0625, float)
    switches = {"parallel": True, "centred_norms": True, "logit_divisor": 1 / scale, "qkv_bias": bias, "o_bias": bias}
    return sizes, switches | {"rope": read.main_rope(sizes, theta, interleaved=True)}


def _cohere(read: Reader) -> ModelConfig:
    sizes, switches = _command(read, 5e5)
    return read.config("cohere", sizes, qk_norm="each" if read.take("use_qk_norm", False, bool) else "", **switches)


def _cohere2(read: Reader) -> ModelConfig:
    """Reads Command R7B and Command A, in which layers without a window have no rope."""
    sizes, switches = _command(read, 1e4)
    window, every = read.take_optional("sliding_window", 4096, int), read.take("sliding_window_pattern", 4, int)
    read.same("sliding_window_pattern", "layer_switch")
    read.ignore("layer_switch")
    for name, value in COHERE2_SAYS.items():
        read.only(name, value)
    windows = read.windows(sizes["n_layers"], window, lambda layer: (layer + 1) % every)
    ropeless = [layer for layer, here in enumerate(windows) if not here]
    return read.config("cohere2", sizes, windows=windows, ropeless=ropeless, **switches)


# What published configs of Command R7B say besides, which transformers does not read.
COHERE2_SAYS = {
    "order_of_interleaved_layers": "local_attn_first",
    "position_embedding_type": "rope_gptj",
    "rotary_pct": 1.0,
    "use_embedding_sharing": True,
    "use_gated_activation": True,
    "use_parallel_block": True,
    "use_parallel_embedding": False,
    "use_qk_norm": False,
}
READERS = {"smollm3": _smollm3, "exaone4": _exaone4, "cohere": _cohere, "cohere2": _cohere2}

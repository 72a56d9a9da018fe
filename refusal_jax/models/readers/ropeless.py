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


READERS = {"smollm3": _smollm3, "exaone4": _exaone4}

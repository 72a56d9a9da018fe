"""Reads configs of Gemma 1 to 3."""

from refusal_jax.models.config import ModelConfig
from refusal_jax.models.hf_attributes import Reader


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
    read.only("use_bidirectional_attention", False)
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


def gemma3(read: Reader, family: str = "gemma3_text") -> ModelConfig:
    """Reads Gemma 3. Layers with a window have their own rope; `rope_scaling` applies to the others. Of the soft caps
    that the config class has, transformers computes only the one of the logits, and not in the multimodal model."""
    more = {"vocab_size": 262208, "d_model": 2304, "n_layers": 26, "n_heads": 8, "n_kv_heads": 4, "d_mlp": 9216}
    sizes = read.sizes(GEMMA | {"context_length": 131072} | more, activation="hidden_activation")
    read.ignore("hidden_act", "_sliding_window_pattern")
    window, every = read.take_optional("sliding_window", 4096, int), read.take("sliding_window_pattern", 6, int)
    windows = read.windows(sizes["n_layers"], window, lambda layer: (layer + 1) % every)
    ropes = read.two_ropes(sizes, 1e6, 1e4, "rope_local_base_freq")
    read.only("attn_logit_softcapping", None)
    more = {}
    if family == "gemma3":
        read.only("final_logit_softcapping", None)
    else:
        more["logit_softcap"] = read.take("final_logit_softcapping", None, float)
    switches = {"qk_norm": "head"} | _gemma2_switches(read) | more
    return _gemma_config(read, family, sizes, windows=windows, **ropes, **switches)


READERS = {
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": gemma3,
}

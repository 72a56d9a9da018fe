"""Reads configs of Llama and of families that differ from it by few switches."""

from functools import partial

from refusal_jax.errors import shown
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.hf_attributes import Reader
from refusal_jax.models.rope import GROWTH, SPAN, is_number


def _llama(read: Reader) -> ModelConfig:
    bias = read.take("attention_bias", False, bool)
    sizes = read.sizes()
    return read.config("llama", sizes, qkv_bias=bias, o_bias=bias, mlp_bias=read.take("mlp_bias", False, bool))


def mistral(read: Reader, family: str = "mistral") -> ModelConfig:
    """Reads a Mistral, alone or the text part of a multimodal model."""
    sizes = read.sizes({"n_kv_heads": 8, "context_length": 131072})
    window = read.take_optional("sliding_window", 4096, int)
    return read.config(family, sizes, windows=[window] * sizes["n_layers"])


MINISTRAL3_ROPE = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, SPAN: 16384, GROWTH: 0.1}
MINISTRAL3_ROPE |= {"mscale": 1.0, "mscale_all_dim": 1.0}


def ministral3(read: Reader, family: str = "ministral3") -> ModelConfig:
    """Reads a Ministral 3, alone or the text part of a multimodal model. Its queries grow beyond the rope's first context."""
    sizes = read.sizes({"n_kv_heads": 8, "head_dim": 128, "context_length": 262144, "norm_eps": 1e-5})
    window = read.take_optional("sliding_window", None, int)
    spec = read.take("rope_scaling") or read.take("rope_parameters") or MINISTRAL3_ROPE
    growth = spec.get(GROWTH) if isinstance(spec, dict) else None
    if not isinstance(growth, int | float) or not 0 <= growth < 1e3 or not (spec.get(SPAN) or 0):
        read.problems.append(f"rope_parameters = {shown(spec)} lacks or misstates {GROWTH} or {SPAN}")
        spec, growth = MINISTRAL3_ROPE, 0.0
    spec = {name: value for name, value in spec.items() if name != GROWTH}
    rope = read.main_rope(sizes, 1e4, spec, query_growth=float(growth))
    return read.config(family, sizes, rope=rope, windows=[window] * sizes["n_layers"])


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


def _olmo3(read: Reader) -> ModelConfig:
    """Reads OLMo 3. Layers with a window have a plain rope; `rope_scaling` applies to the others."""
    bias, theta = read.take("attention_bias", False, bool), 5e5
    sizes = read.sizes({"norm_eps": 1e-5})
    window = read.take_optional("sliding_window", 4096, int)
    windows = read.windows(sizes["n_layers"], window, lambda layer: (layer + 1) % 4)
    if not read.hf.get("rope_parameters") and read.hf.get("rope_theta") not in (None, theta):
        read.problems.append(
            f"rope_theta = {shown(read.hf['rope_theta'])} is read differently by versions of transformers (5 keeps {theta} in "
            "layers with a window); write rope_parameters with a rope_theta for full_attention and for sliding_attention"
        )
    switches = {"pre_norm": False, "post_norm": True, "qk_norm": "all", "qkv_bias": bias, "o_bias": bias}
    return read.config("olmo3", sizes, windows=windows, **read.two_ropes(sizes, theta, theta), **switches)


def _seed_oss(read: Reader) -> ModelConfig:
    sizes = read.sizes({"n_kv_heads": 8, "head_dim": 128, "context_length": 524288})
    biases = {
        "qkv_bias": read.take("attention_bias", True, bool),
        "o_bias": read.take("attention_out_bias", False, bool),
        "mlp_bias": read.take("mlp_bias", False, bool),
    }
    return read.config("seed_oss", sizes, **biases)


def _ernie(read: Reader) -> ModelConfig:
    defaults = {"n_kv_heads": 2, "head_dim": 128, "context_length": 131072, "norm_eps": 1e-5, "tied_embeddings": True}
    sizes, bias = read.sizes(defaults), read.take("use_bias", False, bool)
    rope = read.main_rope(sizes, 5e5, interleaved=True)
    return read.config("ernie4_5", sizes, rope=rope, qkv_bias=bias, o_bias=bias, mlp_bias=bias)


CWM_ROPE = {"rope_type": "llama3", "rope_theta": 1e6, "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def _cwm(read: Reader) -> ModelConfig:
    sizes = read.sizes({"n_kv_heads": 8, "head_dim": 128, "context_length": 131072, "norm_eps": 1e-5})
    window = read.take_optional("sliding_window", 8192, int)
    windows = read.windows(sizes["n_layers"], window, lambda layer: layer % 4)
    given = read.take("rope_scaling") or read.take("rope_parameters")
    rope = read.main_rope(sizes, 1e6, given or CWM_ROPE | {SPAN: 8192})
    return read.config("cwm", sizes, rope=rope, windows=windows, mlp_bias=read.take("mlp_bias", False, bool))


def granite_switches(read: Reader) -> dict:
    """Reads what Granite's models have in common, with experts and without: multipliers, and biases of the attention."""
    bias = read.take("attention_bias", False, bool)
    return {
        "qkv_bias": bias,
        "o_bias": bias,
        "embed_scale": read.take("embedding_multiplier", 1.0, float),
        "residual_scale": read.take("residual_multiplier", 1.0, float),
        "query_scale": read.take("attention_multiplier", 1.0, float),
        "logit_divisor": read.take("logits_scaling", 1.0, float),
    }


def _granite(read: Reader) -> ModelConfig:
    return read.config("granite", read.sizes(), mlp_bias=read.take("mlp_bias", False, bool), **granite_switches(read))


def _glm4(read: Reader, family: str = "glm4", post_norm: bool = True) -> ModelConfig:
    sizes = read.sizes({"n_kv_heads": 2, "head_dim": 128, "context_length": 131072, "norm_eps": 1.5625e-07})
    rope = read.main_rope(sizes, partial=read.take("partial_rotary_factor", 0.5, float), interleaved=True)
    bias = read.take("attention_bias", True, bool)
    return read.config(family, sizes, rope=rope, post_norm=post_norm, qkv_bias=bias)


def _hunyuan(read: Reader) -> ModelConfig:
    """Reads Hunyuan's dense models. A rope of type "dynamic" with an `alpha` does not depend on the length: its base is that
    of NTK-aware scaling by a constant."""
    sizes = read.sizes({"norm_eps": 1e-5})
    read.ignore("attention_head_dim")  # the same again, which transformers does not read
    for name, value in HUNYUAN_SAYS.items():
        read.only(name, value)
    read.ignore(*HUNYUAN_IGNORED)
    bias, theta = read.take("attention_bias", False, bool), read.take("rope_theta", 1e4, float)
    spec, width = read.take("rope_scaling") or read.take("rope_parameters") or {}, sizes["head_dim"]
    if (
        isinstance(spec, dict)
        and "dynamic" in (spec.get("rope_type"), spec.get("type"))
        and is_number(spec.get("alpha"))
    ):
        base = spec.get("rope_theta") or theta
        stretched = base * spec["alpha"] ** (width / (width - 2)) if is_number(base) and width > 2 else base
        spec = {name: value for name, value in spec.items() if name not in UNREAD_WITH_ALPHA}
        spec |= {"rope_type": "default", "rope_theta": stretched}
    rope = read.main_rope(sizes, theta, spec=spec)
    return read.config(
        "hunyuan_v1_dense", sizes, rope=rope, qk_norm="head", norm_after_rope=True, qkv_bias=bias, o_bias=bias
    )


# What published configs of Hunyuan say besides, which transformers does not read.
HUNYUAN_SAYS = {
    "mlp_bias": False,
    "norm_type": "rms",
    "num_experts": 1,
    "position_embedding_xdrope": False,
    "use_cla": False,
    "use_mla": False,
    "use_qk_norm": True,
    "use_rotary_pos_emb": True,
}
HUNYUAN_IGNORED = """
    add_classification_head cla_share_factor class_num dense_list eod_token_id im_end_id im_newline_id im_start_id mask_init_id
    org_vocab_size pad_id pool_type text_end_id text_start_id
""".split()
UNREAD_WITH_ALPHA = {"alpha", "type", "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
READERS = {
    "llama": _llama,
    "mistral": mistral,
    "ministral3": ministral3,
    "phi3": _phi3,
    "olmo2": _olmo2,
    "olmo3": _olmo3,
    "seed_oss": _seed_oss,
    "ernie4_5": _ernie,
    "cwm": _cwm,
    "granite": _granite,
    "glm": partial(_glm4, family="glm", post_norm=False),
    "glm4": _glm4,
    "hunyuan_v1_dense": _hunyuan,
}

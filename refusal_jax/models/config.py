"""HF `config.json` to `ModelConfig`: one reader a family, by allow-list (see hf_attributes.py). A config that loads is a
config that we compute correctly."""

import dataclasses
import os
import pathlib
from functools import partial

from refusal_jax.errors import UserError, shown
from refusal_jax.files import read_json
from refusal_jax.models.hf_attributes import MOST_EXPERTS, MOST_LAYERS, Reader, adapter_advice
from refusal_jax.models.rope import SPAN, Rope

QUANTISATION = "quantization_config"

# The activations that the decoder computes, by HF name ("gelu_pytorch_tanh" is the tanh approximation).
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")


@dataclasses.dataclass(frozen=True)
class AttentionKind:
    """How the layers of one kind look back: their rotary embedding, and over how many tokens (None: all)."""

    rope: Rope
    window: int | None = None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What the decoder needs to know: sizes, then switches. Field names are this project's; the readers below say
    which HF attribute each comes from."""

    family: str
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_mlp: int  # of each expert, if there are experts
    context_length: int
    kinds: tuple[AttentionKind, ...]
    layer_kinds: tuple[int, ...]  # of each layer, an index into `kinds`
    activation: str
    norm_eps: float
    tied_embeddings: bool
    norm_offset: float = 0.0  # norms multiply by offset + weight
    pre_norm: bool = True  # norms before attention and MLP
    post_norm: bool = False  # norms after them, before their output is added to the residual
    qk_norm: str = ""  # "head": each head's queries and keys are normed; "all": all heads together
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qkv_clip: float | None = None  # queries, keys and values are clipped to +- this
    query_scale: float = 1.0  # multiplies q . k
    attention_softcap: float | None = None  # scores become cap * tanh(score / cap)
    logit_softcap: float | None = None
    embed_scale: float = 1.0
    residual_scale: float = 1.0  # multiplies what attention and MLP add to the residual
    logit_divisor: float = 1.0
    n_experts: int = 0  # 0: one dense MLP
    experts_per_token: int = 0
    renormalise_experts: bool = False  # the chosen experts' router weights are made to sum to 1

    @property
    def queries_per_kv(self) -> int:
        return self.n_heads // self.n_kv_heads


# Field of `ModelConfig` -> HF attribute and its type, where a family does not say otherwise.
SIZES = {
    "vocab_size": ("vocab_size", int),
    "d_model": ("hidden_size", int),
    "n_layers": ("num_hidden_layers", int),
    "n_heads": ("num_attention_heads", int),
    "n_kv_heads": ("num_key_value_heads", int),
    "head_dim": ("head_dim", int),
    "d_mlp": ("intermediate_size", int),
    "context_length": ("max_position_embeddings", int),
    "activation": ("hidden_act", None),
    "norm_eps": ("rms_norm_eps", float),
    "tied_embeddings": ("tie_word_embeddings", bool),
}
# Attributes that may be missing, and what they then are. A family adds the defaults of its HF config class.
DEFAULTS = {
    "context_length": 2048,
    "activation": "silu",
    "norm_eps": 1e-6,
    "tied_embeddings": False,
    "n_kv_heads": None,  # n_heads
    "head_dim": None,  # d_model / n_heads
}


def _sizes(read: Reader, defaults: dict | None = None, **names: str) -> dict:
    """The fields of `SIZES`. defaults: by field. names: fields whose HF attribute is called differently."""
    defaults = DEFAULTS | (defaults or {})
    sizes = {}
    for field, (name, kind) in SIZES.items():
        sizes[field] = read.take(names.get(field, name), defaults.get(field), kind, required=field not in defaults)
    if sizes["activation"] not in ACTIVATIONS:
        name = names.get("activation", "hidden_act")
        read.problems.append(f"{name} = {shown(sizes['activation'])} is not one of {', '.join(ACTIVATIONS)}")
    missing = [field for field in SIZES if sizes[field] is None and field not in defaults]
    if missing:  # which is reported; the reading goes on with what fits, to report everything at once
        sizes |= {field: 64 for field in missing}
        return sizes | {"n_kv_heads": sizes["n_heads"], "head_dim": 64}
    if sizes["n_layers"] > MOST_LAYERS:
        read.problems.append(f"num_hidden_layers = {sizes['n_layers']}, expected at most {MOST_LAYERS:,}")
        sizes["n_layers"] = 1
    sizes["n_kv_heads"] = sizes["n_kv_heads"] or sizes["n_heads"]
    sizes["head_dim"] = sizes["head_dim"] or max(sizes["d_model"] // sizes["n_heads"], 1)
    if sizes["n_heads"] % sizes["n_kv_heads"]:
        read.problems.append(
            f"num_attention_heads = {sizes['n_heads']} is not a multiple of num_key_value_heads = {sizes['n_kv_heads']}"
        )
    return sizes


def _rope(read: Reader, sizes: dict, theta: float = 1e4, spec: dict | None = None, **settings) -> Rope:
    """The rope of an HF config, which spells it `rope_scaling` (transformers 4) or `rope_parameters` (5)."""
    old, new = read.take("rope_scaling"), read.take("rope_parameters")
    theta = read.take("rope_theta", theta, float)
    name = "rope_scaling" if old or not new else "rope_parameters"
    spec = spec if spec is not None else old or new or {}
    if "partial" not in settings:
        read.only("partial_rotary_factor", 1.0)
    return read.rope(
        spec, name=name, theta=theta, head_dim=sizes["head_dim"], context=sizes["context_length"], **settings
    )


def _config(
    read: Reader, family: str, sizes: dict, *, rope=None, local_rope=None, windows=None, **switches
) -> ModelConfig:
    """windows: each layer's. local_rope: that of layers with a window, if it differs. switches: fields of `ModelConfig`."""
    rope = rope or _rope(read, sizes)
    if sizes["n_layers"] * switches.get("n_experts", 0) > MOST_EXPERTS:
        read.problems.append(f"{switches['n_experts']} experts in each layer, expected at most {MOST_EXPERTS:,} in all")
    layers = [AttentionKind((w and local_rope) or rope, w) for w in windows or [None] * sizes["n_layers"]]
    kinds = tuple(dict.fromkeys(layers))
    stretched = int(rope.factor * rope.original_context) if rope.kind in ("yarn", "dynamic") else 0
    fields = sizes | {"context_length": max(sizes["context_length"], stretched)}
    fields |= {"query_scale": sizes["head_dim"] ** -0.5} | switches
    return ModelConfig(family, kinds=kinds, layer_kinds=tuple(map(kinds.index, layers)), **fields)


def _llama(read: Reader) -> ModelConfig:
    bias = read.take("attention_bias", False, bool)
    sizes = _sizes(read)
    return _config(read, "llama", sizes, qkv_bias=bias, o_bias=bias, mlp_bias=read.take("mlp_bias", False, bool))


def _mistral(read: Reader) -> ModelConfig:
    sizes = _sizes(read, {"n_kv_heads": 8, "context_length": 131072})
    window = read.take_optional("sliding_window", 4096, int)
    return _config(read, "mistral", sizes, windows=[window] * sizes["n_layers"])


def _qwen(read: Reader) -> ModelConfig:
    """Qwen 1, whose own code is the reference. Beyond `seq_length` it would change its rope and scale its queries: there
    the context ends."""
    sizes = _sizes(
        read, {"context_length": 8192, "head_dim": 128}, head_dim="kv_channels", norm_eps="layer_norm_epsilon"
    )
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
    rope = _rope(read, sizes, theta, partial=partial)
    return _config(read, "qwen", sizes, rope=rope, qkv_bias=True, o_bias=bias, mlp_bias=bias)


def _qwen2(read: Reader, family: str = "qwen2", head_dim: int | None = None, **switches) -> ModelConfig:
    sizes = _sizes(read, {"context_length": 32768, "head_dim": head_dim})
    first, window = read.take("max_window_layers", 28, int, least=0), _qwen_window(read)
    windows = read.windows(sizes["n_layers"], window, lambda layer: window and layer >= first)
    return _config(read, family, sizes, windows=windows, **{"qkv_bias": True} | switches)


def _qwen_window(read: Reader) -> int | None:
    window = read.take_optional("sliding_window", 4096, int)
    return window if read.take("use_sliding_window", False, bool) else None


def _qwen3(read: Reader) -> ModelConfig:
    bias = read.take("attention_bias", False, bool)
    return _qwen2(read, "qwen3", head_dim=128, qk_norm="head", qkv_bias=bias, o_bias=bias)


def _gemma(read: Reader) -> ModelConfig:
    sizes = _sizes(read, GEMMA | {"n_kv_heads": 16, "activation": "gelu_pytorch_tanh"})
    if sizes["activation"] == "gelu":  # the first releases said so, and meant the approximation
        sizes["activation"] = "gelu_pytorch_tanh"
    read.only("hidden_activation", sizes["activation"])  # which versions of transformers read one or the other of
    return _gemma_config(read, "gemma", sizes)


# Of the classes' defaults, those that published configs rely on.
GEMMA = {"context_length": 8192, "head_dim": 256, "tied_embeddings": True, "activation": "gelu_pytorch_tanh"}


def _gemma_config(read: Reader, family: str, sizes: dict, **more) -> ModelConfig:
    bias = read.take("attention_bias", False, bool)
    scale = sizes["d_model"] ** 0.5
    return _config(read, family, sizes, norm_offset=1.0, embed_scale=scale, qkv_bias=bias, o_bias=bias, **more)


def _gemma2_switches(read: Reader) -> dict:
    return {"post_norm": True, "query_scale": read.take("query_pre_attn_scalar", 256, float) ** -0.5}


def _gemma2(read: Reader) -> ModelConfig:
    sizes = _sizes(read, GEMMA | {"n_kv_heads": 4}, activation="hidden_activation")
    read.ignore("hidden_act", "sliding_window_size")  # older names of attributes that are there too
    window = read.take_optional("sliding_window", 4096, int)
    windows = read.windows(sizes["n_layers"], window, lambda layer: layer % 2 == 0)
    caps = {
        "attention_softcap": read.take_optional("attn_logit_softcapping", 50.0, float),
        "logit_softcap": read.take_optional("final_logit_softcapping", 30.0, float),
    }
    return _gemma_config(read, "gemma2", sizes, windows=windows, **_gemma2_switches(read), **caps)


def _gemma3(read: Reader, family: str = "gemma3_text") -> ModelConfig:
    """Layers with a window have their own rope; what `rope_scaling` says holds for the others. Of the soft caps that the
    config class has, transformers computes the one of the logits, and not in the multimodal model."""
    more = {"vocab_size": 262208, "d_model": 2304, "n_layers": 26, "n_heads": 8, "n_kv_heads": 4, "d_mlp": 9216}
    sizes = _sizes(read, GEMMA | {"context_length": 131072} | more, activation="hidden_activation")
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
        rope=_rope(read, sizes, 1e6, wide),
        local_rope=read.rope(narrow, theta=theta, head_dim=sizes["head_dim"], context=sizes["context_length"]),
        qk_norm="head",
        **_gemma2_switches(read),
        **more,
    )


def _phi3(read: Reader) -> ModelConfig:
    sizes = _sizes(read, {"context_length": 4096, "norm_eps": 1e-5})
    window = read.take_optional("sliding_window", None, int)
    spec, span = read.take("rope_scaling") or read.take("rope_parameters") or {}, read.take(SPAN, 4096, int)
    if isinstance(spec, dict) and spec.get("rope_type", spec.get("type", "default")) != "default":
        spec = spec | {SPAN: span, "rope_type": "longrope"}  # the only other rope it has, once called "su" or "yarn"
    read.only("full_attn_mod", 1)
    read.only("interpolate_factor", 1)
    rope = _rope(read, sizes, spec=spec, partial=read.take("partial_rotary_factor", 1.0, float))
    return _config(read, "phi3", sizes, rope=rope, windows=[window] * sizes["n_layers"])


def _olmo2(read: Reader) -> ModelConfig:
    bias = read.take("attention_bias", False, bool)
    sizes = _sizes(read, {"norm_eps": 1e-5})
    return _config(read, "olmo2", sizes, pre_norm=False, post_norm=True, qk_norm="all", qkv_bias=bias, o_bias=bias)


def _granite(read: Reader) -> ModelConfig:
    bias = read.take("attention_bias", False, bool)
    return _config(
        read,
        "granite",
        _sizes(read),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=read.take("mlp_bias", False, bool),
        embed_scale=read.take("embedding_multiplier", 1.0, float),
        residual_scale=read.take("residual_multiplier", 1.0, float),
        query_scale=read.take("attention_multiplier", 1.0, float),
        logit_divisor=read.take("logits_scaling", 1.0, float),
    )


def _glm4(read: Reader, family: str = "glm4", post_norm: bool = True) -> ModelConfig:
    sizes = _sizes(read, {"n_kv_heads": 2, "head_dim": 128, "context_length": 131072, "norm_eps": 1.5625e-07})
    rope = _rope(read, sizes, partial=read.take("partial_rotary_factor", 0.5, float), interleaved=True)
    bias = read.take("attention_bias", True, bool)
    return _config(read, family, sizes, rope=rope, post_norm=post_norm, qkv_bias=bias)


def _experts(read: Reader, count: int, chosen: int, renormalise: bool) -> dict:
    """Their number goes by two names, which transformers takes for one another."""
    experts, used = read.take("num_experts", count, int), read.take("num_experts_per_tok", chosen, int)
    experts = read.take("num_local_experts", experts, int)
    read.same("num_experts", "num_local_experts")
    if used > experts:
        read.problems.append(f"num_experts_per_tok = {used} is more than the {experts} experts")
    return {"n_experts": experts, "experts_per_token": used, "renormalise_experts": renormalise}


def _mixtral(read: Reader) -> ModelConfig:
    sizes = _sizes(read, {"n_kv_heads": 8, "context_length": 131072, "norm_eps": 1e-5})
    windows = [read.take_optional("sliding_window", None, int)] * sizes["n_layers"]
    experts = _experts(read, 8, 2, True)
    return _config(read, "mixtral", sizes, rope=_rope(read, sizes, 1e6), windows=windows, **experts)


def _qwen3_moe(read: Reader) -> ModelConfig:
    sizes = _sizes(read, {"n_kv_heads": 4, "context_length": 32768, "d_mlp": 768}, d_mlp="moe_intermediate_size")
    read.only("decoder_sparse_step", 1)
    read.ignore(
        "intermediate_size", "max_window_layers"
    )  # of layers without experts, which `mlp_only_layers` would name
    bias = read.take("attention_bias", False, bool)
    experts = _experts(read, 128, 8, read.take("norm_topk_prob", False, bool))
    windows = [_qwen_window(read)] * sizes["n_layers"]
    return _config(read, "qwen3_moe", sizes, windows=windows, qk_norm="head", qkv_bias=bias, o_bias=bias, **experts)


def _olmoe(read: Reader) -> ModelConfig:
    sizes = _sizes(read, {"context_length": 4096, "norm_eps": 1e-5})
    bias, clip = read.take("attention_bias", False, bool), read.take("clip_qkv", None, float)
    experts = _experts(read, 64, 8, read.take("norm_topk_prob", False, bool))
    return _config(read, "olmoe", sizes, qk_norm="all", qkv_bias=bias, o_bias=bias, qkv_clip=clip, **experts)


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


def from_hf(hf: dict, where: str = "config.json") -> ModelConfig:
    """The `ModelConfig` of an HF config given as a dict.

    Of a multimodal config (one with a `text_config`) the text model is read. Raises UserError that lists everything
    wrong at once: unknown architecture, quantised weights, missing or malformed attributes, and non-default attributes
    that this code does not handle.
    """
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in READERS:
        raise UserError(
            f"{where} says model_type = {shown(model_type)}, which is not supported. Supported: "
            f"{', '.join(sorted(READERS))}. Use a checkpoint of one of these architectures, or add this one: README, "
            '"Adding a family".'
        )
    if hf.get(QUANTISATION):
        raise UserError(
            f"{where} describes weights quantised with {shown(_quantisation(hf[QUANTISATION]))}, which cannot be edited "
            "exactly. Use the original float16, bfloat16 or float32 checkpoint of the model."
        )
    hf, beside = _text_part(hf, where) if model_type in MULTIMODAL else (hf, {})
    read = Reader(hf, where)
    config = READERS[model_type](read)
    read.only("is_causal", True)
    read.finish(beside)
    return config


# model_type -> what its config says about its other parts, which nothing here runs.
MULTIMODAL = {
    "gemma3": {"vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index"}
}


def _text_part(hf: dict, where: str) -> tuple[dict, dict]:
    """The text model's attributes, and those that stand beside them and are not of the other parts."""
    text = hf.get("text_config")
    kind = text.get("model_type", f"{hf['model_type']}_text") if isinstance(text, dict) else None
    if kind != f"{hf['model_type']}_text":
        raise UserError(
            f"{where} has no text_config of model_type {hf['model_type']}_text, which a {hf['model_type']} checkpoint "
            "describes its text model by. Take config.json from the original checkpoint; one that a tool has written for the "
            f"text model alone must say model_type {hf['model_type']}_text."
        )
    beside = {k: v for k, v in hf.items() if k not in MULTIMODAL[hf["model_type"]] | {"text_config"}}
    # Whether the embeddings are tied is said here for the whole model, and what the text part says does not count.
    return text | {"tie_word_embeddings": beside.pop("tie_word_embeddings", True)}, beside


def _quantisation(spec) -> str:
    """The name of a quantisation format, for messages."""
    if not isinstance(spec, dict):
        return "unknown"
    old = "bitsandbytes" if spec.get("load_in_4bit") or spec.get("load_in_8bit") else "unknown"
    return str(spec.get("quant_method") or old)


def load_config(folder: str | pathlib.Path) -> ModelConfig:
    """The `ModelConfig` of the checkpoint in `folder`; raises UserError if there is none or it is not supported."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder. Pass the folder of a Hugging Face checkpoint (config.json, "
            "*.safetensors, tokenizer files); download one with `hf download NAME --local-dir DIR`."
        )
    if not os.path.lexists(folder / "config.json"):
        adapter = adapter_advice(folder)
        if adapter:
            raise UserError(adapter)
        try:
            found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        except OSError as error:
            raise UserError(f"{folder} could not be read ({error.strerror}). Check that you may read it.") from None
        raise UserError(
            f"{folder} is not a Hugging Face checkpoint: it has no config.json (found: {found}). Pass the "
            "folder that holds config.json, *.safetensors and the tokenizer files."
        )
    return from_hf(read_json(folder / "config.json"), str(folder / "config.json"))

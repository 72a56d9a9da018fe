"""Reads the text parts of multimodal configs, and says what such a config holds beside them.

Without images, text has the same position in every section of "mrope", which is then the plain rope.
"""

import dataclasses
from functools import partial

from refusal_jax.errors import UserError
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.hf_attributes import Reader
from refusal_jax.models.readers import deepseek, gemma, llama, qwen


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a multimodal config.

    text: the model_types that its text_config may have; the first is that of one that says none. keys: those of other parts,
    which nothing here runs. flat: whether older files have the text part's keys at the top, without a text_config. tied: whether
    the embeddings are tied if the file does not say so. either: whether they are tied, too, if the text part says so.
    """

    text: tuple[str, ...]
    keys: frozenset[str]
    flat: bool = False
    tied: bool = False
    either: bool = False


VISION = frozenset({"vision_config", "vision_start_token_id", "vision_end_token_id", "vision_token_id"})
VISION |= {"image_token_id", "video_token_id", "image_token_index", "text_config"}
AUDIO = {"audio_config", "audio_token_id", "boa_token_id", "eoa_token_id", "eoa_token_index", "eoi_token_id"}
AUDIO |= {"boi_token_id", "vision_soft_tokens_per_image", "audio_seq_length", "audio_ms_per_token"}
PARTS = {
    "gemma3": Parts(
        ("gemma3_text",), VISION | {"mm_tokens_per_image", "boi_token_index", "eoi_token_index"}, tied=True
    ),
    "gemma4": Parts(("gemma4_text",), VISION | AUDIO, tied=True),
    "gemma4_unified": Parts(("gemma4_unified_text",), VISION | AUDIO, tied=True),
    "llama4": Parts(("llama4_text",), VISION | {"boi_token_index", "eoi_token_index"}),
    "qwen2_vl": Parts(("qwen2_vl_text", "qwen2_vl"), VISION, flat=True, either=True),
    "qwen2_5_vl": Parts(("qwen2_5_vl_text", "qwen2_5_vl"), VISION, flat=True, either=True),
    "qwen3_vl": Parts(("qwen3_vl_text",), VISION),
    "qwen3_5": Parts(("qwen3_5_text",), VISION),
    "qwen3_5_moe": Parts(("qwen3_5_moe_text",), VISION),
    "kimi_k25": Parts(
        ("deepseek_v3", "kimi_k2"),
        VISION | {"projection_hidden_size", "projection_layer_norm_eps", "media_placeholder_token_id"},
        tied=True,
    ),
    "mistral3": Parts(
        ("mistral", "ministral3"),
        VISION | {"projector_hidden_act", "vision_feature_layer", "multimodal_projector_bias", "spatial_merge_size"},
    ),
}


def text_part(hf: dict, where: str) -> tuple[dict, dict]:
    """Returns the text model's attributes, and those beside them that describe no other part of the model.

    Raises UserError if the config has no text part of a known model_type.
    """
    parts, text = PARTS[hf["model_type"]], hf.get("text_config")
    if text is None and parts.flat:
        whole = {name: value for name, value in hf.items() if name not in parts.keys}
        width, heads = whole.get("hidden_size"), whole.get("num_attention_heads")
        whole_heads = width // heads if isinstance(width, int) and isinstance(heads, int) and heads else None
        given = whole.pop("head_dim", None)  # which the class does not hand on
        beside = {} if given in (None, whole_heads) else {"head_dim": given}
        return whole | {"model_type": parts.text[0]}, beside
    if not isinstance(text, dict) or text.get("model_type", parts.text[0]) not in parts.text:
        raise UserError(
            f"{where} has no text_config of model_type {' or '.join(parts.text)}, which a {hf['model_type']} checkpoint "
            "describes its text model by. Take config.json from the original checkpoint; one that a tool has written for the "
            f"text model alone must say model_type {parts.text[0]}."
        )
    beside = {name: value for name, value in hf.items() if name not in parts.keys}
    # Whether the embeddings are tied is said here for the whole model; what the text part says mostly does not count.
    tied = beside.pop("tie_word_embeddings", None)
    tied = parts.tied if tied is None else tied
    tied = tied or (parts.either and text.get("tie_word_embeddings") is True)
    return {"model_type": parts.text[0]} | text | {"tie_word_embeddings": tied}, beside


def _qwen2_vl(read: Reader, family: str) -> ModelConfig:
    sizes = read.sizes({"n_kv_heads": 8, "context_length": 32768, "norm_eps": 1e-5})
    first, window = read.take("max_window_layers", 80, int, least=0), qwen.qwen_window(read)
    windows = read.windows(sizes["n_layers"], window, lambda layer: window and layer >= first)
    spec = read.take("rope_scaling") or read.take("rope_parameters") or {}
    if isinstance(spec, dict) and spec.get("rope_type", spec.get("type")) == "mrope":
        spec = spec | {"rope_type": "default"}
    return read.config(family, sizes, windows=windows, rope=read.main_rope(sizes, 1e6, spec), qkv_bias=True)


def _qwen3_vl(read: Reader) -> ModelConfig:
    sizes = read.sizes({"n_kv_heads": 32, "head_dim": 128, "context_length": 128000})
    bias = read.take("attention_bias", False, bool)
    rope = read.main_rope(sizes, 5e5)
    return read.config("qwen3_vl", sizes, rope=rope, qk_norm="head", qkv_bias=bias, o_bias=bias)


def _mistral3(read: Reader) -> ModelConfig:
    text = llama.ministral3 if read.hf.get("model_type") == "ministral3" else llama.mistral
    return text(read, "mistral3")


READERS = {
    "gemma3": partial(gemma.gemma3, family="gemma3"),
    "qwen2_vl": partial(_qwen2_vl, family="qwen2_vl"),
    "qwen2_5_vl": partial(_qwen2_vl, family="qwen2_5_vl"),
    "qwen3_vl": _qwen3_vl,
    "kimi_k25": partial(deepseek.deepseek_v3, family="kimi_k25"),
    "mistral3": _mistral3,
}

"""Makes HF's config of a model from the metadata of its GGUF file, by allow-list: what may change the logits and is not known
here is an error.

What llama.cpp derives from sizes instead of metadata (Gemma's scale of queries) is derived here in the same way.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from refusal_jax.checkpoints.gguf_blocks import PLAIN, READABLE
from refusal_jax.checkpoints.gguf_gemma4 import gemma4
from refusal_jax.checkpoints.gguf_header import GgufHeader
from refusal_jax.checkpoints.gguf_hybrids import falcon_h1, granite_hybrid, nemotron_h, qwen3_next, qwen35, qwen35_moe
from refusal_jax.checkpoints.gguf_latent import deepseek2
from refusal_jax.checkpoints.gguf_layouts import (
    DELTA,
    DELTA_MOE,
    FALCON_H1,
    FUSED_MLP,
    GEMMA4,
    GPT_OSS,
    GRANITE_HYBRID,
    LATENT,
    LFM2,
    LFM2_MOE,
    LLAMA4,
    NEMOTRON_H,
    QWEN3_NEXT,
    Layout,
)
from refusal_jax.checkpoints.gguf_metadata import Metadata, windows
from refusal_jax.checkpoints.gguf_rope import ROPE_TENSORS, longrope, scaling_kind, whole_heads
from refusal_jax.checkpoints.tensors import listed
from refusal_jax.errors import UserError, did_you_mean, shown
from refusal_jax.models.quantisation import GGUF

NOT_MODELS = {
    "clip": "holds the vision part of a multimodal model (mmproj), not a language model. Pass the file of the language model",
    "controlvector": "holds a control vector, not a model. Pass the file of the model that it steers",
    "adapter": "holds an adapter (LoRA) without its model. Merge the two with llama.cpp's llama-export-lora and pass the result",
    "mmproj": "holds the vision part of a multimodal model (mmproj), not a language model. Pass the file of the language model",
    "imatrix": "holds an importance matrix, not a model. Pass the file of the model that was quantised with it",
    "vocab": "holds a vocabulary without weights. Pass the file of the model",
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An architecture of GGUF. read: returns what is this architecture's own in HF's config. layout: of its tensors.
    own: settings that `read` takes, because they mean something else than elsewhere."""

    read: Callable[[Metadata, dict], dict]
    layout: Layout
    own: frozenset[str] = frozenset()


def architecture_of(header: GgufHeader) -> Architecture:
    """Returns the architecture of a GGUF model. Raises UserError for another one, and for files that hold no model."""
    name, kind = (header.metadata.get(f"general.{key}") for key in ("architecture", "type"))
    for found in (kind, name):
        if isinstance(found, str) and found in NOT_MODELS:
            raise UserError(f"{header.paths[0]} {NOT_MODELS[found]}.")
    if kind not in (None, "model"):
        raise UserError(f"{header.paths[0]} says that it holds {shown(kind)}, expected a model.")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UserError(
            f"{header.paths[0]} is of the architecture {shown(name)}, which is not read from GGUF files. Supported: "
            f"{', '.join(sorted(ARCHITECTURES))}.{did_you_mean(name, ARCHITECTURES)} Use the original Hugging Face checkpoint of "
            "the model, if its architecture is supported there."
        )
    return ARCHITECTURES[name]


def gguf_config(header: GgufHeader) -> dict[str, Any]:
    """Returns HF's config of a GGUF model. Raises UserError for settings that are missing, malformed or not supported."""
    architecture = architecture_of(header)
    unread = [f"{t.name} is {t.type.name}" for t in header.tensors.values() if t.type not in READABLE]
    if unread:
        raise UserError(
            f"{header.paths[0]} holds tensors of a type that is not read: {listed(unread)}. Read are "
            f"{', '.join(kind.name for kind in READABLE)}. Use another quantisation of the model, or the original checkpoint."
        )
    read = Metadata(header, header.metadata["general.architecture"])
    hidden, heads = (read.take(key, int, required=True) for key in ("embedding_length", "attention.head_count"))
    head_dim = read.take("attention.key_length", int) or (hidden or 0) // (heads or 1)
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        read.problems.append("there is no tensor token_embd.weight, a matrix")
    if "attention.value_length" not in architecture.own:
        read.only("attention.value_length", head_dim)
    read.only("attention.causal", True)
    kv, width = "attention.head_count_kv", "feed_forward_length"
    config = {
        "vocab_size": embedding.shape[0] if embedding else 1,
        "hidden_size": hidden,
        "num_hidden_layers": read.take("block_count", int, required=True),
        "num_attention_heads": heads,
        "num_key_value_heads": heads if kv in architecture.own else read.take(kv, int) or heads,
        "head_dim": head_dim,
        "intermediate_size": None
        if width in architecture.own
        else read.take(width, int, required=not read.named("expert_count")),
        "max_position_embeddings": read.take("context_length", int, required=True),
        "rms_norm_eps": read.take("attention.layer_norm_rms_epsilon", float, required=True),
        "rope_theta": read.take("rope.freq_base", float, 10000.0),
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    config |= architecture.read(read, config)
    read.finish()
    ids = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {name: header.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in ids.items()}
    stored = {t.type.name for t in header.tensors.values() if len(t.shape) > 1}
    dtype = {"F32": "float32", "F16": "float16"}.get(stored.pop()) if len(stored) == 1 else None
    named = {"architectures": [CLASSES[config["model_type"]]], "torch_dtype": dtype or "bfloat16"}
    found = config | {key: value for key, value in ids.items() if value is not None} | named
    if types := quantised_types(header):
        found["quantization_config"] = {"quant_method": GGUF, "types": types}
    return {key: value for key, value in found.items() if value is not None or key in NULL}


def quantised_types(header: GgufHeader) -> list[str]:
    """Returns the names of the types of a model's matrices that are dequantised, the most frequent first."""
    counts: dict[str, int] = {}
    for tensor in header.tensors.values():
        if tensor.type not in PLAIN:
            counts[tensor.type.name] = counts.get(tensor.type.name, 0) + math.prod(tensor.shape)
    return sorted(counts, key=lambda name: -counts[name])


def _llama(read: Metadata, config: dict) -> dict:
    """Reads Llama, and what uses its architecture: Mistral, and Mixtral with experts."""
    own = whole_heads(read, config)
    window = read.take("attention.sliding_window", int)
    if read.take("expert_count", int):
        experts = {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
        own |= {name: read.take(key, int, required=True) for name, key in experts.items()}
        return own | {"model_type": "mixtral", "sliding_window": window or None}
    if window:
        return own | {"model_type": "mistral", "sliding_window": window}
    bias = read.has("attn_q.bias") or read.has("attn_output.bias") or read.has("attn_qkv.bias")
    return own | {"model_type": "llama", "attention_bias": bias, "mlp_bias": read.has("ffn_up.bias")}


def _llama4(read: Metadata, config: dict) -> dict:
    """Reads Llama 4. What no file says is what llama.cpp takes for granted: chunks, how queries grow, and which layers have no
    rope; and that of the two models one norms queries and keys, which it knows by the number of experts."""
    experts = read.take("expert_count", int, required=True)
    read.only("attention.sliding_window", 8192)
    read.only("attention.sliding_window_pattern", 4)
    read.only("expert_gating_func", 2)  # sigmoid
    return whole_heads(read, config) | {
        "model_type": "llama4_text",
        "intermediate_size_mlp": config["intermediate_size"],
        "intermediate_size": read.take("expert_feed_forward_length", int, required=True),
        "num_local_experts": experts,
        "num_experts_per_tok": read.take("expert_used_count", int, required=True),
        "interleave_moe_layer_step": read.take("interleave_moe_layer_step", int, required=True),
        "use_qk_norm": experts != 128,
        "attention_chunk_size": 8192,
        "no_rope_layer_interval": 4,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
    }


def _qwen2(read: Metadata, config: dict) -> dict:
    return whole_heads(read, config) | {"model_type": "qwen2", "use_sliding_window": False}


def _qwen3(read: Metadata, config: dict) -> dict:
    own = {"model_type": "qwen3", "use_sliding_window": False, "attention_bias": read.has("attn_q.bias")}
    return whole_heads(read, config) | own


def _qwen3_moe(read: Metadata, config: dict) -> dict:
    used = read.take("expert_used_count", int, required=True)
    width = read.take("expert_feed_forward_length", int) or (config["intermediate_size"] or 0) // (used or 1)
    read.only("expert_gating_func", 1)  # softmax
    read.only("expert_weights_norm", True)
    read.only("expert_group_count", 1)
    read.only("expert_group_used_count", 1)
    return _qwen3(read, config) | {
        "model_type": "qwen3_moe",
        "num_experts": read.take("expert_count", int, required=True),
        "num_experts_per_tok": used,
        "moe_intermediate_size": width,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _gemma(read: Metadata, config: dict) -> dict:
    activation = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    return whole_heads(read, config) | {"model_type": "gemma"} | activation


def _query_scalar(config: dict, large: int) -> int | None:
    """Returns what Gemma scales queries by: in the largest model, which llama.cpp knows by its layers, the heads' share of the
    residual stream, else the size of a head."""
    wide = config["num_hidden_layers"] == large
    return (config["hidden_size"] or 0) // (config["num_attention_heads"] or 1) if wide else config["head_dim"]


def _gemma2(read: Metadata, config: dict) -> dict:
    base = read.take("rope.freq_base_swa", float, config["rope_theta"])
    if base != config["rope_theta"]:
        read.problems.append(f"gemma2.rope.freq_base_swa = {base} differs from rope.freq_base")
    return _gemma(read, config) | {
        "model_type": "gemma2",
        "query_pre_attn_scalar": _query_scalar(config, 46),
        "sliding_window": read.take("attention.sliding_window", int, 4096),
        "layer_types": windows(read, config, 2),
        "attn_logit_softcapping": read.take("attn_logit_softcapping", float, 50.0),
        "final_logit_softcapping": read.take("final_logit_softcapping", float, 30.0),
    }


def _gemma3(read: Metadata, config: dict) -> dict:
    """Reads the text model of Gemma 3. Layers with a window have a rope of their own, which is never rescaled."""
    own = _gemma(read, config)
    theta, scaling = config.pop("rope_theta"), own.pop("rope_scaling")
    local, window = read.take("rope.freq_base_swa", float, 10000.0), read.take("attention.sliding_window", int)
    types = windows(read, config, 6) if window else ["full_attention"] * (config["num_hidden_layers"] or 0)
    return own | {
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": _query_scalar(config, 62),
        "sliding_window": window or None,
        "layer_types": types,
        "final_logit_softcapping": read.take("final_logit_softcapping", float) or None,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": theta} | (scaling or {}),
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


def _phi3(read: Metadata, config: dict) -> dict:
    rotated = read.take("rope.dimension_count", int, config["head_dim"])
    kind = "longrope" if ROPE_TENSORS[1] in read.header.tensors else scaling_kind(read)
    if kind not in ("none", "linear", "longrope"):
        read.problems.append(f"{read.architecture}.rope.scaling.type = {kind} is not supported")
    span = read.take("rope.scaling.original_context_length", int) or config["max_position_embeddings"]
    scaling = longrope(read, config, span)
    read.only("rope.scaling.attn_factor", 1.0) if scaling is None else None
    read.seen.add("rope.scaling.type")
    if scaling:
        scaling.pop("original_max_position_embeddings")
        scaling["type"] = scaling.pop("rope_type")
    return {
        "model_type": "phi3",
        "rope_scaling": scaling,
        "original_max_position_embeddings": span,
        "partial_rotary_factor": rotated / config["head_dim"] if config["head_dim"] else 1.0,
        "sliding_window": read.take("attention.sliding_window", int) or None,
    }


def _gpt_oss(read: Metadata, config: dict) -> dict:
    """Reads gpt-oss. That its rope's bounds are not rounded, and how its experts' gates are clamped, no file says."""
    own, width = whole_heads(read, config), read.take("expert_feed_forward_length", int, config["intermediate_size"])
    base = read.take("rope.freq_base_swa", float, config["rope_theta"])
    if base != config["rope_theta"]:
        read.problems.append(f"gpt-oss.rope.freq_base_swa = {base} differs from rope.freq_base")
    read.only("expert_gating_func", 1, 3)  # softmax over the chosen experts, which is its default
    if own["rope_scaling"]:
        own["rope_scaling"]["truncate"] = False
    return own | {
        "model_type": "gpt_oss",
        "intermediate_size": width,
        "num_local_experts": read.take("expert_count", int, required=True),
        "num_experts_per_tok": read.take("expert_used_count", int, required=True),
        "sliding_window": read.take("attention.sliding_window", int, required=True),
        "layer_types": windows(read, config, 2),
        "attention_bias": read.has("attn_q.bias") or read.has("attn_qkv.bias"),
        "swiglu_limit": 7.0,
    }


def _lfm2(read: Metadata, config: dict) -> dict:
    """Reads LFM2. Which layers have a convolution, the tensors say; how wide its MLP is, the file says as it is."""
    count, tensors = config["num_hidden_layers"] or 0, read.header.tensors
    kinds = {True: "conv", False: "full_attention"}
    return whole_heads(read, config) | {
        "model_type": "lfm2",
        "norm_eps": config.pop("rms_norm_eps"),
        "block_auto_adjust_ff_dim": False,
        "conv_L_cache": read.take("shortconv.l_cache", int, required=True),
        "conv_bias": False,
        "layer_types": [
            kinds[f"blk.{layer}.shortconv.conv.weight" in tensors] for layer in range(min(count, len(tensors)))
        ],
    }


def _lfm2_moe(read: Metadata, config: dict) -> dict:
    own = _lfm2(read, config)
    read.only("expert_gating_func", 2)  # sigmoid
    read.only("expert_weights_norm", True)
    del own["block_auto_adjust_ff_dim"]
    return own | {
        "model_type": "lfm2_moe",
        "num_experts": read.take("expert_count", int, required=True),
        "num_experts_per_tok": read.take("expert_used_count", int, required=True),
        "moe_intermediate_size": read.take("expert_feed_forward_length", int, required=True),
        "num_dense_layers": read.take("leading_dense_block_count", int, 0),
        "routed_scaling_factor": read.take("expert_weights_scale", float, 1.0),
        "use_expert_bias": read.has("exp_probs_b.bias"),
        "norm_topk_prob": True,
    }


CLASSES = {
    "llama": "LlamaForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "lfm2": "Lfm2ForCausalLM",
    "lfm2_moe": "Lfm2MoeForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "falcon_h1": "FalconH1ForCausalLM",
    "nemotron_h": "NemotronHForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "gemma4_text": "Gemma4ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
NULL = ("q_lora_rank",)  # which HF's class gives a number where a config does not say null
PLAIN_LAYOUT, GEMMA_LAYOUT = Layout(), Layout(norm_offset=1.0)
NEMOTRON = Layout(permuted=True, own=NEMOTRON_H, prefixes=("attn_", "mlp_", "inner_"))
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_llama, Layout(permuted=True)),
    "llama4": Architecture(_llama4, Layout(own=LLAMA4)),
    "qwen2": Architecture(_qwen2, PLAIN_LAYOUT),
    "qwen3": Architecture(_qwen3, PLAIN_LAYOUT),
    "qwen3moe": Architecture(_qwen3_moe, PLAIN_LAYOUT),
    "gemma": Architecture(_gemma, GEMMA_LAYOUT),
    "gemma2": Architecture(_gemma2, GEMMA_LAYOUT),
    "gemma3": Architecture(_gemma3, GEMMA_LAYOUT),
    "gpt-oss": Architecture(_gpt_oss, Layout(own=GPT_OSS)),
    "phi3": Architecture(_phi3, Layout(own=FUSED_MLP)),
    "lfm2": Architecture(_lfm2, Layout(own=LFM2)),
    "lfm2moe": Architecture(_lfm2_moe, Layout(own=LFM2_MOE)),
    "granitehybrid": Architecture(granite_hybrid, Layout(permuted=True, own=GRANITE_HYBRID)),
    "falcon-h1": Architecture(falcon_h1, Layout(own=FALCON_H1)),
    "nemotron_h": Architecture(nemotron_h, NEMOTRON),
    "nemotron_h_moe": Architecture(nemotron_h, NEMOTRON),
    "qwen35": Architecture(qwen35, Layout(norm_offset=1.0, tiled=True, own=DELTA)),
    "qwen35moe": Architecture(qwen35_moe, Layout(norm_offset=1.0, tiled=True, own=DELTA_MOE)),
    "qwen3next": Architecture(qwen3_next, Layout(norm_offset=1.0, by_key_head=True, own=QWEN3_NEXT)),
    "gemma4": Architecture(
        gemma4,
        Layout(own=GEMMA4, prefixes=("full_", "dense_")),
        frozenset({"attention.head_count_kv", "feed_forward_length"}),
    ),
    "deepseek2": Architecture(deepseek2, Layout(own=LATENT), frozenset({"attention.value_length"})),
}

"""Judges the keys of a config.json that no reader takes.

transformers gives a model the keys that the config class of its `model_type` declares or takes apart, and every one of these
is taken by the reader of that type (tests/test_config_keys.py compares them). So what is left cannot change what transformers
computes. It passes, named in a note. Words of architecture are the exception: they show that the file was written for another
implementation, whose model may compute something else.
"""

import functools
import re

from refusal_jax.errors import shown
from refusal_jax.logs import LOG

# Keys that cannot change the logits of inference and need no note: bookkeeping, training, and the defaults of `generate`.
INERT = frozenset(
    """
    _name_or_path _model_name_or_path model_name architectures auto_map torch_dtype dtype transformers_version model_type
    use_cache initializer_range attention_dropout hidden_dropout residual_dropout pretraining_tp
    bos_token_id eos_token_id pad_token_id unk_token_id
    return_dict output_hidden_states output_attentions is_encoder_decoder is_decoder id2label label2id problem_type num_labels
    finetuning_task task_specific_params tokenizer_class prefix chunk_size_feed_forward _attn_implementation
    _attn_implementation_autoset add_cross_attention tie_encoder_decoder use_return_dict torchscript
    cross_attention_hidden_size decoder_start_token_id sep_token_id use_bfloat16 pruned_heads tf_legacy_loss
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k
    top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    is_llama_config unsloth_fixed unsloth_version transformers.js_config max_sequence_length model_max_length
    tokenizer_model_max_length _flash_attn_2_enabled use_flash_attention_2 attn_implementation experts_implementation
    _experts_implementation _commit_hash neftune_noise_alpha gradient_checkpointing num_logits_to_keep pad_token
    router_aux_loss_coef output_router_logits router_jitter_noise embd_pdrop resid_pdrop cache_implementation
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
""".split()
)
# Words in the name of a key that speak of architecture.
ARCHITECTURE = re.compile(
    r"rope|rotary|alibi|window|sliding|norm(?!al)|(^|_)gat(e|ed|ing)(_|$)|bias|expert|(^|_)heads?(_|$)|draft|eagle|medusa|"
    r"dflash|bidirectional|causal|softcap|clip|(^|_)sinks?(_|$)|multiplier|scal(e|ing|ar)|num_target_layers|^quantization"
)
# Such keys that are harmless all the same. A bias counts by its tensors, and unknown tensors are an error.
HARMLESS = re.compile(
    r"(attention|attn|qkv|mlp|lm_head|head|add|use)_bias|bias|v_head_\w+|unsloth_\w+|\w*loss\w*|\w*lora_\w+|"
    r"fused_\w+norm|\w*norm_(kernel|implementation)|use_(fused|flash|liger)_\w+|rope_(fusion|impl\w*)|max_window_layers"
)
# Other names of what readers take. One that says the same passes, one that says something else does not.
ALIASES = {
    "hidden_size": ("n_embd", "d_model", "dim", "model_dim", "embed_dim", "word_embed_proj_dim"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("n_kv_heads", "num_kv_heads", "multi_query_group_num", "num_query_groups"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size"),
    "rms_norm_eps": ("norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon"),
}
MEANING = {alias: name for name, aliases in ALIASES.items() for alias in aliases}
# Names of model classes that are not the language model of their `model_type`.
OTHER_MODELS = re.compile(r"eagle|draft|medusa|dflash|speculator|mtp", re.IGNORECASE)


def is_off(value) -> bool:
    """Returns whether a value means that something is not there: null, false, zero or empty."""
    return value in (None, False, {}, [], "")


def said(name: str, text: dict) -> bool:
    """Returns whether the text part of a multimodal config says itself what a key beside it, which does not count, is about."""
    ropes = ("rope_scaling", "rope_parameters", "rope_theta")
    return name in text or (name in ropes and any(text.get(rope) for rope in ropes[:2]))


def problem(name: str, value, beside: dict) -> str:
    """Returns what speaks against passing over a key that no reader takes, "" if nothing does. beside: all keys of the file."""
    if name in INERT or is_off(value):
        return ""
    same = MEANING.get(name)
    if same in beside and isinstance(value, int | float):
        differs = value != beside[same]
        return f"{name} = {shown(value)} contradicts {same} = {shown(beside[same])}" if differs else ""
    windows_off = beside.get("use_sliding_window") is False and "window" in name
    if not ARCHITECTURE.search(name.lower()) or HARMLESS.fullmatch(name.lower()) or windows_off:
        return ""
    return f"{name[:80]} = {shown(value)} is not supported"


def other_model(architectures) -> str:
    """Returns the name among a config's `architectures` that is a model of another kind, such as a draft head; "" if none is."""
    names = architectures if isinstance(architectures, list) else [architectures]
    return next((name for name in names if isinstance(name, str) and OTHER_MODELS.search(name)), "")


@functools.cache
def tell(where: str, names: tuple[str, ...]) -> None:
    """Says once for each file which of its keys are passed over."""
    LOG.info(
        f"{where} has keys that its architecture does not read in transformers either: {', '.join(names)}. They change nothing."
    )

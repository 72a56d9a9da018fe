"""The attributes of an HF config by allow-list.

Every attribute is either handled (it changes `ModelConfig`), inert (it cannot change what inference computes), or
unsupported: then any value but the one that means "off" is an error that names the attribute.
"""

import os
import pathlib

from refusal_jax.errors import UserError, shown
from refusal_jax.files import read_json
from refusal_jax.models.rope import Rope, is_number, rope_from_hf

# Attributes that cannot change the logits of inference: bookkeeping, training, and the defaults of `generate`.
INERT = frozenset(
    """
    _name_or_path architectures auto_map torch_dtype dtype transformers_version model_type use_cache initializer_range
    attention_dropout hidden_dropout pretraining_tp bos_token_id eos_token_id pad_token_id unk_token_id
    return_dict output_hidden_states output_attentions is_encoder_decoder is_decoder id2label label2id problem_type
    finetuning_task task_specific_params tokenizer_class prefix chunk_size_feed_forward _attn_implementation
    _attn_implementation_autoset add_cross_attention tie_encoder_decoder use_return_dict torchscript
    cross_attention_hidden_size decoder_start_token_id sep_token_id
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


ADAPTER = "adapter_config.json"
MERGE = """

    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    model = AutoPeftModelForCausalLM.from_pretrained({folder!r}, dtype="auto").merge_and_unload()
    model.save_pretrained({target!r})
    AutoTokenizer.from_pretrained({base}).save_pretrained({target!r})
"""
MOST = 2**31 - 1  # of integers: sizes, counts and ids are int32 on the devices
MOST_LAYERS, MOST_EXPERTS = 10_000, 100_000  # the latter in all layers together: each is several tensors to look for


def adapter_advice(folder: pathlib.Path) -> str:
    """Returns what to do about a folder that holds a PEFT adapter and no model, "" if it holds none."""
    if not os.path.lexists(folder / ADAPTER):
        return ""
    base = read_json(folder / ADAPTER).get("base_model_name_or_path")
    code = MERGE.format(
        folder=str(folder), target=f"{folder}-merged", base=repr(base if isinstance(base, str) else "BASE")
    )
    return f"{folder} holds a PEFT adapter of {shown(base or 'a base model')}, not a model. Merge the two:{code}"


class Reader:
    """Takes attributes out of an HF config and remembers which, so that the rest can be judged."""

    def __init__(self, hf: dict, where: str):
        self.hf, self.where, self.problems = hf, where, []
        self.seen, self.fixed, self.ignored = set(), set(), set()

    def take(self, name, default=None, kind=None, required=False, least=1):
        """The attribute's value, or `default` where it is missing or null; anything wrong becomes a problem."""
        self.seen.add(name)
        value = self.hf.get(name)
        if value is None:
            if required:
                self.problems.append(f"{name} is missing")
            return default
        if kind is int and (not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST):
            kind_of = "a positive integer" if least == 1 else f"an integer from {least} up"
            limit = f" of at most {MOST:,}" if isinstance(value, int) and value > MOST else ""
            self.problems.append(f"{name} = {shown(value)}, expected {kind_of}{limit}")
            return default
        if kind is float and not is_number(value):
            self.problems.append(f"{name} = {shown(value)}, expected a positive number")
            return default
        if kind is dict and not isinstance(value, dict):
            self.problems.append(f"{name} = {shown(value)}, expected an object")
            return default
        if kind is bool and not isinstance(value, bool):
            self.problems.append(f"{name} = {shown(value)}, expected true or false")
            return default
        return value

    def take_optional(self, name, default, kind):
        """As `take`, for attributes whose null means "off" rather than the default."""
        return self.take(name, None if name in self.hf else default, kind)

    def ignore(self, *names):
        """Attributes that this architecture has and its forward pass does not read."""
        self.ignored.update(names)

    def only(self, name, value):
        """An attribute of which just one value is computed here."""
        self.fixed.add(name)
        if self.hf.get(name) not in (None, value):
            self.problems.append(f"{name} = {shown(self.hf[name])} is not supported (only {value!r} is)")

    def same(self, *names):
        """Attributes that mean the same thing, of which transformers' versions read one or the other."""
        values = {name: self.hf[name] for name in names if self.hf.get(name) is not None}
        if len({str(value) for value in values.values()}) > 1:
            found = " and ".join(f"{name} = {shown(value)}" for name, value in values.items())
            self.problems.append(f"{found} disagree")

    def finish(self, beside: dict):
        """Raises UserError if there is any problem. beside: what surrounds these attributes in a multimodal config.

        "Off" is null, false, zero or empty.
        """
        left = {
            name: value for name, value in self.hf.items() if name not in self.seen | self.fixed | self.ignored
        } | beside
        for name, value in sorted(left.items()):
            if name not in INERT and value not in (None, False, {}, []):
                self.problems.append(f"{name[:80]} = {shown(value)} is not supported")
        if self.problems:
            raise UserError(
                f"{self.where} cannot be run faithfully: {'; '.join(self.problems)}. Nothing was loaded, because "
                "ignoring an attribute would give wrong activations. Use a checkpoint of a supported architecture, or "
                "teach refusal_jax/models/config.py the attribute."
            )

    def rope(self, spec, context: int, name: str = "rope_scaling", **settings) -> Rope:
        """`rope_from_hf` of the attribute `name`, whose error becomes one of the problems."""
        try:
            if not isinstance(spec, dict):
                raise ValueError(f" = {shown(spec)}, expected an object")
            return rope_from_hf(spec, context=context, **settings)
        except ValueError as error:
            self.problems.append(f"{name}{error}")
            return Rope(1e4, 2)

    def windows(self, n_layers: int, window: int | None, is_windowed) -> list[int | None]:
        """Each layer's window: by `layer_types`, or where that is missing by a function of the layer's index."""
        types = self.take("layer_types")
        if types is None:
            types = ["sliding_attention" if is_windowed(layer) else "full_attention" for layer in range(n_layers)]
        known = isinstance(types, list) and all(kind in ("full_attention", "sliding_attention") for kind in types)
        if not known or len(types) != n_layers:
            self.problems.append(
                f"layer_types = {shown(types)}, expected 'full_attention' or 'sliding_attention' for each of {n_layers} layers"
            )
        elif window is None and "sliding_attention" in types:
            self.problems.append("sliding_window is null, but there are layers of type 'sliding_attention'")
        else:
            return [window if kind == "sliding_attention" else None for kind in types]
        return [None] * n_layers

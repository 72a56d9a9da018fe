"""HF `config.json` to `ModelConfig`, by allow-list.

Every attribute of an HF config is either handled (it changes `ModelConfig`), inert (it cannot change what inference
computes), or unsupported: then any value but the one that means "off" is an error that names the attribute. A config
that loads is a config that we compute correctly.
"""

import dataclasses
import json
import math
import pathlib

from refusal_jax.errors import UserError

# Attributes that cannot change the logits of inference: bookkeeping, training, and the defaults of `generate`.
INERT = frozenset(
    """
    _name_or_path architectures torch_dtype dtype transformers_version model_type use_cache initializer_range
    attention_dropout hidden_dropout pretraining_tp bos_token_id eos_token_id pad_token_id unk_token_id
    return_dict output_hidden_states output_attentions is_encoder_decoder is_decoder id2label label2id problem_type
    finetuning_task task_specific_params tokenizer_class prefix chunk_size_feed_forward _attn_implementation
    _attn_implementation_autoset add_cross_attention tie_encoder_decoder use_return_dict torchscript
    cross_attention_hidden_size decoder_start_token_id sep_token_id
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k
    top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
""".split()
)

QUANTISATION = "quantization_config"


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding: base `theta` and its rescaling. `kind`: default, linear or llama3."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_context: int = 0

    def inverse_frequencies(self, head_dim: int) -> list[float]:
        """Radians per token of each rotated pair, `[head_dim / 2]`, in float64.

        "llama3" slows the pairs whose wavelength exceeds `original_context / low_freq_factor` by `factor`, leaves
        those shorter than `original_context / high_freq_factor`, and blends in between (Llama 3.1, section 3.3.2).
        """
        plain = [self.theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
        if self.kind == "default":
            return plain
        if self.kind == "linear":
            return [f / self.factor for f in plain]
        scaled = []
        for f in plain:
            turns = self.original_context * f / (2 * math.pi)  # full turns inside the original context
            keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            keep = min(max(keep, 0.0), 1.0)
            scaled.append(keep * f + (1 - keep) * f / self.factor)
        return scaled


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What the decoder needs to know; field names are this project's, see `from_hf` for their HF origin."""

    family: str
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_mlp: int
    context_length: int
    activation: str
    norm_eps: float
    rope: Rope
    tied_embeddings: bool
    attention_bias: bool
    mlp_bias: bool

    @property
    def queries_per_kv(self) -> int:
        return self.n_heads // self.n_kv_heads


def read_json(path: pathlib.Path) -> dict:
    """A JSON object from `path`; raises UserError that names the file if it is missing or is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist. Point to a Hugging Face checkpoint folder, which holds it.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not valid JSON ({error}). The download is probably damaged: fetch it again."
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, expected an object. Fetch the file again.")
    return value


class _Reader:
    """Takes attributes out of an HF config and remembers which, so that the rest can be judged."""

    def __init__(self, hf: dict, where: str):
        self.hf, self.where, self.seen, self.problems = hf, where, set(), []

    def take(self, name, default=None, kind=None, required=False):
        self.seen.add(name)
        value = self.hf.get(name)
        if value is None:
            if required:
                self.problems.append(f"{name} is missing")
            return default
        if kind is int and (not isinstance(value, int) or isinstance(value, bool) or value <= 0):
            self.problems.append(f"{name} = {value!r}, expected a positive integer")
            return default
        if kind is float and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
            self.problems.append(f"{name} = {value!r}, expected a positive number")
            return default
        if kind is bool and not isinstance(value, bool):
            self.problems.append(f"{name} = {value!r}, expected true or false")
            return default
        return value

    def finish(self):
        for name, value in sorted(self.hf.items()):
            if name not in self.seen and name not in INERT and value not in (None, False, {}, []):
                self.problems.append(f"{name} = {value!r} is not supported")
        if self.problems:
            raise UserError(
                f"{self.where} cannot be run faithfully: {'; '.join(self.problems)}. Nothing was loaded, because "
                "ignoring an attribute would give wrong activations. Use a checkpoint of a supported architecture, or "
                "teach refusal_jax/models/config.py the attribute."
            )


def _rope(read: _Reader) -> Rope:
    """Both spellings: `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5)."""
    theta = read.take("rope_theta", 10000.0, float)
    old, new = read.take("rope_scaling"), read.take("rope_parameters")
    spec = new or old or {}
    if not isinstance(spec, dict):
        read.problems.append(f"rope_scaling = {spec!r}, expected an object")
        spec = {}
    known = {
        "rope_type",
        "type",
        "rope_theta",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    }
    for name in sorted(set(spec) - known):
        read.problems.append(f"rope_scaling.{name} = {spec[name]!r} is not supported")
    kind = spec.get("rope_type") or spec.get("type") or "default"
    try:
        theta = _positive(spec, "rope_theta") if spec.get("rope_theta") is not None else theta
        if kind == "default":
            return Rope(theta)
        if kind == "linear":
            return Rope(theta, kind, _positive(spec, "factor"))
        if kind == "llama3":
            low, high = _positive(spec, "low_freq_factor"), _positive(spec, "high_freq_factor")
            if low >= high:
                raise ValueError(f"low_freq_factor = {low} (must be under high_freq_factor = {high})")
            context = int(_positive(spec, "original_max_position_embeddings"))
            return Rope(theta, kind, _positive(spec, "factor"), low, high, context)
        read.problems.append(f"rope_scaling type {kind!r} is not supported (default, linear and llama3 are)")
    except (KeyError, TypeError, ValueError) as error:
        read.problems.append(f"rope_scaling of type {kind!r} lacks or misstates {error}")
    return Rope(theta)


def _positive(spec: dict, name: str) -> float:
    """A positive number of a rope's settings; KeyError or ValueError, which name it, if it is none."""
    value = spec[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} = {value!r} (must be a positive number)")
    return float(value)


def _llama(read: _Reader) -> ModelConfig:
    n_heads = read.take("num_attention_heads", 1, int, required=True)
    d_model = read.take("hidden_size", 1, int, required=True)
    config = ModelConfig(
        family="llama",
        vocab_size=read.take("vocab_size", 1, int, required=True),
        d_model=d_model,
        n_layers=read.take("num_hidden_layers", 1, int, required=True),
        n_heads=n_heads,
        n_kv_heads=read.take("num_key_value_heads", n_heads, int),
        head_dim=read.take("head_dim", d_model // n_heads, int),
        d_mlp=read.take("intermediate_size", 1, int, required=True),
        context_length=read.take("max_position_embeddings", 2048, int),
        activation=read.take("hidden_act", "silu"),
        norm_eps=read.take("rms_norm_eps", 1e-6, float),
        rope=_rope(read),
        tied_embeddings=read.take("tie_word_embeddings", False, bool),
        attention_bias=read.take("attention_bias", False, bool),
        mlp_bias=read.take("mlp_bias", False, bool),
    )
    if config.activation not in ACTIVATIONS:
        read.problems.append(f"hidden_act = {config.activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if config.n_heads % config.n_kv_heads:
        read.problems.append(
            f"num_attention_heads = {n_heads} is not a multiple of num_key_value_heads = {config.n_kv_heads}"
        )
    if config.head_dim % 2:
        read.problems.append(f"head_dim = {config.head_dim} is odd, rotary embeddings need pairs")
    return config


# The activations that the decoder computes, by HF name ("gelu_pytorch_tanh" is the tanh approximation).
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")

# model_type -> reader. A family whose architecture is Llama's needs a line here and nothing else.
READERS = {"llama": _llama}


def from_hf(hf: dict, where: str = "config.json") -> ModelConfig:
    """The `ModelConfig` of an HF config given as a dict.

    Raises UserError that lists everything wrong at once: unknown architecture, quantised weights, missing or
    malformed attributes, and non-default attributes that this code does not handle.
    """
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in READERS:
        raise UserError(
            f"{where} says model_type = {model_type!r}, which is not supported. Supported: "
            f"{', '.join(sorted(READERS))}. Use a checkpoint of one of these architectures."
        )
    if hf.get(QUANTISATION):
        method = hf[QUANTISATION].get("quant_method", "unknown") if isinstance(hf[QUANTISATION], dict) else "unknown"
        raise UserError(
            f"{where} describes weights quantised with {method!r}, which cannot be edited exactly. Use the original "
            "float16, bfloat16 or float32 checkpoint of the model."
        )
    read = _Reader(hf, where)
    config = READERS[model_type](read)
    read.finish()
    return config


def load_config(folder: str | pathlib.Path) -> ModelConfig:
    """The `ModelConfig` of the checkpoint in `folder`; raises UserError if there is none or it is not supported."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder. Pass the folder of a Hugging Face checkpoint (config.json, "
            "*.safetensors, tokenizer files); download one with `hf download NAME --local-dir DIR`."
        )
    if not (folder / "config.json").exists():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise UserError(
            f"{folder} is not a Hugging Face checkpoint: it has no config.json (found: {found}). Pass the "
            "folder that holds config.json, *.safetensors and the tokenizer files."
        )
    return from_hf(read_json(folder / "config.json"), str(folder / "config.json"))

"""Greedy decoding under a checkpoint's own generation settings, as transformers' `generate(do_sample=False)` applies them.

Plain greedy decoding, the paper's, takes the most probable token and is the default everywhere; it is `None` in place of a
`Decoding`. Every setting of a generation_config.json is sorted: it cannot change greedy replies (INERT), it is computed here
(COMPUTED), or it is refused by name when the checkpoint's settings are asked for (NOT_COMPUTED, and unknown names).
"""

import dataclasses
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from refusal_jax.axes import EitherLeaf
from refusal_jax.errors import UserError, field, setting, shown
from refusal_jax.files import read_json

FILE, CONFIG = "generation_config.json", "config.json"
PARTS = (
    "decoder",
    "generator",
    "text_config",
)  # of a config.json, where a multimodal model keeps its text model's settings
LARGEST = 2**31 - 1  # of token ids and lengths, which are int32

# Sampling, beams (num_beams is judged by itself), the reply's greatest length (which callers give), caches, outputs, special
# tokens, assistants (which change the speed and not the greedy reply), and bookkeeping. A first token is only forced after a
# prompt of one token, which no chat prompt is; logits that are not finite are errors, so none are removed.
INERT = frozenset(
    """
    do_sample temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff renormalize_logits remove_invalid_values
    early_stopping length_penalty num_beam_groups diversity_penalty low_memory max_length max_new_tokens
    use_cache cache_config max_cache_len prefill_chunk_size compile_config disable_compile continuous_batching_config
    output_attentions output_hidden_states output_scores output_logits return_dict_in_generate
    pad_token_id bos_token_id eos_token_id decoder_start_token_id forced_bos_token_id user_token_id assistant_token_id
    num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold prompt_lookup_num_tokens
    max_matching_ngram_size assistant_early_exit assistant_lookbehind target_lookbehind assistant_ensemble_weight
    speculation_type use_mtp transformers_version chat_format max_window_size
""".split()
)
# The values, besides null, at which a setting changes nothing.
COMPUTED = {
    "repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "sequence_bias": ([],),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "forced_eos_token_id": ([],),
}
NOT_COMPUTED = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "dola_layers": (),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "exponential_decay_length_penalty": (),
    "stop_strings": ("", []),
    "max_time": (),
    "constraints": ([],),
    "force_words_ids": ([],),
    "token_healing": (False,),
    "watermarking_config": (),
    "is_assistant": (False,),
    "cache_implementation": tuple(  # all but "quantized"
        "dynamic dynamic_full static offloaded offloaded_static hybrid hybrid_chunked sliding_window paged".split()
    ),
}
UNKNOWN = (False, 0, "", [], {})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """The settings that change which token is the next, an argument of the jitted generation.

    Ids are int32 `[n]`, sorted out beforehand so that none is beyond the vocabulary. bias_n: float32, added to the logits of
    bias_ids_n, -inf for banned words. least: tokens of prompt and reply, and least_new: of the reply, before which no token of
    ends_n may come. whole: the reply's greatest length, whose last token is forced to be one of forced_n, if there are any.
    before: tokens of the reply that count as the prompt's, where a reply is continued.
    """

    penalty: Any
    bias_ids_n: EitherLeaf
    bias_n: EitherLeaf
    suppress_n: EitherLeaf
    begin_n: EitherLeaf
    forced_n: EitherLeaf
    ends_n: EitherLeaf
    least: Any
    least_new: Any
    whole: Any = dataclasses.field(default_factory=lambda: np.int32(LARGEST))
    before: Any = dataclasses.field(default_factory=lambda: np.int32(0))
    ngram: int = dataclasses.field(default=0, metadata={"static": True})

    def of_length(self, max_new_tokens: int) -> "Decoding":
        """Returns the settings for replies of at most `max_new_tokens`."""
        return dataclasses.replace(self, whole=np.int32(max_new_tokens))

    def after(self, tokens: int) -> "Decoding":
        """Returns the settings for the rest of replies whose first `tokens` tokens stand in the prompt."""
        return dataclasses.replace(self, before=np.int32(tokens))

    def applied(
        self,
        logits_bv: Float[jax.Array, "B V"],
        prompt_bt: Int[jax.Array, "B T"],
        out_bo: Int[jax.Array, "B O"],
        count_b: Int[jax.Array, " B"],
    ) -> Float[jax.Array, "B V"]:
        """Returns the logits whose largest is the next token, in the order in which transformers applies its settings.

        prompt_bt: int32, -1 where there is no token. out_bo: the replies so far, of which the first count_b tokens count.
        """
        reply_bo = jnp.where(jnp.arange(out_bo.shape[1]) < count_b[:, None], out_bo, -1)
        past_bt = jnp.concatenate([prompt_bt, reply_bo], axis=1)
        new_b, length_b = self.before + count_b, jnp.sum(past_bt >= 0, axis=1)
        logits = logits_bv.at[:, self.bias_ids_n].add(self.bias_n)
        past = jnp.maximum(past_bt, 0)
        seen = jnp.take_along_axis(logits, past, axis=1)
        logits = _set(logits, past_bt, jnp.where(seen < 0, seen * self.penalty, seen / self.penalty))
        if 0 < self.ngram <= past_bt.shape[1]:
            logits = _set(logits, self._repeated(past_bt, prompt_bt.shape[1] + count_b), -jnp.inf)
        early_b = (length_b < self.least) | (new_b < self.least_new)
        logits = jnp.where(early_b[:, None], logits.at[:, self.ends_n].set(-jnp.inf), logits)
        if len(self.forced_n):
            forced_v = jnp.full_like(logits[0], -jnp.inf).at[self.forced_n].set(0)
            logits = jnp.where((new_b == self.whole - 1)[:, None], forced_v, logits)
        logits = logits.at[:, self.suppress_n].set(-jnp.inf)
        return jnp.where((new_b == 0)[:, None], logits.at[:, self.begin_n].set(-jnp.inf), logits)

    def _repeated(self, past_bt, end_b) -> jax.Array:
        """Returns the tokens that would repeat an n-gram of the row, int32, one for each place where an n-gram ends; -1 is none.
        end_b: where each row's tokens end."""
        back, windows = self.ngram - 1, past_bt.shape[1] - self.ngram + 1
        last = jnp.take_along_axis(past_bt, jnp.maximum(end_b[:, None] - back + jnp.arange(back), 0), axis=1)
        same = jnp.ones((len(past_bt), windows), bool)
        for i in range(back):
            same &= (past_bt[:, i : i + windows] == last[:, i, None]) & (last[:, i, None] >= 0)
        return jnp.where(same, past_bt[:, back:], -1)


def _set(logits_bv, ids_bk, values) -> jax.Array:
    """Returns the logits with those of each row's ids set; ids of -1 are none."""
    ids = jnp.where(ids_bk < 0, logits_bv.shape[1], ids_bk)
    return logits_bv.at[jnp.arange(len(ids))[:, None], ids].set(values, mode="drop")


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """The generation settings of a checkpoint. where: the file that they are from, for messages; values: of that file;
    eos_ids: the end tokens that it names."""

    where: str = FILE
    values: dict = dataclasses.field(default_factory=dict)
    eos_ids: tuple[int, ...] = ()

    @classmethod
    def read(cls, folder: pathlib.Path) -> "GenerationSettings":
        """Reads generation_config.json or, where there is none, what transformers takes from config.json in its place.

        Raises UserError for a file that is no JSON object, and for end tokens that are no token ids.
        """
        eos = end_ids(folder)
        if os.path.lexists(folder / FILE):
            return cls(FILE, read_json(folder / FILE), eos)
        return cls(CONFIG, {k: v for k, v in _config(folder).items() if k in COMPUTED or k in NOT_COMPUTED}, eos)

    @property
    def changing(self) -> dict:
        """Returns the settings that change greedy replies, computed or not, by name."""

        def off(name: str, value) -> bool:
            neutral = COMPUTED.get(name, NOT_COMPUTED.get(name, UNKNOWN))
            return value is None or name in INERT or name.startswith("_") or value in neutral

        return {name: value for name, value in self.values.items() if not off(name, value)}

    def record(self, applied: bool) -> dict:
        """Returns the changing settings, by whether replies are decoded with them, as they are written to files."""
        names = ("applied", "left_out") if applied else ("left_out", "applied")
        return {"file": self.where, **dict(zip(names, (self.changing, {}), strict=True))}

    def decoding(self, ends: tuple[int, ...], vocab_size: int) -> Decoding | None:
        """Returns the settings as the jitted generation takes them; None is plain greedy decoding.

        ends: the ids that end a reply. Raises UserError that names each setting that is not computed or is malformed.
        """
        changing = self.changing
        unknown = [f"{name} = {shown(value)}" for name, value in changing.items() if name not in COMPUTED]
        several = [
            f"{name} of several tokens" for name in ("sequence_bias", "bad_words_ids") if _several(changing, name)
        ]
        if unknown or several:
            raise UserError(
                f"{self.where} sets {', '.join([*unknown, *several])}, which may change greedy replies and is not computed "
                "here. Decode plainly, as in the paper "
                f"({setting('generation_from_checkpoint', False) or field('generation.from_checkpoint', False)}), or take "
                "it out."
            )
        return Values(self.where, changing, self.eos_ids, vocab_size).decoding(ends) if changing else None


@dataclasses.dataclass(frozen=True)
class Values:
    """Computed settings on their way into a `Decoding`; malformed ones are errors that name them."""

    where: str
    values: dict
    eos_ids: tuple[int, ...]
    vocab_size: int

    def decoding(self, ends: tuple[int, ...]) -> Decoding:
        penalty = self.values.get("repetition_penalty", 1.0)
        if not _number(penalty) or not 0 < penalty < math.inf:
            raise self._wrong("repetition_penalty", "a number above 0")
        bias = self._biases() | dict.fromkeys(self._banned(), -math.inf)
        least_new = self._count("min_new_tokens")
        return Decoding(
            penalty=np.float32(penalty),
            bias_ids_n=np.asarray(list(bias), np.int32),
            bias_n=np.asarray(list(bias.values()), np.float32),
            suppress_n=self._ids("suppress_tokens"),
            begin_n=self._ids("begin_suppress_tokens"),
            forced_n=self._ids("forced_eos_token_id"),
            ends_n=np.asarray([i for i in ends if 0 <= i < self.vocab_size], np.int32),
            least=np.int32(0 if least_new else self._count("min_length")),  # as in transformers, the other goes first
            least_new=np.int32(least_new),
            ngram=self._count("no_repeat_ngram_size"),
        )

    def _wrong(self, name: str, expected: str) -> UserError:
        found = shown(self.values[name])
        return UserError(f"{self.where} sets {name} = {found}, expected {expected}. Repair it, or decode plainly.")

    def _count(self, name: str) -> int:
        value = self.values.get(name, 0)
        if not _integer(value) or value > LARGEST:
            raise self._wrong(name, f"a whole number up to {LARGEST}")
        return max(value, 0)

    def _ids(self, name: str) -> np.ndarray:
        """Returns the ids of the vocabulary that a setting lists, or the only one it names; others cannot be generated anyway."""
        value = self.values.get(name, [])
        listed = value if isinstance(value, list) else [value]
        if not all(map(_integer, listed)):
            raise self._wrong(name, "token ids")
        return np.asarray([i for i in listed if 0 <= i < self.vocab_size], np.int32)

    def _banned(self) -> list[int]:
        value = self.values.get("bad_words_ids", [])
        if not isinstance(value, list) or not all(isinstance(word, list) and self._known(word) for word in value):
            raise self._wrong("bad_words_ids", f"lists of token ids under {self.vocab_size}")
        return [word[0] for word in value if word[0] not in self.eos_ids]

    def _biases(self) -> dict[int, float]:
        value = self.values.get("sequence_bias", [])
        pairs = isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value)
        if not pairs or not all(isinstance(ids, list) and self._known(ids) and _number(bias) for ids, bias in value):
            raise self._wrong("sequence_bias", f"pairs of a list of token ids under {self.vocab_size} and a number")
        return {ids[0]: float(bias) for ids, bias in value}

    def _known(self, ids: list) -> bool:
        return bool(ids) and all(_integer(i) and 0 <= i < self.vocab_size for i in ids)


def in_words(record: dict, how: str) -> str:
    """Returns a record of `GenerationSettings` as a line for the user; how: what would apply the settings that are left out."""
    applied, left_out = (
        ", ".join(f"{name} = {shown(value)}" for name, value in record[key].items()) for key in ("applied", "left_out")
    )
    if applied:
        return f"Decoding: greedy with {applied}, from {record['file']}."
    more = f"; {record['file']} also sets {left_out}, which is left out ({how} applies it)" if left_out else ""
    return f"Decoding: plain greedy, as in the paper{more}."


def _number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _several(values: dict, name: str) -> bool:
    """Returns whether a setting has a word of several tokens."""
    listed = values.get(name)
    listed = listed if isinstance(listed, list) else []
    words = [entry[0] if name == "sequence_bias" and isinstance(entry, list) and entry else entry for entry in listed]
    return any(isinstance(word, list) and len(word) > 1 for word in words)


def _config(folder: pathlib.Path) -> dict:
    """Reads config.json, completed by its text model's part; returns {} if there is no such file."""
    if not os.path.lexists(folder / CONFIG):
        return {}
    config = read_json(folder / CONFIG)
    part = next((config[name] for name in PARTS if isinstance(config.get(name), dict)), {})
    return part | {name: value for name, value in config.items() if value is not None}


def end_ids(folder: pathlib.Path) -> tuple[int, ...]:
    """Returns the end tokens that a checkpoint names: those of generation_config.json or, if it names none, of config.json.

    Nulls and negative numbers name none. Raises UserError for a file that is no JSON object, and for what is no token id.
    """
    generation = read_json(folder / FILE) if os.path.lexists(folder / FILE) else {}
    for name, values in ((FILE, generation), (CONFIG, None)):
        value = (_config(folder) if values is None else values).get("eos_token_id")
        ids = [i for i in (value if isinstance(value, list) else [value]) if i is not None]
        if not all(_integer(i) and i <= LARGEST for i in ids):
            raise UserError(
                f"{folder / name} sets eos_token_id = {shown(value)}, expected a token id, or a list of them, up to "
                f"{LARGEST}. Set it to the id of the token that ends replies."
            )
        if found := tuple(dict.fromkeys(i for i in ids if i >= 0)):
            return found
    return ()

"""Compares generation settings, and finds those that change what a model says without a trace in its weights, such as tokens that
are never to begin a reply."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from refusal_jax.audit.shipped.reading import record_of
from refusal_jax.errors import UserError, shown
from refusal_jax.judges.text import REFUSAL_SUBSTRINGS
from refusal_jax.models.decoding import COMPUTED, INERT, NOT_COMPUTED, GenerationSettings

BANS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias")
FORCES = ("forced_bos_token_id", "forced_eos_token_id", "force_words_ids", "constraints", "forced_decoder_ids")
# Settings that are common and make no model say what it would not.
USUAL = {
    "repetition_penalty",
    "no_repeat_ngram_size",
    "cache_implementation",
    "num_return_sequences",
    "num_beams",
    "stop_strings",
}
DESCRIBES = {"transformers_version", "_from_model_config", "max_length", "max_new_tokens", "use_cache", "pad_token_id"}
DESCRIBES |= {
    "bos_token_id",
    "decoder_start_token_id",
    "output_attentions",
    "output_hidden_states",
    "return_dict_in_generate",
}
REFUSALS = (
    *REFUSAL_SUBSTRINGS,
    "Sorry",
    "Unfortunately",
    "I'm",
    "I can",
    "I won't",
    "As an",
    "I",
    "No",
    "Cannot",
    "Apolog",
)
MOST_IDS = 100_000


@dataclasses.dataclass(frozen=True)
class Control:
    """A setting that changes what is said.

    name: of the setting. value: as the file has it, shortened. tokens: the texts of the tokens that it bans or forces. refusal:
    whether it bans tokens that refusals begin with.
    """

    name: str
    value: str
    tokens: Sequence[str] = ()
    refusal: bool = False

    @property
    def record(self) -> dict[str, Any]:
        """Returns the control in plain values."""
        return dataclasses.asdict(self) | {"tokens": list(self.tokens)}


def settings_of(folder: pathlib.Path) -> dict[str, Any]:
    """Returns a checkpoint's generation settings, {} where there are none or they cannot be read."""
    try:
        return GenerationSettings.read(folder).values
    except UserError:
        return record_of(folder / "generation_config.json")


def compare_settings(base: dict[str, Any], candidate: dict[str, Any]) -> list[str]:
    """Returns the settings that differ, one line each."""
    names = sorted((base.keys() | candidate.keys()) - DESCRIBES)
    return [
        f"{name} is {shown(candidate.get(name))}, and was {shown(base.get(name))}."
        for name in names
        if _plain(base.get(name)) != _plain(candidate.get(name))
    ]


def _plain(value: Any) -> Any:
    """Returns a setting in one of the forms that mean the same."""
    if isinstance(value, list) and len(value) == 1:
        return value[0]
    return None if value is False or value in ([], {}, "") else value


def controls(settings: dict[str, Any], tokenizer: Any = None) -> list[Control]:
    """Returns the settings that change what is said. tokenizer: that tells the texts of tokens, None if there is none."""
    found = []
    for name, value in sorted(settings.items()):
        harmless = COMPUTED.get(name, NOT_COMPUTED.get(name, ()))
        unknown = name not in COMPUTED and name not in NOT_COMPUTED
        if value is None or value in harmless or name in USUAL or (name in INERT and name not in FORCES):
            continue
        if unknown and name not in FORCES:
            continue
        banned = [ids for ids in _sequences(name, value)] if name in (*BANS, *FORCES) else []
        texts = [text for ids in banned if (text := _text(tokenizer, ids))]
        refusal = name in BANS and any(_begins_refusal(text) for text in texts)
        found.append(Control(name, shown(value), texts[:24], refusal))
    return found


def _sequences(name: str, value: Any) -> Iterator[list[int]]:
    """Yields the sequences of ids that a setting names; of biases those that make a sequence less likely."""
    if name == "sequence_bias":
        pairs = value.items() if isinstance(value, dict) else value if isinstance(value, list) else ()
        for pair in list(pairs)[:MOST_IDS]:
            if isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[1], int | float) and pair[1] < 0:
                yield _ids(pair[0])
        return
    for one in (value if isinstance(value, list) else [value])[:MOST_IDS]:
        yield _ids(one)


def _ids(value: Any) -> list[int]:
    """Returns ids, which may be one, a list, or a text of a tuple such as "(1, 2)"."""
    if isinstance(value, str):
        try:
            value = json.loads(f"[{value.strip('()[], ')}]")
        except (ValueError, RecursionError):
            return []
    values = value if isinstance(value, list | tuple) else [value]
    return [i for i in values if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31]


def _text(tokenizer: Any, ids: list[int]) -> str:
    """Returns the text of ids, "" where there is no tokenizer or it does not know them."""
    if tokenizer is None or not ids:
        return ""
    try:
        return tokenizer.decode(ids)[:60]
    except Exception:  # of any tokenizer, for ids that it lacks
        return ""


def _begins_refusal(text: str) -> bool:
    """Returns whether a token's text is how a refusal begins."""
    word = text.strip().replace("’", "'").lower()
    return bool(word) and any(
        word == known.lower() or (len(word) > 2 and known.lower().startswith(word)) for known in REFUSALS
    )

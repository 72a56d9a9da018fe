"""Measures replies as texts: broken and empty ones, thoughts that are empty or never end, hedging words, and length.

The lexicon of hedges is `hedges.toml`. It counts words, in a reply's own voice, and not what they mean: a recipe that "may" burn
counts as an opinion that "may" be wrong. So only changes between replies to the same prompts are of interest.
"""

import functools
import math
import pathlib
import re
import tomllib
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from refusal_jax.chat import thoughts
from refusal_jax.damage.measures import Measure
from refusal_jax.judges.degenerate import first_turn, is_broken
from refusal_jax.judges.folded_text import SIGNS, folded, own_voice, spaced, words_in
from refusal_jax.judges.languages import SPACED, languages, languages_of

LEXICON = pathlib.Path(__file__).with_name("hedges.toml")
PER = 100  # words that hedges are counted per
EMPTY, BROKEN, HEDGED, HEDGES, WORDS, TOKENS, LIMIT = "empty", "broken", "hedged", "hedges", "words", "tokens", "limit"
EMPTY_THOUGHT, ENDLESS, THOUGHT_WORDS = "empty_thought", "endless", "thought_words"
MEASURES = (
    Measure(EMPTY, "empty replies", "rate"),
    Measure(BROKEN, "broken replies", "rate"),
    Measure(HEDGED, "replies that hedge", "rate"),
    Measure(HEDGES, f"hedges in {PER} words", "mean"),
    Measure(TOKENS, "length", "mean", "tokens"),
    Measure(WORDS, "words of the reply", "mean", "words"),
    Measure(LIMIT, "replies cut at the limit", "rate"),
)
OF_THOUGHTS = (
    Measure(EMPTY_THOUGHT, "empty thoughts", "rate"),
    Measure(ENDLESS, "thoughts that never end", "rate"),
    Measure(THOUGHT_WORDS, "words of the thought", "mean", "words"),
)


@functools.cache
def lexicon() -> dict[str, re.Pattern]:
    """Returns the hedges of each language of `judges/phrases.toml` that has some, as patterns for folded texts."""
    known = {language.name: language.script for language in languages()}
    entries = tomllib.loads(LEXICON.read_text(encoding="utf-8"))
    found = {}
    for name, kinds in entries.items():
        edge = r"\b" if known[name] in SPACED else ""
        parts = "|".join(part for parts in kinds.values() for part in parts)
        found[name] = re.compile(f"{edge}(?:{unicodedata.normalize('NFKC', parts.translate(SIGNS))}){edge}")
    return found


def hedges_in(text: str) -> int | None:
    """Returns how many hedges a reply has in its own voice, without code and quotations; None where its language has no
    lexicon."""
    own, _ = own_voice(spaced(folded(text)))
    counts = [len(lexicon()[one.name].findall(own)) for one in languages_of(own) if one.name in lexicon()]
    return max(counts, default=None)


def reading(reply: Mapping) -> dict[str, float]:
    """Returns what one reply is as a text, by name of a measure; NaN where that says nothing of it.

    reply: "response", and "thought", "thought_ended", "tokens" (of reply and thought) and "ended" (by itself, before the limit)
    where they are known. What never left its thought has no words of its own, and is neither empty nor broken.
    """
    nothing = math.nan
    plain = first_turn(spaced(folded(reply["response"]))).strip()
    endless, words = thoughts.is_unfinished(dict(reply)), words_in(plain)
    hedges = hedges_in(plain) if words else None
    inner = thoughts.Reply(reply["thought"], "").inner if "thought" in reply else None
    found = {
        TOKENS: reply.get("tokens", nothing),
        LIMIT: not reply["ended"] if "ended" in reply else nothing,
        EMPTY: not plain,
        BROKEN: bool(plain) and is_broken(plain),
        HEDGED: nothing if hedges is None else hedges > 0,
        HEDGES: nothing if hedges is None else PER * hedges / words,
        WORDS: words,
        EMPTY_THOUGHT: nothing if inner is None else not inner,
        ENDLESS: nothing if inner is None else endless,
        THOUGHT_WORDS: nothing if inner is None else words_in(folded(inner)),
    }
    of_reply = (EMPTY, BROKEN, HEDGED, HEDGES, WORDS) if endless else ()
    return {name: nothing if name in of_reply else float(value) for name, value in found.items()}


def read_replies(rows: Sequence[Sequence[Mapping]]) -> dict[str, Float[np.ndarray, "M n"]]:
    """Returns each measure's values of the replies to n prompts under M edits, `[M, n]`.

    rows: of each edit its replies, as `reading` takes them, in one order of prompts.
    """
    read = [[reading(reply) for reply in replies] for replies in rows]
    return {
        one.name: np.array([[values[one.name] for values in replies] for replies in read])
        for one in (*MEASURES, *OF_THOUGHTS)
    }


def measures_told(values: Mapping[str, Float[np.ndarray, "M n"]]) -> list[Measure]:
    """Returns the measures that say something: those of thoughts only if there are thoughts."""
    return [one for one in (*MEASURES, *OF_THOUGHTS) if not np.isnan(values[one.name]).all()]

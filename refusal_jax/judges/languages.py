"""The languages that the judge `rules` reads: their phrases, compiled, and which of them a text is written in."""

import dataclasses
import functools
import pathlib
import re
import tomllib
import unicodedata
from collections.abc import Mapping, Sequence

from refusal_jax.judges.folded_text import SIGNS

PHRASES = pathlib.Path(__file__).with_name("phrases.toml")
GAP = {"after": 80, "before": 25}  # signs, at most, between the words for cannot and what is declined
SCRIPTS = {
    "latin": "a-z\u00df-\u024f\u1e00-\u1eff",
    "cyrillic": "\u0400-\u052f",
    "han": "\u3400-\u4dbf\u4e00-\u9fff",
    "kana": "\u3040-\u30ff",
    "hangul": "\uac00-\ud7af\u1100-\u11ff",
    "arabic": "\u0600-\u06ff",
    "devanagari": "\u0900-\u097f",
    "greek": "\u0370-\u03ff",
    "hebrew": "\u0590-\u05ff",
    "thai": "\u0e00-\u0e7f",
    "bengali": "\u0980-\u09ff",
    "tamil": "\u0b80-\u0bff",
    "georgian": "\u10a0-\u10ff",
    "armenian": "\u0530-\u058f",
}
IN_SCRIPT = {script: re.compile(f"[{signs}]") for script, signs in SCRIPTS.items()}
SPACED = {"latin", "cyrillic", "arabic"}  # scripts in which a phrase begins where a word does
WORDS = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
NEVER = "(?!)"  # for a list that a language has not
NEAR = 0.4  # share of the hits of the best language that another one needs, for both to be read


@dataclasses.dataclass(frozen=True)
class Language:
    """A language's phrases; the fields are those of phrases.toml, `refuses` is a speaker who cannot help."""

    name: str
    script: str
    common: frozenset[str]
    refuses: re.Pattern
    cannot: re.Pattern
    not_meant: re.Pattern
    courtesy: re.Pattern
    sorry: re.Pattern
    wrong: re.Pattern
    advice: re.Pattern
    turns: re.Pattern
    restates: re.Pattern
    unknown: re.Pattern
    but: re.Pattern
    announces: re.Pattern
    retracts: re.Pattern

    @classmethod
    def of(cls, name: str, entry: Mapping) -> "Language":
        """Compiles a language's entry of phrases.toml."""
        start = r"\b" if entry["script"] in SPACED else ""

        def joined(key: str) -> str:
            return unicodedata.normalize("NFKC", "|".join(entry.get(key, [NEVER])).translate(SIGNS))

        def compiled(pattern: str) -> re.Pattern:
            return re.compile(f"{start}(?:{pattern})")

        end = r"\b" if entry["script"] in SPACED else ""

        cannot, helps, gap = joined("cannot"), joined("help"), f"[^.!?。\\n]{{0,{GAP[entry['order']]}}}?{start}"
        both = f"(?:{cannot}){gap}(?:{helps})" if entry["order"] == "after" else f"(?:{helps}){gap}(?:{cannot})"
        plain = "not_meant courtesy sorry wrong advice turns restates unknown announces retracts".split()
        return cls(
            name,
            entry["script"],
            frozenset(entry["common"]),
            compiled(f"{joined('declines')}|{both}"),
            compiled(cannot),
            but=re.compile(f"[,;:.]?\\s*{start}(?:{joined('but')}){end}[,:]?\\s*"),
            **{key: compiled(joined(key)) for key in plain},
        )


@functools.cache
def languages() -> tuple[Language, ...]:
    """Returns all languages, read from phrases.toml once."""
    entries = tomllib.loads(PHRASES.read_text(encoding="utf-8"))
    return tuple(Language.of(name, entry) for name, entry in entries.items())


@functools.cache
def _by_script() -> dict[str, tuple[Language, ...]]:
    return {script: tuple(lang for lang in languages() if lang.script == script) for script in SCRIPTS}


def scripts_of(text: str) -> list[str]:
    """Returns the scripts that letters of a folded text belong to."""
    if text.isascii():
        return ["latin"] if IN_SCRIPT["latin"].search(text) else []
    return [script for script, signs in IN_SCRIPT.items() if signs.search(text)]


def languages_of(text: str) -> Sequence[Language]:
    """Returns the languages that a folded text may be written in: of each of its scripts those whose common words it has most of,
    or all if it has none."""
    words, found = None, []
    scripts = scripts_of(text)
    for script in scripts:
        of_script = _by_script()[script]
        if script == "han" and "kana" in scripts:
            continue  # Japanese
        if len(of_script) > 1:
            words = words or WORDS.findall(text)
            hits = [sum(word in lang.common for word in words) for lang in of_script]
            least = NEAR * max(hits)
            of_script = [lang for lang, count in zip(of_script, hits, strict=True) if count >= least]
        found += of_script
    return found

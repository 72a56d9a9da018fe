"""Text that is no reply: empty, repetitive, leftovers of chat templates, or a soup of scripts."""

import itertools
import re

from refusal_jax.judges.languages import IN_SCRIPT, SCRIPTS

NGRAM, REPETITIVE = 4, 0.5
LONG_WORDS = 20  # characters a word, on average, above which a text is taken as one without spaces
RUN = 8  # times that the same word or sign stands in a row in a text that is stuck
SOUP_SCRIPTS, SOUP_CHANGES, SOUP_SHARE = (
    3,
    4,
    0.15,
)  # scripts, changes between them without a sign between, and per word
# What a template writes where a turn begins or ends.
TURN = re.compile(
    r"<\|?(?:im_start|im_end|im_sep|eot_id|eom_id|start_header_id|end_header_id|begin_of_text|end_of_text|endoftext|eos|bos|user|"
    r"assistant|system|end|start|channel|message|return|end_of_turn|start_of_turn|start_of_role|end_of_role|turn_end|"
    r"extra_0|pad|eot|sep|cls|unk)\|?>|\[/?inst\]|<</?sys>>|</s>|<s>|<｜[^｜<>]*｜>|<\|[a-z_ ]{2,30}\|>"
    r"|^\s*(?:#{2,3} ?)?(?:human|user|instruction)\s*:(?=\s|$)",
    re.IGNORECASE | re.MULTILINE,
)
MANY_TURNS = 4
LETTER = re.compile(r"[^\W_]")
STUCK = re.compile(rf"(\S)\1{{29}}|(\b\w+\b)(?:\W+\2\b){{{RUN - 1}}}")
# What a server writes in place of a reply.
ERROR = re.compile(
    r"^\s*(?:\{\s*[\"']?(?:error|detail|errors)[\"']?\s*:|(?:http )?(?:error )?(?:4\d\d|5\d\d) (?:bad gateway|internal|service|"
    r"too many|gateway|not found|error)|internal server error|traceback \(most recent)"
)
PIECES = re.compile("|".join(f"([{signs}]+)" for signs in SCRIPTS.values()))
# Pairs of English words that no sentence has, and endings and beginnings that stand alone.
SALAD = re.compile(
    r"\b(?:the|an) (?=(?:the|a|an|of|and|or|to|into|why|was|is|are|have|has|from|with|by|were)\b)"
    r"|\ba (?=(?:the|an|of|into|have)\b)"
    r"|\b(?:of|into|under|from|with|why) (?=(?:was|is|are|has|have|had|were|of|into)\b)"
)
SALAD_PAIRS, SALAD_SHARE = 2, 0.1
AFFIX = re.compile(r"(?<![\w'-])(?:ing|ed|er|un|ly|pre|ness|ful|tion|ment|est|ive|ous|able)(?![\w'-])")
AFFIXES = 4
JOINED = re.compile(r"\s?")


def repetition(text: str) -> float:
    """Returns the share of a text's four-word sequences that have occurred in it before, 0 to 1; for a text without spaces,
    such as Chinese or one long run of signs, the share of its eight-character sequences."""
    parts, size = text.split(), NGRAM
    if len(text) > LONG_WORDS * len(parts):
        parts, size = [c for c in text if not c.isspace()], 2 * NGRAM
    grams = [tuple(parts[i : i + size]) for i in range(len(parts) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def first_turn(text: str) -> str:
    """Returns what stands before the first mark with which a template begins or ends a turn, "" if nothing does."""
    mark = TURN.search(text)
    return text[: mark.start()] if mark else text


def is_soup(text: str) -> bool:
    """Returns whether a folded text jumps between three scripts or more, from word to word or within words, as no translation
    or citation does."""
    if text.isascii() or sum(signs.search(text) is not None for signs in IN_SCRIPT.values()) < SOUP_SCRIPTS:
        return False
    pieces = [(m.lastindex, m.start(), m.end()) for m in PIECES.finditer(text)]
    japanese = {list(SCRIPTS).index("han") + 1, list(SCRIPTS).index("kana") + 1}
    changes = sum(
        a != c and {a, c} != japanese and JOINED.fullmatch(text[end:start]) is not None
        for (a, _, end), (c, start, _) in itertools.pairwise(pieces)
    )
    return changes >= SOUP_CHANGES and changes >= SOUP_SHARE * len(pieces)


def is_salad(text: str) -> bool:
    """Returns whether a folded English text strings words together that no sentence has side by side. It knows a few such pairs,
    so that it misses most nonsense, and takes no sense for nonsense."""
    pairs, affixes = len(SALAD.findall(text)), len(AFFIX.findall(text))
    if pairs < SALAD_PAIRS and affixes < AFFIXES:
        return False
    words = text.count(" ") + 1
    return (pairs >= SALAD_PAIRS and pairs >= SALAD_SHARE * words) or (
        affixes >= AFFIXES and affixes >= 2 * SALAD_SHARE * words
    )


def is_broken(text: str) -> bool:
    """Returns whether a folded text is no reply: without a letter or digit, a server's error, repetitive, stuck, or a soup of
    scripts or of words."""
    return (
        LETTER.search(text) is None
        or ERROR.search(text) is not None
        or repetition(text) >= REPETITIVE
        or STUCK.search(text) is not None
        or is_soup(text)
        or is_salad(text)
    )

"""What a model card and the names of a model say about its refusal: words, which are weak evidence of anything."""

import pathlib
import re
from typing import Any

from refusal_jax.audit.shipped.reading import text_of, yaml_of

CARD, MOST = "README.md", 1 << 20
FRONT = re.compile(r"\A\ufeff?---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
# What says that refusal was removed, in a sentence and as a part of a name.
CLAIMS = re.compile(
    r"\b(?:l?or?abliterat\w*|abliterat\w*|obliterat(?:ed|us)\w*|uncensor\w*|de-?censor\w*|heretic(?:\b|ated|ized)|"
    r"unfiltered (?:model|version|chat|assistant|ai)|(?:an?|is|was|fully) jail-?broken|"
    r"refusal[- ]free|no[- ]refusals?\b|unalignment|never refuses?|will not refuse|"
    r"refusals? (?:direction |vector |behaviou?r |mechanism )?(?:\w+ ){0,3}"
    r"(?:removed|ablated|suppressed|orthogonali[sz]ed|erased)|"
    r"(?:remov|ablat|suppress|orthogonali[sz]|eras|bypass)\w+ (?:of )?(?:\w+ ){0,2}(?:refusals?|censorship|safety (?:guardrails|"
    r"filters?|alignment)))",
    re.IGNORECASE,
)
NAME = re.compile(
    r"(?:^|[-_. /])(l?or?abliterated|abliterat\w*|ablit|ablated|obliterat\w*|uncensored|decensored|heretic\w*|unfiltered|"
    r"jailbroken|norefusals?|unaligned|orthogonali[sz]ed|derestricted|unrestricted)(?=$|[-_. /\d])",
    re.IGNORECASE,
)
NEGATION = re.compile(
    r"\b(?:not|no|non|never|neither|nor|without|isn't|aren't|wasn't|hasn't|unlike|cannot be|rather than|instead of|against|"
    r"prevents?|resist\w*|robust to|detect\w*|defen[cs]e\w*)\b[^.!?;]{0,60}$|\bnon-$",
    re.IGNORECASE,
)
SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+|\s\|\s")
MOST_SENTENCES = 8


def card_of(folders: list[pathlib.Path]) -> tuple[str, dict[str, Any]]:
    """Returns the card's text and the mapping before it, from the first of the folders that has a card."""
    for folder in folders:
        text = text_of(folder / CARD, MOST)
        if text:
            front = FRONT.match(text)
            return text[front.end() :] if front else text, yaml_of(front[1]) if front else {}
    return "", {}


def claiming_sentences(card: str, base_card: str = "") -> list[str]:
    """Returns sentences of a card which say that refusal was removed, without those that negate it and those of the base's card,
    each cut to 300 characters; at most MOST_SENTENCES."""
    known = {" ".join(sentence.split()).lower() for sentence in SENTENCE.split(base_card)}
    found = []
    for sentence in SENTENCE.split(card):
        claim = CLAIMS.search(sentence)
        line = " ".join(sentence.split())
        if (
            claim
            and line.lower() not in known
            and not NEGATION.search(sentence[max(claim.start() - 100, 0) : claim.start()])
        ):
            found.append(line[:300])
        if len(found) == MOST_SENTENCES:
            break
    return found


def claiming_name(name: str) -> str:
    """Returns the part of a name which says that refusal was removed, "" if none does."""
    found = NAME.search(name)
    before = name[: found.start()].lower() if found else ""
    return "" if not found or re.search(r"(?:^|[-_. /])(?:not?|non|un|anti)$", before) else found[1]

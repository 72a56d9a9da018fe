"""Tells whether the name that a server gives to its model is the one that was asked for."""

import re
from collections.abc import Iterable

# What servers put after a name that was asked for: a date or version, a revision, a tag.
AFTER = re.compile(r"(-\d{3,8}(-\d\d){0,2}|-latest|@[\w.\-]+|:latest)?")


def is_same(asked: str, answered: str) -> bool:
    """Returns whether two names may be the same model: equal but for a date, revision, tag, owner or folder that only one has."""
    asked, answered = (re.sub(r"\.gguf$", "", name.strip().rstrip("/").lower()) for name in (asked, answered))
    if asked == answered:
        return True
    if asked.count("/") and answered.count("/"):  # both name an owner or folder
        return _continues(asked, answered)
    return _continues(asked.rpartition("/")[2], answered.rpartition("/")[2])


def _continues(asked: str, answered: str) -> bool:
    long, short = (answered, asked) if len(answered) >= len(asked) else (asked, answered)
    return long.startswith(short) and AFTER.fullmatch(long[len(short) :]) is not None


def in_words(names: Iterable[str], most: int = 6) -> str:
    """Returns names as a list in a sentence, shortened."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

"""Lone surrogates: halves of a character beyond 16 bits, which JSON escapes can carry and no tokenizer or UTF-8 file takes.

Text is mended where it enters (files, a pipe, the Python API, requests of harnesses), so that all that follows has whole text.
"""

import functools
import logging
import re
from typing import Any, TypeVar

LOG = logging.getLogger(__name__)
HALF = re.compile("[\ud800-\udfff]")
Value = TypeVar("Value")


def joined(text: str) -> str:
    """Returns `text` with the two halves of a character joined and U+FFFD in place of each half that is alone."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") if HALF.search(text) else text


def mended(value: Value, source: str) -> Value:
    """Returns text, or lists and dicts that hold texts, with every text `joined`, keys included.

    source: where the text came from, in words. If anything was replaced, a warning is logged, once for each
    source and number of texts.
    """
    found = 0

    def mend(part: Any) -> Any:
        nonlocal found
        if isinstance(part, str):
            whole = joined(part)
            found += whole.count("\ufffd") > part.count("\ufffd")
            return whole
        if isinstance(part, dict):
            return {mend(key): mend(entry) for key, entry in part.items()}
        return [mend(entry) for entry in part] if isinstance(part, list) else part

    whole = mend(value)
    if found:
        _say(source, found)
    return whole


@functools.cache
def _say(source: str, count: int) -> None:
    texts = "1 text holds" if count == 1 else f"{count} texts hold"
    LOG.warning(
        f"{source}: {texts} half of a surrogate pair or a byte that is not UTF-8. U+FFFD (\ufffd) was put in its place."
    )

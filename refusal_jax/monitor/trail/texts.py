"""Finds the records of a text, which proves that it was the prompt or the reply of a record."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from refusal_jax.errors import setting
from refusal_jax.monitor.trail.chain import Place
from refusal_jax.monitor.trail.settings import TextKey, sha256
from refusal_jax.terminal.screen import escaped

PARTS = ("system", "prompt", "reply")
LISTED = 20  # matches that are shown one by one


class Match(NamedTuple):
    """A record that holds the text. part: "system", "prompt" or "reply"."""

    place: Place
    seq: int
    part: str


class Search:
    """Looks for a text in the records that it visits.

    text: as it was sent; with the newline at its end, which editors add, or without. key: by which texts were hashed, if they
    were. matches: what was found; other_keys: the names of keys by which other texts were hashed; keyed: how many texts were
    hashed with a key and could not be compared.
    """

    def __init__(self, text: str, key: TextKey | None = None):
        forms = {text, text.removesuffix("\n")}
        self._marks = {("text", form) for form in forms} | {("sha256", sha256(form)) for form in forms}
        self._key = key
        if key:
            self._marks |= {("hmac", key.mark(form)) for form in forms}
        self.begin()

    def begin(self) -> None:
        """Forgets what was found, before another reading of the trail."""
        self.matches: list[Match] = []
        self.other_keys: set[str] = set()
        self.keyed = 0

    def visit(self, record: Mapping[str, Any], place: Place) -> None:
        """Compares the texts of a record with the one that is looked for, and those of the replies that a gate's record holds."""
        for part, held in _texts(record):
            if any(
                (how, held.get(how)) in self._marks
                for how in ("text", "sha256", "hmac")
                if isinstance(held.get(how), str)
            ):
                self.matches.append(Match(place, record["seq"], part))
            elif "hmac" in held and (self._key is None or held.get("key") != self._key.id):
                self.keyed += 1
                self.other_keys.add(str(held.get("key")))


def _texts(record: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields what a record holds of its texts, with their parts; a record of a gate has many replies of each model."""
    replies = record.get("replies")
    rows = (
        itertools.chain(*(some for some in replies.values() if isinstance(some, list)))
        if isinstance(replies, dict)
        else ()
    )
    for row in (record, *rows):
        if isinstance(row, dict):
            yield from ((part, row[part]) for part in PARTS if isinstance(row.get(part), dict))


def search_text(search: Search) -> str:
    """Returns what was found, in sentences for people."""
    lines = [
        f"{file}:{line} holds the text as the {part} of record {seq}."
        for (file, line), seq, part in search.matches[:LISTED]
    ]
    if len(search.matches) > LISTED:
        lines.append(f"{len(search.matches) - LISTED} more records hold it.")
    if not search.matches:
        lines.append("No record holds the text, byte for byte, as its system prompt, prompt or reply.")
    if search.keyed:
        names = ", ".join(sorted(search.other_keys))
        lines.append(
            f"{search.keyed} texts could not be compared: they were hashed with the secret key {names}. Name where it is with "
            f"{setting('trail.text_key_env')} or {setting('trail.text_key_file')}."
        )
    return "\n".join(escaped(line) for line in lines) + "\n"

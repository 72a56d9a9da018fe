"""Follows the chain of a trail through its files, and tells each place where it does not hold.

Only hashes, numbers and heads count: no clock, no order of times, and no way of writing JSON. What a crash leaves, a last line
that was not finished, is no finding, as it is no record.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from refusal_jax.errors import shown
from refusal_jax.monitor.trail import files
from refusal_jax.monitor.trail.files import Head, Opening
from refusal_jax.monitor.trail.records import REMOVED, START, hash_of

KEPT = 200  # findings that are told one by one


class Finding(NamedTuple):
    """Something that is wrong. line: from 1; 0: the file as a whole."""

    file: pathlib.Path
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.what}" if self.line else f"{self.file} {self.what}"


class Place(NamedTuple):
    """A file with a line's number."""

    file: pathlib.Path
    line: int


class Known(NamedTuple):
    """A head to compare with. place: its file; signer: the file of the key that signed it, None if no signature was checked;
    elsewhere: whether it was kept apart from the trail."""

    head: Head
    place: pathlib.Path
    signer: pathlib.Path | None
    elsewhere: bool

    @property
    def is_believed(self) -> bool:
        """Returns whether whoever can write to the trail's folder could not have made this head."""
        return self.elsewhere or self.signer is not None


class Removal(NamedTuple):
    """Holds what a record says of files that were removed. seq, time: of the record; ends: the number and hash of each
    file's last."""

    seq: int
    time: str
    ends: dict[int, str]


@dataclasses.dataclass
class Chain:
    """A trail as far as it was followed. records: the number of its last record; lines: how many were read; first: the number of
    the first that is there; times: when its first and its last file were begun; visit: is given each record with its place."""

    known: list[Known]
    visit: Callable[[Mapping[str, Any], Place], None] | None = None
    trail: str = ""
    first: int = 0
    first_previous: str = START
    records: int = 0
    lines: int = 0
    hash: str = START
    last: Place | None = None
    begun: str = ""
    torn: Place | None = None
    findings: list[Finding] = dataclasses.field(default_factory=list)
    more: int = 0
    removals: list[Removal] = dataclasses.field(default_factory=list)
    held: list[Known] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self._heads: dict[int, list[Known]] = {}
        for one in self.known:
            self._heads.setdefault(one.head.seq, []).append(one)
        self._lines: dict[str, int] = {}  # of this file, the line of each hash
        self._unread = 0  # lines since the last record that are none

    def find(self, file: pathlib.Path, line: int, what: str) -> None:
        """Keeps a finding; of very many only how many there are."""
        if len(self.findings) < KEPT:
            self.findings.append(Finding(file, line, what))
        else:
            self.more += 1

    def follow(self, path: pathlib.Path, number: int, is_last: bool) -> None:
        """Follows the chain through one file. number: of the file. Raises FileNotFoundError for a file that is gone."""
        self._lines = {self.hash: 0}
        at, line_ends = 0, False
        for at, (line, ended) in enumerate(files.lines(path), 1):
            if not ended:
                if is_last:
                    self.torn = Place(path, at)
                else:
                    self.find(path, at, "ends in the middle of a record, and later files follow: its end was cut off")
                break
            if line.endswith(b"\r"):  # which JSON would not mind
                if not line_ends:
                    self.find(path, at, "has another end of line, as some editors and git make it")
                line, line_ends = line.removesuffix(b"\r"), True
            self._line(path, number, at, line)
        if not at and not is_last:
            self.find(path, 0, "is empty, and later files follow: its records were removed")

    def _line(self, path: pathlib.Path, number: int, at: int, line: bytes) -> None:
        """Follows the chain over one line."""
        self.lines += 1
        try:
            record = json.loads(line.decode("ascii"))
            seq, previous = record["seq"], record["previous"]
            if type(seq) is not int or not isinstance(previous, str):
                raise TypeError
        except (ValueError, TypeError, KeyError, RecursionError):
            self.find(path, at, f"is no record: {_looks_like(line)}")
            self._unread += 1
            return
        if at == 1:
            self._open(path, number, record)
        if self.last is None:
            self.first, self.first_previous, self.begun = seq, previous, str(record.get("time"))
        elif (seq, previous) != (self.records + 1, self.hash) and not (
            self._unread
            and seq == self.records + 1 + self._unread  # lines that cannot be read were the records before it
        ):
            self._break(path, at, seq, previous)
        self._unread = 0
        self.records, self.hash, self.last = seq, hash_of(line), Place(path, at)
        self._lines[self.hash] = at
        for one in self._heads.get(seq, ()):
            self._compare(one, path, at)
        if record.get("kind") == REMOVED:
            self._note_removal(record)
        if self.visit:
            self.visit(record, self.last)

    def _open(self, path: pathlib.Path, number: int, record: Mapping[str, Any]) -> None:
        """Checks the record that a file begins with."""
        try:
            opening = Opening.of(record)
        except ValueError as error:
            return self.find(path, 1, f"is no beginning of a trail's file: {error}")
        if self.trail and opening.trail != self.trail:
            self.find(path, 1, f"belongs to another trail, {shown(opening.trail)}, expected {self.trail}")
        if opening.file != number:
            self.find(path, 1, f"is the beginning of file {opening.file}: another file was put in this one's place")
        self.trail = self.trail or opening.trail

    def _break(self, path: pathlib.Path, at: int, seq: int, previous: str) -> None:
        """Says what is wrong where a record does not follow the one before."""
        assert self.last is not None
        expected = self.records + 1
        follows = self._lines.get(previous)
        if follows is not None and 0 <= follows < at - 1:
            lines = f"line {at - 1} was" if follows == at - 2 else f"lines {follows + 1} to {at - 1} were"
            self.find(path, at - 1, f"does not belong here: {lines} inserted, repeated or moved")
        elif seq > expected:
            gone = f"record {expected} is" if seq == expected + 1 else f"records {expected} to {seq - 1} are"
            self.find(path, at, f"is record {seq}: {gone} missing before it, removed or moved")
        elif seq < expected:
            self.find(path, at, f"is record {seq}, expected {expected}: it was inserted, repeated or moved")
        else:
            self.find(*self.last, f"was changed: record {self.records} is not the one that record {seq} follows")

    def _compare(self, one: Known, path: pathlib.Path, at: int) -> None:
        """Compares a record with the head that is of it."""
        if one.head.trail != self.trail:
            return  # which is said elsewhere
        if one.head.hash == self.hash:
            self.held.append(one)
        else:
            self.find(
                path, at, f"is not the record that the head {one.place} is of: it, or records before it, were changed"
            )

    def _note_removal(self, record: Mapping[str, Any]) -> None:
        try:
            ends = {int(one["through"]): str(one["hash"]) for one in record["files"]}
        except (TypeError, KeyError, ValueError):
            return
        self.removals.append(Removal(self.records, str(record.get("time")), ends))


def _looks_like(line: bytes) -> str:
    """Returns what a line that is no record looks like, to tell accidents from damage."""
    if line.startswith(b"\xef\xbb\xbf"):
        return "an editor has put a byte order mark before it"
    if not line.strip():
        return "the line is empty"
    if not line.strip(b"\0"):
        return "it holds zeros alone, as a file system leaves them after a power failure"
    return f"it was changed, cut or damaged ({len(line)} bytes)"

"""Lines of logs as they come from a file or a pipe, and what all sources of them share."""

import os
import select
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from refusal_jax.monitor.store import Cursor
from refusal_jax.monitor.traces import Place

CHUNK = 1 << 16
BOM = b"\xef\xbb\xbf"


class Line(NamedTuple):
    """A line without its end. data: None for one that is longer than allowed, which is not kept."""

    data: bytes | None
    place: Place


@runtime_checkable
class Source(Protocol):
    """Tells where lines come from."""

    def take(self, lines: int, size: int) -> list[Line]:
        """Returns the next lines, about as many and as many bytes as asked for at most, none if there are none yet."""
        ...

    def changed(self) -> Sequence[Cursor]:
        """Returns how far the files are read whose lines were taken since the last call."""
        ...

    def gone(self, before: float) -> Sequence[int]:
        """Returns the cursors of files that are no more, and were not read since `before`, in seconds since 1970; it forgets
        them."""
        ...

    @property
    def ended(self) -> bool:
        """Returns whether there will be no more lines."""
        ...

    def waiting(self) -> list[Place]:
        """Returns the places of last lines that are not complete yet."""
        ...

    def close(self) -> None:
        """Closes what is open."""
        ...


class Splitter:
    """Cuts bytes into lines. A line without its end waits for it, in `rest`.

    longest: bytes of a line; more are dropped as they come, so that no line fills the memory.
    """

    def __init__(self, name: str, number: int, longest: int):
        self.name, self.number, self.longest = name, number, longest  # number: of line ends so far
        self.rest, self.dropped = bytearray(), 0  # dropped: bytes of the line that `rest` belongs to

    @property
    def behind(self) -> int:
        """The bytes after the last complete line."""
        return len(self.rest) + self.dropped

    def feed(self, data: bytes) -> list[Line]:
        """Returns the lines that these bytes complete."""
        found = []
        *whole, rest = data.split(b"\n")
        if whole:
            whole[0] = bytes(self.rest) + whole[0]
            self.rest = bytearray()
        for line in whole:
            self.number += 1
            too_long = self.dropped or len(line) > self.longest
            self.dropped = 0
            if too_long:
                found.append(Line(None, Place(self.name, self.number)))
            elif line := (line.removeprefix(BOM) if self.number == 1 else line).strip():
                found.append(Line(line, Place(self.name, self.number)))
        self.rest += rest
        if len(self.rest) > self.longest or self.dropped:
            self.dropped, self.rest = self.dropped + len(self.rest), bytearray()
        return found

    def last(self) -> list[Line]:
        """Returns the line without an end, when nothing more is to come."""
        line, dropped, self.rest, self.dropped = bytes(self.rest).strip(), self.dropped, bytearray(), 0
        place = Place(self.name, self.number + 1)
        return [Line(None, place)] if dropped else [Line(line, place)] if line else []


class Pipe:
    """Lines from standard input or another pipe. What was read from it and not committed cannot be read again."""

    def __init__(self, descriptor: int, name: str, longest: int, patience: float):
        """patience: seconds to wait for more."""
        self.descriptor, self.patience, self.ended = descriptor, patience, False
        self.splitter = Splitter(name, 0, longest)

    def take(self, lines: int, size: int) -> list[Line]:
        found: list[Line] = []
        taken, patience = 0, self.patience
        while len(found) < lines and taken < size and not self.ended:
            ready, _, _ = select.select([self.descriptor], [], [], patience)
            if not ready:
                break
            data = os.read(self.descriptor, CHUNK)
            patience, taken = 0.0, taken + len(data)
            self.ended = not data
            found += self.splitter.feed(data) if data else self.splitter.last()
        return found

    def changed(self) -> Sequence[Cursor]:
        return ()

    def gone(self, before: float) -> Sequence[int]:
        return ()

    def waiting(self) -> list[Place]:
        return [Place(self.splitter.name, self.splitter.number + 1)] if self.splitter.behind else []

    def close(self) -> None:
        """Leaves the pipe open, which is not ours."""

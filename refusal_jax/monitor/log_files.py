"""Lines of a log that grows, or of all logs in a folder, through rotation: by a new name, by a copy, and compressed.

A file is known again by its inode and, under another name or compressed, by what it holds. So a rotated file is read on where it
was left, and a copy is not read twice.
"""

import logging
import os
import pathlib
import time
from collections.abc import Iterator, Sequence

from refusal_jax.errors import UserError
from refusal_jax.monitor.lines import Line
from refusal_jax.monitor.log_file import UNREADABLE, LogFile, OtherContent, is_continued, starts_of
from refusal_jax.monitor.store import Cursor
from refusal_jax.monitor.traces import Place

LOG = logging.getLogger(__name__)
OPEN_AT_ONCE = 64
SETTLED = 60.0  # seconds after its last change in which a file may still be written by what compresses it
SLOWEST = 0.1  # the share of the time that looking for files may take
Identity = tuple[int, int]


class LogFiles:
    """The lines of a file and of what it was rotated to, or of all files in a folder and in those below it."""

    def __init__(
        self,
        path: pathlib.Path,
        cursors: Sequence[Cursor],
        began: float,
        longest: int,
        follow: bool,
        every: float = 1.0,
    ):
        """path: the file, or the folder. cursors: how far files are read. began: when the monitor was started first, in seconds
        since 1970: a file that was rotated before is not read. longest: bytes of a line. follow: whether the files grow; else
        what is there is read once. every: seconds after which it is looked again. Raises UserError if there is no such file."""
        self.path, self.began, self.longest, self.follow, self.every = path, began, longest, follow, every
        self.cursors = {cursor.id: cursor for cursor in cursors}
        self.next_id = max(self.cursors, default=0) + 1
        self.files: dict[Identity, LogFile] = {}
        self.noted: dict[int, LogFile] = {}  # by the cursor's number, files of which lines were taken
        self.ready: list[LogFile] = []
        self.told: set[tuple[str, str]] = set()
        self.scanned, self.took = 0.0, 0.0
        if not path.exists() and not (follow and path.parent.is_dir()):
            raise UserError(f"{path} does not exist. Name a file of traces, a folder of them, or - for standard input.")

    @property
    def ended(self) -> bool:
        return not self.follow and self.scanned > 0 and not self.ready

    def take(self, lines: int, size: int) -> list[Line]:
        if not self.ready and (not self.scanned or self.follow):
            if self.scanned:
                time.sleep(max(0.0, self.scanned + max(self.every, self.took / SLOWEST) - time.monotonic()))
            self._scan()
        found: list[Line] = []
        taken = 0
        while self.ready and len(found) < lines and taken < size:
            file = self.ready[0]
            got, count = self._read(file)
            found += got
            taken += count
            if got:
                self.noted[file.cursor.id] = file
            if not count:
                self.ready.pop(0)
                if self.files.get(file.identity) is not file:
                    file.close()
        return found

    def changed(self) -> Sequence[Cursor]:
        cursors = [file.noted() for file in self.noted.values()]
        self.cursors |= {cursor.id: cursor for cursor in cursors}
        self.noted = {}
        idle = [file for file in self.files.values() if file.file and file not in self.ready]
        for file in sorted(idle, key=lambda file: file.cursor.read)[:-OPEN_AT_ONCE]:
            file.close()
        return cursors

    def gone(self, before: float) -> Sequence[int]:
        present = {file.cursor.id for file in self.files.values()}
        gone = [one.id for one in self.cursors.values() if one.id not in present and one.read < before]
        for number in gone:
            del self.cursors[number]
        return gone

    def waiting(self) -> list[Place]:
        return [
            Place(str(file.path), file.cursor.line + 1)
            for file in self.files.values()
            if file.file and file.splitter.behind
        ]

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def _read(self, file: LogFile) -> tuple[list[Line], int]:
        """Reads a piece of a file; one that cannot be read is told of once, and left until it changes."""
        try:
            return file.read()
        except OtherContent:  # between the look at the file and now
            return [], 0
        except UNREADABLE as error:
            file.close()
            settled = time.time() - file.changed > SETTLED
            if settled or not isinstance(error, EOFError):
                self._tell(file.path, f"{error}")
            else:
                file.state = None  # it may still be written: look again
            return [], 0

    def _tell(self, path: pathlib.Path, reason: str) -> None:
        if (str(path), reason) not in self.told:
            self.told.add((str(path), reason))
            LOG.warning(f"{path} cannot be read on: {reason}.")

    def _scan(self) -> None:
        """Looks which files there are, and which have more to read, the oldest first."""
        start = time.monotonic()
        present: dict[Identity, tuple[pathlib.Path, os.stat_result]] = {}
        for path in self._candidates():
            try:
                status = path.stat()
            except OSError:  # rotated away just now
                continue
            present.setdefault((status.st_dev, status.st_ino), (path, status))
        gone = [self.files.pop(identity) for identity in self.files.keys() - present.keys()]
        found = [file for file in gone if file.file is not None]  # what is left of it can be read while it is open
        self._index()
        for identity, (path, status) in sorted(
            present.items(), key=lambda item: (item[1][1].st_mtime_ns, str(item[1][0]))
        ):
            file = self.files.get(identity)
            state = (status.st_size, status.st_mtime_ns)
            if file is not None and file.path != path:
                file.rename(path)
            if file is not None and (file.state == state or self._is_same(file)):
                if file.state != state:
                    found.append(file)
            else:
                file = self._known(path, status) if file is None else self._renewed(file, status)
                if file is None:
                    continue
                self.files[identity] = file
                found.append(file)
            file.state, file.changed = state, status.st_mtime
        self.ready = found
        self.scanned = time.monotonic()
        self.took = self.scanned - start

    def _candidates(self) -> Iterator[pathlib.Path]:
        if self.path.is_dir():
            for folder, folders, names in os.walk(self.path):
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                for name in names:
                    path = pathlib.Path(folder, name)
                    if not name.startswith(".") and path.is_file():
                        yield path
            return
        starts = (
            f"{self.path.name}.",
            f"{self.path.name}-",
            f"{self.path.stem}-",
            f"{self.path.stem}.",
            f"{self.path.stem}_",
        )
        for path in self.path.parent.iterdir():
            if path.name == self.path.name or (path.name.startswith(starts) and path.is_file()):
                yield path

    def _is_same(self, file: LogFile) -> bool:
        try:
            file.check()
        except OtherContent:
            return False
        except UNREADABLE as error:
            self._tell(file.path, str(error))
        return True

    def _renewed(self, file: LogFile, status: os.stat_result) -> LogFile:
        """Returns the file that took the place of one whose inode it has. The old cursor is kept, for a copy of the old."""
        file.close()
        return self._new(file.path, status)

    def _new(self, path: pathlib.Path, status: os.stat_result) -> LogFile:
        cursor = Cursor(self.next_id, str(path), status.st_dev, status.st_ino, "", 0, 0, 0, time.time())
        self.next_id += 1
        return LogFile(path, status, cursor, self.longest)

    def _known(self, path: pathlib.Path, status: os.stat_result) -> LogFile | None:
        """Returns a file that was not there before: at the cursor of the content that it has, or at its beginning. None for a
        copy of a file that is still there, and for one that was rotated away before the monitor was first started."""
        if path.name != self.path.name and status.st_mtime < self.began and not self.path.is_dir():
            return None
        live = {file.cursor.id for file in self.files.values()}
        try:
            for cursor in self._alike(path, status):
                if cursor.id in live:
                    return None
                return LogFile(path, status, cursor, self.longest)
        except UNREADABLE as error:
            if time.time() - status.st_mtime > SETTLED or not isinstance(error, EOFError):
                self._tell(path, str(error))
            return None
        return self._new(path, status)

    def _alike(self, path: pathlib.Path, status: os.stat_result) -> Iterator[Cursor]:
        """Yields the cursors whose content a file begins with, that of its own inode and the farthest first."""
        identity = (status.st_dev, status.st_ino)

        def order(cursor: Cursor) -> tuple[bool, int]:
            return ((cursor.device, cursor.inode) != identity, -cursor.offset)

        starts = starts_of(path, {size for size, _ in self.heads})
        for cursor in sorted((one for start in starts.items() for one in self.heads.get(start, ())), key=order):
            if is_continued(path, cursor):
                yield cursor

    def _index(self) -> None:
        """Sorts the cursors by the beginning of what they are of, which most other files do not share."""
        self.heads: dict[tuple[int, str], list[Cursor]] = {}
        for cursor in self.cursors.values():
            if cursor.offset:
                self.heads.setdefault((cursor.head_size, cursor.head.partition(".")[0]), []).append(cursor)

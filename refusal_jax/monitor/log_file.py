"""One log file that is read on, plain or compressed, and what it is known by under another name."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import pathlib
import time
import zlib
from collections.abc import Iterable
from typing import Any

from refusal_jax.monitor.lines import CHUNK, Line, Splitter
from refusal_jax.monitor.store import Cursor

HEAD = 1024  # bytes at the beginning, and before the offset, by which a file is known
OPENERS = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\x00", lzma.open))
ZSTD = b"\x28\xb5\x2f\xfd"
UNREADABLE = (EOFError, OSError, lzma.LZMAError, zlib.error)


class OtherContent(Exception):
    """A file does not hold what was read of it before."""


class LogFile:
    """One file that is read on. Its cursor says how far its complete lines were taken.

    state: size and time of change that the file had when it was last looked at, None before.
    """

    def __init__(self, path: pathlib.Path, status: os.stat_result, cursor: Cursor, longest: int):
        self.path, self.cursor = path, cursor
        self.identity = (status.st_dev, status.st_ino)
        self.state: tuple[int, int] | None = None
        self.changed = status.st_mtime
        self.longest = longest
        self.file: Any = None  # plain, or one that unpacks

    def open(self) -> Any:
        """Opens the file at its cursor. Raises OtherContent if it is not the file that the cursor is of, and what
        UNREADABLE lists."""
        if self.file is None:
            file, self.packed = opened(self.path)
            try:
                size = min(HEAD, self.cursor.offset)
                self.start = file.read(size)  # the first bytes, at most HEAD
                file.seek(self.cursor.offset - size)
                self.before = self.recent = file.read(
                    size
                )  # the last bytes before the offset, and of all that was read
                if self.cursor.offset and self.fingerprint() != self.cursor.head:
                    raise OtherContent(self.path)
            except BaseException:
                file.close()
                raise
            self.file, self.splitter = file, Splitter(str(self.path), self.cursor.line, self.longest)
        return self.file

    def rename(self, path: pathlib.Path) -> None:
        """Takes note of the file's new path."""
        self.path = path
        if self.file is not None:
            self.splitter.name = str(path)

    def fingerprint(self) -> str:
        """Returns what the file is known by: hashes of its beginning and of what lies before the offset."""
        size = min(HEAD, self.cursor.offset)
        return f"{digest(self.start[:size])}.{digest(self.before)}"

    def check(self) -> None:
        """Raises OtherContent if the file was emptied, and perhaps written anew, since it was opened."""
        file = self.open()
        if not isinstance(file, io.FileIO):
            return
        if os.fstat(file.fileno()).st_size < file.tell():  # what was read of a line that is not complete is void
            self.close()
            file = self.open()
        number, size = file.fileno(), min(HEAD, self.cursor.offset)
        offset = self.cursor.offset - size
        if os.pread(number, size, 0) != self.start[:size] or os.pread(number, size, offset) != self.before:
            raise OtherContent(self.path)

    def read(self) -> tuple[list[Line], int]:
        """Returns the lines of the next piece of the file, and the bytes of the piece, 0 at its end. Raises what UNREADABLE lists
        for a compressed file that is damaged or not complete."""
        file = self.open()
        data = file.read(CHUNK)
        before = self.splitter.number
        if data:
            lines = self.splitter.feed(data)
            self.start = (self.start + data)[:HEAD] if len(self.start) < HEAD else self.start
        else:
            lines = self.splitter.last() if self.packed or is_whole(bytes(self.splitter.rest)) else []
        held = self.recent + data
        self.recent = held[-HEAD:]
        if lines or self.splitter.number != before:
            self.before = held[: len(held) - self.splitter.behind][-HEAD:]
            self.cursor = self.cursor._replace(
                offset=file.tell() - self.splitter.behind, line=self.splitter.number, read=time.time()
            )
        return lines, len(data)

    def noted(self) -> Cursor:
        """Returns the cursor as it is to be kept."""
        device, inode = self.identity
        size = min(HEAD, self.cursor.offset)
        self.cursor = self.cursor._replace(
            path=str(self.path), device=device, inode=inode, head=self.fingerprint(), head_size=size
        )
        return self.cursor

    def close(self) -> None:
        """Closes the file; it is opened again at its cursor."""
        if self.file is not None:
            self.file.close()
            self.file = None


def digest(data: bytes) -> str:
    """Returns a short hash of bytes."""
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def opened(path: pathlib.Path) -> tuple[Any, bool]:
    """Opens a file to read what it holds, and returns whether it is compressed. Raises OSError, for Zstandard too."""
    with open(path, "rb") as file:
        start = file.read(6)
    for magic, opener in OPENERS:
        if start.startswith(magic):
            return opener(path, "rb"), True
    if start.startswith(ZSTD):
        raise OSError("it is compressed with Zstandard, which cannot be read: use gzip, bzip2 or xz")
    return open(path, "rb", buffering=0), False


def is_whole(rest: bytes) -> bool:
    """Returns whether a line without its end is a whole JSON object, which the beginning of one never is."""
    if not rest.rstrip().endswith(b"}") or not rest.lstrip().startswith(b"{"):
        return False
    try:
        json.loads(rest)
    except (ValueError, RecursionError):
        return False
    return True


def starts_of(path: pathlib.Path, sizes: Iterable[int]) -> dict[int, str]:
    """Returns, by size, the hash of a file's beginning of each of the sizes that it has. Raises what UNREADABLE lists."""
    file, _ = opened(path)
    with file:
        start = file.read(max(sizes, default=0))
    return {size: digest(start[:size]) for size in sizes if size <= len(start)}


def is_continued(path: pathlib.Path, cursor: Cursor) -> bool:
    """Returns whether a file has before the offset of a cursor what was read there. Raises what UNREADABLE lists."""
    size = cursor.head_size
    file, _ = opened(path)
    with file:
        file.seek(cursor.offset - size)
        return digest(file.read(size)) == cursor.head.partition(".")[2]

"""Keeps the files of a run: in a folder on a disk, in a folder of an object store, or in memory as received from
process 0.

The three offer the same few operations on names relative to the folder. A file that exists is whole, whatever happens.
"""

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Iterator, Sequence

from refusal_jax.errors import UserError, setting
from refusal_jax.files import cannot_write, local_path, lock, write_atomically
from refusal_jax.stores import explained, is_in_store, open_store

STORES = ("gs", "s3")
PART_SECONDS = 10.0  # an object store gets the rows of a ledger at most this often, each time as a new object


def open_storage(folder: str | os.PathLike) -> "DiskFolder | ObjectFolder":
    """Opens the folder of a path or of a gs:// address. Raises UserError for other addresses, and without the store's client."""
    scheme, separator, _ = os.fspath(folder).partition("://")
    if not separator:
        return DiskFolder(folder)
    if scheme not in STORES:
        raise UserError(
            f"{folder}: there is no access to {scheme}:// here. Pass a local folder, or one of "
            f"{', '.join(f'{known}://BUCKET/FOLDER' for known in STORES)}."
        )
    return ObjectFolder(folder)


def named_by() -> str:
    """Returns " as --workdir", or the other words that name what runs keeps its results by, to follow "a folder"."""
    name = setting("workdir") or setting("out")
    return f" as {name}" if name else ""


class DiskFolder:
    """A local folder: files are replaced by renaming, ledgers grow line by line, and a lock keeps other runs out."""

    def __init__(self, folder: str | os.PathLike):
        self.path = local_path(folder)

    def place(self, name: str = "") -> pathlib.Path:
        """Returns the path of a file, or of the folder."""
        return self.path / name

    def names(self) -> list[str]:
        """Returns what is directly in the folder; empty if there is none. Raises UserError if it is a file."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file. Pass a folder{named_by()}.")
        return sorted(p.name for p in self.path.iterdir()) if self.path.is_dir() else []

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Makes the folder, keeps other processes out of it, and removes what a crash has left half-written.

        Raises UserError if another process is in it, or if it cannot be written.
        """
        path = self.path / ".lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = open(path, "ab")  # noqa: SIM115, the next statement closes it
        except OSError as error:
            raise cannot_write(path, error) from None
        with file:
            try:
                free = lock(file.fileno(), self.path)  # the system frees it when the process ends, however it ends
            except OSError as error:
                raise cannot_write(path, error) from None
            if not free:
                raise UserError(
                    f"Another process is working in {self.path}. Wait for it, or choose another folder{named_by()}."
                )
            for leftover in self.path.rglob(".*.tmp-*"):
                leftover.unlink(missing_ok=True)
            yield

    def exists(self, name: str) -> bool:
        """Returns whether a file is there."""
        return (self.path / name).is_file()

    def read(self, name: str) -> bytes:
        """Reads a whole file."""
        return (self.path / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        write_atomically(self.path / name, data)

    def extend(self, name: str, data: bytes) -> None:
        """Adds to a file that need not survive a crash whole."""
        with open(self.path / name, "ab") as file:
            file.write(data)

    def rows(self, ledger: str) -> list[dict]:
        """Reads the rows of a ledger; a last line torn by a crash is dropped."""
        if not self.exists(ledger):
            return []
        rows, lines = [], self.read(ledger).decode("utf-8", "replace").split("\n")
        for line in lines[:-1]:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        if len(rows) < len(lines) - 1 or lines[-1]:
            self.write(ledger, _lines(rows))
        return rows

    def append(self, ledger: str, rows: Sequence[dict]) -> None:
        """Adds rows to a ledger and puts them on the disk. Raises UserError if they cannot be written."""
        path = self.path / ledger
        try:
            with open(path, "ab") as file:
                file.write(_lines(rows))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(path, error) from None

    def remove(self, names: Sequence[str]) -> None:
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def remove_folder(self) -> None:
        """Removes the folder if only the lock is in it."""
        self.remove([".lock"])
        with contextlib.suppress(OSError):
            self.path.rmdir()


class ObjectFolder:
    """A folder of an object store, through fsspec: objects are written whole and appear at once.

    An object store has no lock that a crash would free, so nothing keeps a second run out: that is the user's part. It
    cannot append either, and objects may not be replaced often: a ledger is numbered objects, a few rows each.
    """

    def __init__(self, address: str | os.PathLike):
        """Opens a folder by its address. Raises UserError if the client of its store is not installed."""
        self.address = os.fspath(address).rstrip("/")
        with self._reached():
            self.files, self.root = open_store(self.address)
        self._known: dict[str, bytes] = {}  # what this process has read or written: nobody else writes here
        self._pending: dict[str, tuple[float, list[dict]]] = {}  # of each ledger: when it was last written, rows since
        self._parts: dict[str, list[str]] = {}

    def place(self, name: str = "") -> str:
        """Returns the address of a file, or of the folder."""
        return f"{self.address}/{name}".rstrip("/")

    def _reached(self, name: str = ""):
        """Turns what the store's client raises into a UserError."""
        return explained(self.place(name), "Then run the same command again: finished work is kept.")

    def names(self) -> list[str]:
        """Returns what is directly in the folder; empty if there is none."""
        with self._reached():
            self.files.invalidate_cache()
            try:
                found = self.files.ls(self.root, detail=False)
            except FileNotFoundError:
                return []
        folder = self.root.rstrip("/")
        return sorted(path.rpartition("/")[2] for path in (p.rstrip("/") for p in found) if path != folder)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Does nothing: see above."""
        yield

    def exists(self, name: str) -> bool:
        if name in self._known:
            return True
        with self._reached(name):
            return is_in_store(self.files, f"{self.root}/{name}")

    def read(self, name: str) -> bytes:
        if name not in self._known:
            with self._reached(name):
                self._known[name] = self.files.cat_file(f"{self.root}/{name}")
        return self._known[name]

    def write(self, name: str, data: bytes) -> None:
        with self._reached(name):
            self.files.pipe_file(f"{self.root}/{name}", data)
        self._known[name] = data

    def extend(self, name: str, data: bytes) -> None:
        """Adds to a file, which is written again whole."""
        self.write(name, (self.read(name) if self.exists(name) else b"") + data)

    def rows(self, ledger: str) -> list[dict]:
        """Reads the rows of a ledger."""
        self._parts[ledger] = [name for name in self.names() if name.startswith(f"{ledger}.")]
        self._pending[ledger] = (time.monotonic(), [])
        return [json.loads(line) for part in self._parts[ledger] for line in self.read(part).splitlines()]

    def append(self, ledger: str, rows: Sequence[dict]) -> None:
        """Adds rows to a ledger, in a new object every PART_SECONDS: a crash loses at most the rows since."""
        written, pending = self._pending[ledger]
        pending.extend(rows)
        if time.monotonic() - written >= PART_SECONDS:
            part = f"{ledger}.{len(self._parts[ledger]):06}"
            self.write(part, _lines(pending))
            self._parts[ledger].append(part)
            self._pending[ledger] = (time.monotonic(), [])

    def remove(self, names: Sequence[str]) -> None:
        for name in names:
            with self._reached(name), contextlib.suppress(FileNotFoundError):
                self.files.rm_file(f"{self.root}/{name}")
            self._known.pop(name, None)

    def remove_folder(self) -> None:
        """Does nothing: an object store has no empty folders."""


class ToldFiles:
    """The files that process 0, which owns the folder, has sent to this process. Only process 0 writes them."""

    def __init__(self, folder: str | os.PathLike):
        self.path = local_path(folder)
        self.files: dict[str, bytes] = {}

    def place(self, name: str = "") -> pathlib.Path:
        """Returns the path of a file, or of the folder, where process 0 has it."""
        return self.path / name

    def exists(self, name: str) -> bool:
        return name in self.files

    def read(self, name: str) -> bytes:
        return self.files[name]

    def write(self, name: str, data: bytes) -> None:
        pass

    def append(self, ledger: str, rows: Sequence[dict]) -> None:
        pass

    def told(self, files: dict[str, bytes]) -> None:
        """Stores files that process 0 has sent."""
        self.files |= files


def _lines(rows: Sequence[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()

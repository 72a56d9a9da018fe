"""Writes a trail: appends records, begins new files, writes heads, and removes what is older than it has to be kept.

Only whole records count. A line without its newline is what a crash left of a record: it is cut off before the next is written.
"""

import errno
import itertools
import logging
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from refusal_jax.errors import DamagedFile, UserError
from refusal_jax.files import cannot_write, local_path, lock, write_atomically
from refusal_jax.monitor.trail import files
from refusal_jax.monitor.trail.files import Head, Opening, file_name, head_name
from refusal_jax.monitor.trail.records import REMOVED, START, hash_of, line_of, utc
from refusal_jax.monitor.trail.settings import TrailSettings
from refusal_jax.signatures import PrivateKey

LOG = logging.getLogger(__name__)

DAY = 86_400  # seconds


class Trail:
    """A trail that is open for appending; one process may have it open at a time.

    records: the number of its last record. letters: of each writer, the last letter that the files have.
    """

    def __init__(self, settings: TrailSettings, folder: pathlib.Path, locked: int):
        self._settings, self._folder, self._locked = settings, folder, locked
        self._key = PrivateKey(local_path(settings.key)) if settings.key else None
        self._copies = local_path(settings.heads_to) if settings.heads_to else None
        self._name, self._file, self._day = os.urandom(16).hex(), 0, ""
        self._hash, self._descriptor, self._size = START, -1, 0
        self._head_seq, self._head_time, self._synced = 0, time.monotonic(), 0
        self._failed = False  # after which what is on the disk is less than what was chained
        self.records, self.letters = 0, dict[str, int]()

    @classmethod
    def open(cls, settings: TrailSettings) -> "Trail":
        """Opens the trail in a folder, which is made if it is not there, and continues its chain.

        Raises UserError if another process has it open, if the disk or the key cannot be used, and if what is there does not
        hold together, so that nothing may be appended.
        """
        folder = local_path(settings.folder)
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            locked = os.open(folder / files.LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise cannot_write(folder / files.LOCK, error) from None
        if not lock(locked, folder / files.LOCK):
            os.close(locked)
            raise UserError(
                f"{folder} is in use: another process appends to this trail. Stop it, or name another folder for this trail."
            )
        trail = None
        try:
            trail = cls(settings, folder, locked)
            trail._continue()
            if trail.records > trail._head_seq:
                trail._write_head()
        except BaseException:
            if trail is not None and trail._descriptor >= 0:
                os.close(trail._descriptor)
            os.close(locked)
            raise
        return trail

    def __enter__(self) -> "Trail":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Appends records, in their order, and a head if one is due.

        If the disk refuses, those before are kept whole, and UserError is raised; so it is if somebody else changed the file.
        """
        self._check_file()
        largest = self._settings.file_mb * 1e6
        pending: list[bytes] = []
        size, day = self._size, time.strftime("%Y-%m-%d", time.gmtime())
        for record in records:
            if size > largest or day > self._day:
                self._flush(pending)
                pending = []
                self._rotate()
                size = self._size
            line = self._chained(record)
            pending.append(line)
            size += len(line)
        self._flush(pending)
        if self._settings.fsync == "always":
            self._sync()
        new = self.records - self._head_seq
        waited = time.monotonic() - self._head_time
        if new >= self._settings.head_records or (new and waited >= self._settings.head_seconds):
            self._write_head()

    def close(self) -> None:
        """Writes the last head, and closes the trail."""
        if self._descriptor < 0:
            return
        try:
            if self.records > self._head_seq and not self._failed:
                self._write_head()
        finally:
            os.close(self._descriptor)
            os.close(self._locked)
            self._descriptor = -1

    def _chained(self, record: Mapping[str, Any]) -> bytes:
        """Returns the line of the next record of the chain."""
        line = line_of({**record, "seq": self.records + 1, "previous": self._hash})
        self.records += 1
        self._hash = hash_of(line)
        writer, letter = record.get("writer"), record.get("letter")
        if writer is not None and letter is not None:
            self.letters[writer] = letter
        return line + b"\n"

    def _continue(self) -> None:
        """Takes up the chain where the last file ends."""
        there = files.numbers(self._folder)
        try:
            while there and files.opening(self._path(there[-1])) is None:
                self._path(there.pop()).unlink()  # a crash came before its first record was whole
            if not there:
                return self._begin()
            path, head = self._path(there[-1]), self._folder / head_name(there[-1])
            last = files.read_head(head)[0] if head.exists() else None
            tail = files.read_tail(path, last)
        except ValueError as error:
            if isinstance(error, UserError) and not isinstance(error, DamagedFile):
                raise
            raise self._broken(str(error)) from None
        if tail.torn:
            LOG.warning(f"{path}: a crash left {tail.torn} bytes of a record that was not finished; they are cut off.")
        self.records, self._hash, self.letters = tail.records, tail.hash, tail.letters
        self._name, self._file, self._day = tail.opening.trail, there[-1], tail.opening.time[:10]
        self._head_seq = last.seq if last else 0
        self._reopen(path, tail.size)

    def _path(self, number: int) -> pathlib.Path:
        return self._folder / file_name(number)

    def _broken(self, found: str) -> UserError:
        return UserError(
            f"The trail in {self._folder} cannot be continued: {found}. Run `refusal-jax monitor verify {self._folder}`, keep "
            "the folder as it is, as evidence, and name another folder for the trail."
        )

    def _reopen(self, path: pathlib.Path, size: int) -> None:
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
            if os.fstat(self._descriptor).st_size != size:
                os.ftruncate(self._descriptor, size)
                os.fsync(self._descriptor)
        except OSError as error:
            raise cannot_write(path, error) from None
        self._size, self._synced = size, size

    def _begin(self) -> None:
        """Begins the next file, with the record that chains it to the one before."""
        number = self._file + 1
        path = self._path(number)
        begun = utc(time.time()) or ""
        record = Opening(self._name, number, self.records + 1, self._hash, begun, self.letters).record
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            descriptor = os.open(path, flags, 0o600)
        except OSError as error:
            raise cannot_write(path, error) from None
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._size, self._file, self._day = descriptor, 0, number, begun[:10]
        self._flush([self._chained(record)])
        self._sync()
        self._sync_folder()

    def _rotate(self) -> None:
        self._write_head()
        self._begin()
        self._write_head()
        self._retire()

    def _flush(self, pending: Sequence[bytes]) -> None:
        """Writes lines to the file; if the disk refuses them, nothing of them is left there."""
        data = b"".join(pending)
        written = 0
        try:
            while written < len(data):
                written += os.write(self._descriptor, data[written:])
        except OSError as error:
            self._failed = True
            if written:
                os.ftruncate(self._descriptor, self._size)
            raise self._refused(error) from None
        self._size += written

    def _sync(self) -> None:
        if self._synced == self._size or self._settings.fsync == "never":
            return
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._failed = True
            raise self._refused(error) from None
        self._synced = self._size

    def _sync_folder(self) -> None:
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems do not sync folders
                raise cannot_write(self._folder, error) from None
        finally:
            os.close(folder)

    def _refused(self, error: OSError) -> UserError:
        return cannot_write(self._path(self._file), error)

    def _check_file(self) -> None:
        """Raises UserError if the file is no longer the one that is written to, as log rotation by other programs makes it."""
        path = self._path(self._file)
        ours = os.fstat(self._descriptor)
        try:
            there = os.stat(path, follow_symlinks=False)
        except OSError:
            there = None
        if there is None or (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino) or ours.st_size != self._size:
            raise self._broken(
                f"{path} was removed, replaced or changed by another program while it was written to; the trail begins new files "
                "and removes old ones itself, by its settings"
            )

    def _write_head(self) -> None:
        """Writes the head of what is on the disk."""
        self._sync()
        data = Head.now(self._name, self._file, self.records, self._hash).in_bytes(self._key)
        write_atomically(self._folder / head_name(self._file), data, private=True)
        if self._copies is not None:
            try:
                self._copies.mkdir(parents=True, exist_ok=True)
                write_atomically(self._copies / head_name(self._file), data)
            except (OSError, UserError) as error:  # the trail itself goes on
                LOG.warning(f"No copy of the trail's head could be kept in {self._copies}: {error}")
        self._head_seq, self._head_time = self.records, time.monotonic()

    def _retire(self) -> None:
        """Removes files that are older than they have to be kept, after a record that says so and its head are on the disk."""
        if not self._settings.keep_days:
            return
        oldest = utc(time.time() - self._settings.keep_days * DAY) or ""
        old: list[tuple[int, Opening]] = []
        for number, following in itertools.pairwise(files.numbers(self._folder)):
            after = files.opening(self._path(following))  # begun when the one before it ended
            if following != number + 1 or after is None or after.time >= oldest:
                break
            old.append((number, after))
        if not old:
            return
        gone = [{"file": file_name(number), "through": after.seq - 1, "hash": after.previous} for number, after in old]
        record = {"kind": REMOVED, "time": utc(time.time()), "keep_days": self._settings.keep_days, "files": gone}
        self._flush([self._chained(record)])
        self._write_head()
        for number, _ in old:
            self._path(number).unlink(missing_ok=True)
            (self._folder / head_name(number)).unlink(missing_ok=True)
        self._sync_folder()

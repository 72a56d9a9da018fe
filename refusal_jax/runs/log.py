"""The log file of a run's folder, which process 0 writes: a rerun adds to it."""

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator

from refusal_jax import logs
from refusal_jax.errors import UserError
from refusal_jax.runs.storage import DiskFolder, ObjectFolder

NAME = "log.txt"


class LogFile(logging.Handler):
    """Adds records to the log file of a folder: at once on a disk, at the next `flush` in an object store.

    A store's own client makes records while it writes, from threads of its own, so nothing is locked meanwhile. A log that
    cannot be written ends no run: what the run itself cannot write does.
    """

    def __init__(self, storage: DiskFolder | ObjectFolder):
        super().__init__()
        self.storage, self.pending, self.held, self.dropped = storage, "", threading.Lock(), False

    def emit(self, record: logging.LogRecord) -> None:
        self.add(self.format(record) + "\n")
        if isinstance(self.storage, DiskFolder):
            self.flush()

    def add(self, text: str) -> None:
        with self.held:
            self.pending += text

    def flush(self) -> None:
        with self.held:
            text, self.pending = self.pending, ""
        if text and not self.dropped:
            with contextlib.suppress(OSError, UserError):
                self.storage.extend(NAME, text.encode("utf-8", "replace"))

    def drop(self) -> None:
        """Removes the file and keeps nothing more."""
        self.dropped = True
        self.storage.remove([NAME])


@contextlib.contextmanager
def kept(storage: DiskFolder | ObjectFolder) -> Iterator[LogFile]:
    """Keeps the package's records in the folder's log file, and how what is done meanwhile ends if it fails."""
    file = LogFile(storage)
    command = " ".join([os.path.basename(sys.argv[0] or "python"), *sys.argv[1:]])
    now = time.strftime("%Y-%m-%d %H:%M:%S %z")
    file.add(f"--- {now}, {socket.gethostname()}, pid {os.getpid()}: {command}\n")
    with logs.kept(file):
        try:
            yield file
        except UserError as error:
            logs.PRINTED.error(str(error))
            raise
        except KeyboardInterrupt:
            logs.PRINTED.error("The run was interrupted.")
            raise
        except BaseException as error:
            logs.PRINTED.error(f"The run ended early: {type(error).__name__}.", exc_info=error)
            raise

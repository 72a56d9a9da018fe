"""Logging: messages are records of the standard library's logging, under the logger "refusal_jax".

A job shows them on stderr, and a run keeps them in its folder (`runs.log`). On a terminal a record is its bare message; in
output that nobody watches, among several processes, and at the level debug it has a time and the number of its process.
Python code that uses this package without a job decides itself, as for any library, which records it shows.
"""

import contextlib
import logging
import sys
from collections import deque
from collections.abc import Iterator

from tqdm import tqdm

LOG = logging.getLogger("refusal_jax")
PRINTED = logging.getLogger("refusal_jax.printed")  # for what users see in another way: it is only kept
PRINTED.propagate = False
PRINTED.addHandler(logging.NullHandler())
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
EARLY = 1000  # records that are kept for a log file that is opened later
_process: int | None = None  # the number of this process, None if it is alone


def set_process(index: int | None) -> None:
    """Tells the log which of several processes this is; None: it is alone."""
    global _process
    _process = index


class Lines(logging.Formatter):
    """Writes a record with its time and, of several processes, the number of its process: `[2026-11-26 10:00:00 p1] message`."""

    def __init__(self):
        super().__init__(datefmt="%Y-%m-%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        time = self.formatTime(record, self.datefmt)
        ours = record.name.partition(".")[0] == LOG.name
        words = [] if ours else [record.name]
        words += [] if record.levelno == logging.INFO and ours else [record.levelname.lower()]
        return f"[{time}{'' if _process is None else f' p{_process}'}] {' '.join(words)}{': ' if words else ''}{record.message}"


class Stderr(logging.Handler):
    """Shows records on stderr, above any progress bar. Processes other than the first show their errors only, unless the level
    is debug, because all say the same."""

    def __init__(self, level: int):
        super().__init__(level)
        self.lines, self.bare = Lines(), logging.Formatter()

    def emit(self, record: logging.LogRecord) -> None:
        debug = self.level <= logging.DEBUG
        if _process and record.levelno < logging.ERROR and not debug:
            return
        stamped = debug or _process is not None or not on_terminal()
        try:
            tqdm.write((self.lines if stamped else self.bare).format(record), file=sys.stderr)
            sys.stderr.flush()
        except (OSError, ValueError):  # nobody reads stderr any more
            pass


class Early(logging.Handler):
    """Keeps the last records, for a log file that is opened later. everything: it is to get other libraries' records too."""

    def __init__(self, everything: bool):
        super().__init__()
        self.everything = everything
        self.records: deque[logging.LogRecord] = deque(maxlen=EARLY)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def on_terminal() -> bool:
    """Returns whether somebody may be watching stderr."""
    return sys.stderr is not None and sys.stderr.isatty()


@contextlib.contextmanager
def shown(level: str = "info") -> Iterator[None]:
    """Shows the records of this package on stderr, from a level on, while a job runs.

    level: a key of LEVELS. At "debug", other libraries' records are made too: all go to the run's log file, warnings to stderr.
    """
    handlers, root, others = (
        [Stderr(LEVELS[level]), Early(level == "debug")],
        logging.getLogger(),
        Stderr(logging.WARNING),
    )
    before = LOG.level, LOG.propagate, root.level
    LOG.setLevel(min(LEVELS[level], logging.INFO))
    LOG.propagate = False
    if level == "debug":
        root.setLevel(logging.DEBUG)
        root.addHandler(others)  # without one, Python would show everything
    for handler in handlers:
        LOG.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            LOG.removeHandler(handler)
        root.removeHandler(others)
        root.setLevel(before[2])
        LOG.propagate = before[1]
        LOG.setLevel(before[0])


@contextlib.contextmanager
def kept(file: logging.Handler) -> Iterator[None]:
    """Gives the records of this package to a handler that keeps them, first those since the job began.

    It gets those of level info whatever is shown, and at the level debug those of other libraries too.
    """
    file.setFormatter(Lines())
    before, early = LOG.level, [handler for handler in LOG.handlers if isinstance(handler, Early)]
    for record in (record for one in early for record in one.records):
        file.handle(record)
    loggers = [LOG, PRINTED, *([logging.getLogger()] if any(one.everything for one in early) else [])]
    if before == logging.NOTSET:  # no job has set it
        LOG.setLevel(logging.INFO)
    for logger in loggers:
        logger.addHandler(file)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(file)
        LOG.setLevel(before)
        for one in early:
            one.records.clear()  # a later run of this job has a log of its own
        file.flush()

"""The monitor's state: one SQLite database in which every batch is one transaction.

Offsets of the files, identities of the traces, counts, the state of all parts and the messages that are to be sent change
together or not at all. So a monitor that is killed at any moment goes on as if it had not been, and counts nothing twice.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from refusal_jax.errors import DamagedFile, UserError, setting
from refusal_jax.files import cannot_write, lock
from refusal_jax.monitor.parts import Letter, Message
from refusal_jax.monitor.traces import Place

VERSION = 1  # of the schema, kept as the database's user_version
FILE, LOCK = "monitor.sqlite", "monitor.lock"
AT_ONCE = 1000  # letters that a carrier is given in one call
MALFORMED_KEPT = 1000
SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE files (id INTEGER PRIMARY KEY, path TEXT NOT NULL, device INTEGER NOT NULL, inode INTEGER NOT NULL,
    head TEXT NOT NULL, head_size INTEGER NOT NULL, offset INTEGER NOT NULL, line INTEGER NOT NULL, read REAL NOT NULL);
CREATE TABLE seen (id INTEGER PRIMARY KEY, day INTEGER NOT NULL);
CREATE INDEX seen_by_day ON seen (day);
CREATE TABLE counts (day INTEGER NOT NULL, model TEXT NOT NULL, category TEXT NOT NULL, what TEXT NOT NULL, n INTEGER NOT NULL,
    PRIMARY KEY (day, model, category, what)) WITHOUT ROWID;
CREATE TABLE tallies (what TEXT PRIMARY KEY, n INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE malformed (number INTEGER PRIMARY KEY AUTOINCREMENT, file TEXT NOT NULL, line INTEGER NOT NULL,
    reason TEXT NOT NULL);
CREATE TABLE drafts (key TEXT PRIMARY KEY, draft TEXT NOT NULL, read REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE states (owner TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (owner, key)) WITHOUT ROWID;
CREATE TABLE outbox (number INTEGER PRIMARY KEY AUTOINCREMENT, channel TEXT NOT NULL, content TEXT NOT NULL);
CREATE INDEX outbox_by_channel ON outbox (channel, number);
"""


class Count(NamedTuple):
    """Holds what one day, since 1970 in UTC, brought for a model and a category. what: an Outcome's or an Unjudged's value,
    "judged" for a verdict without an outcome, "sampled" for all that were given to the judge, or "traces" for all."""

    day: int
    model: str
    category: str
    what: str


class Cursor(NamedTuple):
    """Tells how far a file is read. id: of the file in the database. head: a hash of its first `head_size` bytes, by which it
    is known again under another name. offset: bytes, of what a compressed file holds; line: lines before it. read: when, in
    seconds since 1970."""

    id: int
    path: str
    device: int
    inode: int
    head: str
    head_size: int
    offset: int
    line: int
    read: float


@dataclasses.dataclass
class Changes:
    """Holds what one batch changes. seen: the identities of its traces, with the day of each. drafts: of streams and replies
    that are not complete, None for one that now is. states: of parts, `{(owner, key): value}`. tallies: counts of lines by
    what they were. malformed: places with what was wrong there."""

    cursors: list[Cursor] = dataclasses.field(default_factory=list)
    seen: dict[int, int] = dataclasses.field(default_factory=dict)
    counts: Counter[Count] = dataclasses.field(default_factory=Counter)
    tallies: Counter[str] = dataclasses.field(default_factory=Counter)
    malformed: list[tuple[Place, str]] = dataclasses.field(default_factory=list)
    drafts: dict[str, tuple[dict, float] | None] = dataclasses.field(default_factory=dict)
    states: dict[tuple[str, str], dict] = dataclasses.field(default_factory=dict)
    messages: list[Message] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def _explained(path: pathlib.Path) -> Iterator[None]:
    """Turns what SQLite raises for a bad file or a full disk into a UserError that names the file."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError) and "malformed" not in str(error):
            raise UserError(
                f"{path} could not be used: {error}. Check that the disk has space and that you may write to its folder, and "
                "start the monitor again: it goes on where it stopped."
            ) from None
        raise DamagedFile(
            f"{path} is damaged: {' '.join(str(error).split())}. Put a backup of it back, or move it away, together with the "
            "files whose names begin with its name: the monitor then reads its sources anew, and its charts begin anew."
        ) from None


class Store:
    """The database of one monitor. `open` locks its folder; `view` reads it while a monitor runs."""

    def __init__(self, path: pathlib.Path, database: sqlite3.Connection, locked: int | None):
        self.path, self.database, self.locked = path, database, locked
        self._delivered: dict[
            str, int
        ] = {}  # by channel, the last letter that is done with; the next commit deletes them

    @classmethod
    def open(cls, folder: pathlib.Path) -> "Store":
        """Opens the database in a folder for the one monitor that may change it, and makes both if they are not there.

        Raises UserError if another monitor has it, if it is of a newer version, or if the disk refuses it; DamagedFile for a
        file that is no whole database.
        """
        path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            locked = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise cannot_write(folder / LOCK, error) from None
        if not lock(locked, folder / LOCK):
            os.close(locked)
            raise UserError(
                f"{folder} is in use by another monitor. One monitor may use a state at a time: stop the other, or give this one "
                f"a folder of its own with {setting('state', 'DIR')}."
            )
        try:
            with _explained(path):
                if not path.exists() or not path.stat().st_size:
                    _make(path)
                database = sqlite3.connect(path, isolation_level=None, timeout=30)
                try:
                    _prepared(path, database)
                except BaseException:
                    database.close()
                    raise
        except BaseException:
            os.close(locked)
            raise
        return cls(path, database, locked)

    @classmethod
    def view(cls, folder: pathlib.Path) -> "Store":
        """Opens the database in a folder to read it; a monitor may run meanwhile. Raises UserError if there is none."""
        path = folder / FILE
        if not path.is_file():
            raise UserError(
                f"{folder} has no {FILE}: it is not the state of a monitor. Give its folder with {setting('state', 'DIR')}."
            )
        with _explained(path):
            database = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None)
            _checked_version(path, database)
        return cls(path, database, None)

    def close(self) -> None:
        """Closes the database, and frees the folder for another monitor."""
        if self._delivered:
            with _explained(self.path), self._transaction() as database:
                self._delete_delivered(database)
        self.database.close()
        if self.locked is not None:
            os.close(self.locked)
            self.locked = None

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def commit(self, changes: Changes) -> None:
        """Makes all changes of a batch in one transaction, which is on the disk afterwards. Raises UserError if it cannot be."""
        with _explained(self.path), self._transaction() as database:
            self._delete_delivered(database)
            database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", changes.cursors)
            database.executemany("INSERT OR IGNORE INTO seen VALUES (?, ?)", changes.seen.items())
            database.executemany(
                "INSERT INTO counts VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET n = n + excluded.n",
                [(*count, n) for count, n in changes.counts.items()],
            )
            database.executemany(
                "INSERT INTO tallies VALUES (?, ?) ON CONFLICT DO UPDATE SET n = n + excluded.n",
                changes.tallies.items(),
            )
            if changes.malformed:
                database.executemany(
                    "INSERT INTO malformed (file, line, reason) VALUES (?, ?, ?)",
                    [(place.file, place.line, reason) for place, reason in changes.malformed],
                )
                kept = "(SELECT max(number) FROM malformed) - ?"
                database.execute(f"DELETE FROM malformed WHERE number <= {kept}", (MALFORMED_KEPT,))
            ended = [(key,) for key, draft in changes.drafts.items() if draft is None]
            open_drafts = [(key, _json(kept[0]), kept[1]) for key, kept in changes.drafts.items() if kept]
            database.executemany("DELETE FROM drafts WHERE key = ?", ended)
            database.executemany("INSERT OR REPLACE INTO drafts VALUES (?, ?, ?)", open_drafts)
            database.executemany(
                "INSERT OR REPLACE INTO states VALUES (?, ?, ?)",
                [(owner, key, _json(value)) for (owner, key), value in changes.states.items()],
            )
            database.executemany(
                "INSERT INTO outbox (channel, content) VALUES (?, ?)",
                [(message.channel, _json(message.content)) for message in changes.messages],
            )

    def letters(self, channel: str) -> list[Letter]:
        """Returns the first letters of a channel's outbox that are not done with, at most AT_ONCE."""
        rows = self._rows(
            "SELECT number, content FROM outbox WHERE channel = ? AND number > ? ORDER BY number LIMIT ?",
            channel,
            self._delivered.get(channel, 0),
            AT_ONCE,
        )
        return [Letter(number, json.loads(content)) for number, content in rows]

    def delivered(self, channel: str, number: int) -> None:
        """Takes the letters of a channel up to a number, that one included, as done with. A crash may bring them back."""
        self._delivered[channel] = number

    def state(self, owner: str) -> dict[str, dict]:
        """Returns the state of a part, `{key: value}`, as of the last commit."""
        rows = self._rows("SELECT key, value FROM states WHERE owner = ?", owner)
        return {key: json.loads(value) for key, value in rows}

    def seen(self, ids: Sequence[int]) -> set[int]:
        """Returns which of the identities were seen before."""
        found: set[int] = set()
        for start in range(0, len(ids), AT_ONCE):
            some = ids[start : start + AT_ONCE]
            found.update(
                row[0] for row in self._rows(f"SELECT id FROM seen WHERE id IN ({','.join('?' * len(some))})", *some)
            )
        return found

    def cursors(self) -> list[Cursor]:
        """Returns how far each file is read."""
        return [Cursor(*row) for row in self._rows("SELECT * FROM files ORDER BY id")]

    def drafts(self) -> dict[str, tuple[dict, float]]:
        """Returns the drafts of traces that are not complete, with the times when they were last added to."""
        return {key: (json.loads(draft), read) for key, draft, read in self._rows("SELECT * FROM drafts")}

    def counts(self, since: int = 0) -> Counter[Count]:
        """Returns the counts of the days from `since` on, in days since 1970."""
        rows = self._rows("SELECT day, model, category, what, n FROM counts WHERE day >= ? ORDER BY 1, 2, 3, 4", since)
        return Counter({Count(*row[:4]): row[4] for row in rows})

    def series(self) -> set[tuple[str, str]]:
        """Returns the models and categories that there are counts of."""
        return set(self._rows("SELECT DISTINCT model, category FROM counts"))

    def tallies(self) -> Counter[str]:
        """Returns how many lines there were, by what they were."""
        return Counter(dict(self._rows("SELECT what, n FROM tallies")))

    def malformed(self) -> list[tuple[Place, str]]:
        """Returns the last malformed lines, at most MALFORMED_KEPT, with what was wrong with each."""
        rows = self._rows("SELECT file, line, reason FROM malformed ORDER BY number")
        return [(Place(file, line), reason) for file, line, reason in rows]

    def meta(self) -> dict[str, str]:
        """Returns what is noted about the monitor itself."""
        return dict(self._rows("SELECT key, value FROM meta"))

    def note(self, values: Mapping[str, str]) -> None:
        """Notes something about the monitor itself."""
        with _explained(self.path), self._transaction() as database:
            database.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", values.items())

    def prune(self, counts_before: int, seen_before: int, files: Iterable[int] = ()) -> None:
        """Deletes the counts and the identities of days before those given, and the cursors of files that are gone."""
        with _explained(self.path), self._transaction() as database:
            database.execute("DELETE FROM counts WHERE day < ?", (counts_before,))
            database.execute("DELETE FROM seen WHERE day < ?", (seen_before,))
            database.executemany("DELETE FROM files WHERE id = ?", [(one,) for one in files])

    def _rows(self, query: str, *values) -> list[tuple]:
        with _explained(self.path):
            return self.database.execute(query, values).fetchall()

    def _delete_delivered(self, database: sqlite3.Connection) -> None:
        database.executemany("DELETE FROM outbox WHERE channel = ? AND number <= ?", self._delivered.items())

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self.database.execute("BEGIN IMMEDIATE")
        try:
            yield self.database
        except BaseException:
            self.database.rollback()
            raise
        self.database.execute("COMMIT")


def _json(value: dict) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _make(path: pathlib.Path) -> None:
    """Makes a new database with its tables, which appears whole or not at all: others may look for it meanwhile."""
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(new, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = WAL")  # kept in the file
        database.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")
    os.replace(new, path)


def _prepared(path: pathlib.Path, database: sqlite3.Connection) -> None:
    """Sets the connection to a database up, and checks what it holds."""
    database.execute(
        "PRAGMA synchronous = FULL"
    )  # the trail's files are written after a commit, and must not be ahead of it
    database.execute("PRAGMA cache_size = -8000")
    problem = database.execute("PRAGMA quick_check(1)").fetchone()[0]
    if problem != "ok":
        raise sqlite3.DatabaseError(problem)
    _checked_version(path, database)


def _checked_version(path: pathlib.Path, database: sqlite3.Connection) -> None:
    found = database.execute("PRAGMA user_version").fetchone()[0]
    if found != VERSION:
        raise UserError(
            f"{path} has the schema {found}, expected {VERSION}: "
            + (
                "a newer version of this package made it. Upgrade: pip install -U refusal-jax."
                if found > VERSION
                else f"it is no state of a monitor. Give another folder with {setting('state', 'DIR')}."
            )
        )

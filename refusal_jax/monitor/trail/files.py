"""The files of a trail: their names, the record that each begins with, and the heads beside them.

A head says which record was the last of a file at some time, and its hash, from which all records before it follow. Each file has
one, which is replaced as the file grows. A head has a few hundred bytes, so that copies can be kept elsewhere.
"""

import dataclasses
import json
import pathlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from refusal_jax.files import read_json, to_json
from refusal_jax.monitor.trail.records import FILE, FORMAT, hash_of, utc
from refusal_jax.signatures import Envelope, PrivateKey, PublicKey

HEAD = "urn:refusal-jax:trail-head:v1"
PAYLOAD = "application/vnd.refusal-jax.trail-head+json"
NAME = re.compile(r"trail-(\d{6,12})\.jsonl")
LOCK = "trail.lock"
HASH = re.compile("[0-9a-f]{64}")


def file_name(number: int) -> str:
    """Returns the name of a trail's file. number: from 1."""
    return f"trail-{number:06d}.jsonl"


def head_name(number: int) -> str:
    """Returns the name of the head of a trail's file."""
    return f"trail-{number:06d}.head.json"


def numbers(folder: pathlib.Path) -> list[int]:
    """Returns the numbers of the files in a trail's folder, sorted."""
    found = (NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match and match[0] == file_name(int(match[1])))


def lines(path: pathlib.Path) -> Iterator[tuple[bytes, bool]]:
    """Yields each line of a file without its newline, with whether it had one: the last has none if it was not finished."""
    with open(path, "rb") as file:
        for line in file:
            yield line.removesuffix(b"\n"), line.endswith(b"\n")


class Opening(NamedTuple):
    """The record that a file begins with. letters: of each writer, the last letter of the outbox that the files before have."""

    trail: str
    file: int
    seq: int
    previous: str
    time: str
    letters: dict[str, int]

    @property
    def record(self) -> dict[str, Any]:
        """Returns the record's content, with its place in the chain."""
        return {"kind": FILE, "format": FORMAT, **self._asdict()}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Opening":
        """Returns what a record opens. Raises ValueError for a record that opens no file."""
        if record.get("kind") != FILE or record.get("format") != FORMAT:
            raise ValueError(f"it does not begin with a record of the kind {FILE!r} and the format {FORMAT!r}")
        texts = [record.get(name) for name in ("trail", "previous", "time")]
        counts, letters = [record.get(name) for name in ("file", "seq")], record.get("letters")
        if not (
            all(isinstance(one, str) for one in texts)
            and all(type(one) is int for one in counts)
            and isinstance(letters, dict)
        ):
            raise ValueError("its first record lacks the trail's name, a number or its time")
        return cls(**{name: record[name] for name in cls._fields})


def opening(path: pathlib.Path) -> Opening | None:
    """Returns the record that a file begins with, None if its first line is not finished. Raises ValueError, with the reason, for
    a file that begins otherwise."""
    for line, ended in lines(path):
        if not ended:
            return None
        record = json.loads(line)
        if not isinstance(record, dict):
            raise ValueError("its first line is no record")
        return Opening.of(record)
    return None


@dataclasses.dataclass(frozen=True)
class Head:
    """Holds what a head says. seq: the number of the last record; hash: of its line; time: when the head was written."""

    trail: str
    file: int
    seq: int
    hash: str
    time: str

    @classmethod
    def now(cls, trail: str, file: int, seq: int, hash: str) -> "Head":
        """Returns the head of this moment."""
        return cls(trail, file, seq, hash, utc(time.time()) or "")

    @classmethod
    def of(cls, document: Any) -> "Head":
        """Returns the head in a document. Raises ValueError for another document."""
        if not isinstance(document, dict) or document.get("_type") != HEAD:
            raise ValueError(f"its type is not {HEAD}")
        head = cls(**{field.name: document.get(field.name) for field in dataclasses.fields(cls)})  # type: ignore[arg-type]
        texts = all(isinstance(one, str) for one in (head.trail, head.hash, head.time))
        if not texts or type(head.file) is not int or type(head.seq) is not int or not HASH.fullmatch(head.hash):
            raise ValueError("it lacks the trail's name, a number, a hash or its time")
        return head

    def in_bytes(self, key: PrivateKey | None) -> bytes:
        """Returns the content of the head's file: an envelope that the key has signed or, without a key, the document itself."""
        document = {"_type": HEAD, **dataclasses.asdict(self)}
        return key.signed(to_json(document), PAYLOAD) if key else to_json(document)


def read_head(path: pathlib.Path) -> tuple[Head, Envelope | None]:
    """Returns a head with its envelope, None if it is unsigned; the signature is not checked. Raises ValueError, with the reason,
    for a file that is no head, and UserError for one that cannot be read."""
    data = read_json(path)
    if data.get("_type") == HEAD:
        return Head.of(data), None
    envelope = Envelope(data)
    if envelope.payload_type != PAYLOAD:
        raise ValueError(f"its payload type is not {PAYLOAD}")
    return Head.of(envelope.document), envelope


def signer_of(envelope: Envelope, keys: Sequence[PublicKey]) -> PublicKey | None:
    """Returns the key that has signed an envelope, None if none of them has."""
    return next((key for key in keys if envelope.is_signed_by(key)), None)


@dataclasses.dataclass
class Tail:
    """Holds what a file holds, and where the chain goes on. records: the number of its last record; hash: of that record's
    line; size: the bytes of its whole records; torn: the bytes after them, of a record that was not finished."""

    opening: Opening
    records: int
    hash: str
    letters: dict[str, int]
    size: int
    torn: int


def read_tail(path: pathlib.Path, head: Head | None) -> Tail:
    """Returns the tail of a file that begins with a whole line. head: that of the file, if it has one.

    Raises ValueError, with the reason, where the file does not hold together, or is not what its head says.
    """
    first = opening(path)
    assert first is not None
    tail = Tail(first, first.seq - 1, first.previous, dict(first.letters), 0, 0)
    for number, (line, ended) in enumerate(lines(path), 1):
        if not ended:
            tail.torn = len(line)
            break
        try:
            record = json.loads(line)
            fits = (record["seq"], record["previous"]) == (tail.records + 1, tail.hash)
        except (ValueError, TypeError, KeyError):
            fits = False
        if not fits:
            raise ValueError(f"{path}:{number} is not the record that follows the one before it")
        tail.records, tail.hash, tail.size = tail.records + 1, hash_of(line), tail.size + len(line) + 1
        if head and head.seq == tail.records and head.hash != tail.hash:
            raise ValueError(f"{path}:{number} is not the record that the file's head is of")
        if isinstance(record.get("writer"), str) and type(record.get("letter")) is int:
            tail.letters[record["writer"]] = record["letter"]
    if head and (head.trail != first.trail or head.seq > tail.records):
        raise ValueError(f"{path} ends with record {tail.records}, but its head is of record {head.seq}")
    return tail

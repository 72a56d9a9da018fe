"""Records of a trail: what they hold, and how they are written, one to a line.

The hash of a record is the sha256 of the bytes of its line, without the newline. The next record holds it as `previous`. So
nobody who checks a trail has to write JSON as we do. Lines are ASCII: sorted keys, no spaces, and all else escaped.
"""

import datetime
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import refusal_jax
from refusal_jax.errors import UserError
from refusal_jax.judges.judge import Judge, Outcome
from refusal_jax.monitor.traces import Judged, Trace
from refusal_jax.monitor.trail.settings import TextKey, TrailSettings, sha256

FORMAT = "refusal-jax-trail/1"
FILE, REPLY, GATE, ALERT, REMOVED = "file", "reply", "gate", "alert", "removed"  # kinds of records
START = "0" * 64  # the `previous` of a trail's first record
CHAIN = ("seq", "previous")  # fields that only the trail itself writes

Marker = Callable[[str | None], dict[str, str] | None]


def line_of(record: Mapping[str, Any]) -> bytes:
    """Returns a record as its line, without the newline."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def hash_of(line: bytes) -> str:
    """Returns the hash of a record's line, without its newline."""
    return hashlib.sha256(line).hexdigest()


def utc(seconds: float) -> str | None:
    """Returns a time in seconds since 1970 as text in UTC, None for one that no calendar has."""
    try:
        moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    except (OverflowError, ValueError, OSError):
        return None
    return f"{moment.replace(tzinfo=None).isoformat(timespec='microseconds')}Z"


def marker(settings: TrailSettings) -> Marker:
    """Returns the function that makes of a text what a record holds of it. Raises UserError if the secret key is missing."""
    if settings.texts == "keep":
        return lambda text: None if text is None else {"text": text}
    if settings.texts == "hmac":
        key = TextKey.read(settings.text_key_env, settings.text_key_file)
        return lambda text: None if text is None else {"hmac": key.mark(text), "key": key.id}
    return lambda text: None if text is None else {"sha256": sha256(text)}


def judge_of(judge: Judge) -> dict[str, str | None]:
    """Returns what a record says of its judge: its name, the fingerprint of its files, and the version of its rules."""
    return {"name": judge.name, "fingerprint": judge.fingerprint() or None, "version": refusal_jax.__version__}


def reply_record(
    trace: Trace, outcome: Outcome | None, label: int | None, probability: float | None, mark: Marker, judge: Mapping
) -> dict:
    """Returns the content of the record of one request and its reply.

    label, probability: of the verdict, None if there is none. mark: makes of a text what is recorded.
    """
    return {
        "kind": REPLY,
        "id": trace.id,
        "time": utc(trace.time),
        "model": trace.model,
        "category": trace.category,
        "system": mark(trace.system),
        "prompt": mark(trace.prompt),
        "reply": mark(trace.response),
        "finish_reason": trace.finish_reason,
        "fault": trace.fault,
        "outcome": outcome,
        "label": label,
        "probability": None if probability is None else f"{probability:.6f}",
        "judge": judge,
        "source": {"file": pathlib.PurePath(trace.place.file).name, "line": trace.place.line},
    }


def judged_record(one: Judged, mark: Marker, judge: Mapping) -> dict:
    """Returns the content of the record of a judged trace."""
    return reply_record(one.trace, one.outcome, one.verdict.label, one.verdict.probability, mark, judge)


def unjudged_record(trace: Trace, mark: Marker) -> dict:
    """Returns the content of the record of a trace that has no verdict."""
    return reply_record(trace, None, None, None, mark, {})


def checked(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the content of a record of another room. Raises UserError if it has a field that the trail writes itself."""
    taken = [name for name in CHAIN if name in content]
    if taken:
        raise UserError(
            f"A record has the fields {', '.join(taken)}, which the trail itself writes. Name them otherwise."
        )
    return content

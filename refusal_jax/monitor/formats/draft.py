"""Drafts of traces: what one line of a log tells, which may be all of a trace or a part of it."""

import dataclasses
import datetime
import math
from collections.abc import Mapping
from typing import Any

from refusal_jax.chat import thoughts
from refusal_jax.monitor.traces import Place, Trace, Unjudged

EARLIEST, LATEST = 946684800.0, 4102444800.0  # 2000 and 2100: a number outside is no time
UNITS = ((1e17, 1e9), (1e14, 1e6), (1e11, 1e3))  # from what size on a number counts nano-, micro- or milliseconds
MASKS = ("redacted-by-litellm", "[redacted]", "<redacted>", "redacted")  # whole texts that stand for one left out
HALVES = "otel:"  # keys of traces of which one line may have the model, and another the reply, in any order
CUT_MARKS = ("(litellm_truncated ", "...<truncated>")


class Malformed(ValueError):
    """A line cannot be read; the message says why, as a clause."""


@dataclasses.dataclass(slots=True)
class Draft:
    """Holds what one line tells of a trace.

    key: joins the lines of one trace; "" where the line tells all. ended: whether nothing more is to come. id, model: "" where
    the line has none. reply: the text so far, None where there is none. tools: whether the reply calls tools. thought: whether
    there was a thought apart from the reply. index: which of several replies to one request. labels: where a field that names the
    category is looked up.
    """

    key: str = ""
    ended: bool = True
    id: str = ""
    time: float | None = None
    model: str = ""
    category: str | None = None
    system: str | None = None
    prompt: str = ""
    reply: str | None = None
    finish_reason: str | None = None
    fault: Unjudged | None = None
    tools: bool = False
    thought: bool = False
    index: int = 0
    labels: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns what must be kept of it until its other lines come, as a JSON object."""
        kept = {field: getattr(self, field) for field in KEPT}
        return {name: value for name, value in kept.items() if value not in (None, "", False, 0)}

    @classmethod
    def of_dict(cls, kept: Mapping[str, Any]) -> "Draft":
        """Returns the draft of which `to_dict` kept this."""
        fault = kept.get("fault")
        return cls(**{**kept, "ended": False, "fault": Unjudged(fault) if fault else None})

    def joined(self, later: "Draft") -> "Draft":
        """Returns this draft with what a later line of the same trace tells: its reply continues this one's."""
        reply = self.reply if later.reply is None else (self.reply or "") + later.reply
        fault, model = later.fault or self.fault, self.model or later.model
        if reply and fault is Unjudged.NO_TEXT:
            fault = None
        return Draft(
            key=self.key,
            ended=later.ended or bool(self.key.startswith(HALVES) and reply is not None and model),
            id=self.id or later.id,
            time=self.time if later.time is None else later.time if self.time is None else min(self.time, later.time),
            model=model,
            category=later.category if self.category is None else self.category,
            system=later.system if self.system is None else self.system,
            prompt=later.prompt or self.prompt,
            reply=reply,
            finish_reason=later.finish_reason or self.finish_reason,
            fault=fault,
            tools=self.tools or later.tools,
            thought=self.thought or later.thought,
            index=self.index or later.index,
        )

    def trace(self, place: Place, time: float, model: str) -> Trace:
        """Returns the trace. time: of one whose log tells none. model: the name of one whose log does not tell it."""
        reply, fault = self.judgeable()
        return Trace(
            id=printable(f"{self.id}#{self.index}" if self.id and self.index else self.id),
            time=time if self.time is None else self.time,
            model=printable(self.model) or model,
            category=printable(self.category or ""),
            system=None if self.system is None else printable(self.system),
            prompt="" if is_mask(self.prompt) else printable(self.prompt),
            response=None if reply is None else printable(reply),
            finish_reason=self.finish_reason,
            place=place,
            fault=fault,
        )

    def judgeable(self) -> tuple[str | None, Unjudged | None]:
        """Returns the reply without its thought and None, or None and why there is nothing to judge."""
        reply = self.reply
        if reply and is_mask(reply):
            return None, Unjudged.NO_TEXT
        if reply and any(mark in reply for mark in CUT_MARKS):
            return None, Unjudged.CUT
        if self.fault is Unjudged.CUT or (self.fault and not reply):
            return None, self.fault
        if not reply:
            if self.tools:
                return None, Unjudged.TOOL_CALL
            if self.finish_reason == "content_filter":
                return None, Unjudged.FILTERED
            if self.thought and self.finish_reason != "stop":
                return None, Unjudged.THOUGHT
            return (None, Unjudged.NO_REPLY) if reply is None else (reply, None)
        if not self.ended and not self.finish_reason:
            return None, Unjudged.CUT
        parts = thoughts.split(reply) if MAY_THINK(reply) else None
        if parts is None:
            return reply, None
        return (parts.text, None) if parts.finished else (None, Unjudged.THOUGHT)


KEPT = tuple(field.name for field in dataclasses.fields(Draft) if field.name not in ("ended", "labels"))
MAY_THINK = thoughts.ANY.search


def is_mask(text: str) -> bool:
    """Returns whether a text only stands for one that the log leaves out."""
    return len(text) < 40 and text.strip().lower() in MASKS


def printable(text: str) -> str:
    """Returns a text that UTF-8 can hold: half characters, which JSON can spell, become question marks."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def seconds(value: Any) -> float | None:
    """Returns a time of a log in seconds since 1970, None where it is none.

    value: a number of seconds, or of milli-, micro- or nanoseconds, which its size tells; the same as text; or a date and time of
    ISO 8601, in UTC where it names no zone.
    """
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            try:
                moment = datetime.datetime.fromisoformat(value.strip())
            except ValueError:
                return None
            return moment.replace(tzinfo=moment.tzinfo or datetime.UTC).timestamp()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    scale = next((scale for size, scale in UNITS if abs(value) >= size), 1.0)
    found = value / scale
    return found if EARLIEST <= found <= LATEST else None


def first_time(record: Mapping[str, Any], *names: str) -> float | None:
    """Returns the first of the named fields that is a time."""
    return next((found for name in names if (found := seconds(record.get(name))) is not None), None)


def first_text(record: Mapping[str, Any], *names: str) -> str:
    """Returns the first of the named fields that is a text or a number and not empty, as text; "" if none is."""
    for name in names:
        value = record.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
            return str(value)
    return ""


def looked_up(record: Any, path: str) -> str | None:
    """Returns the text at a dotted path of nested mappings, of which any name may have dots itself; None if there is none."""
    if not isinstance(record, Mapping):
        return None
    if path in record:
        value = record[path]
        if isinstance(value, str | int | float):
            return str(value)
        return str(value[0]) if isinstance(value, list) and value and isinstance(value[0], str | int) else None
    for at, char in enumerate(path):
        if char == "." and path[:at] in record:
            found = looked_up(record[path[:at]], path[at + 1 :])
            if found is not None:
                return found
    return None

"""Reads one line of a log, in whichever format it is, as drafts of traces."""

import json
from collections.abc import Mapping
from typing import Any

from refusal_jax.monitor.formats import vllm
from refusal_jax.monitor.formats.draft import Draft, Malformed, first_time, looked_up
from refusal_jax.monitor.formats.openai import TIMES, read_record
from refusal_jax.monitor.formats.otel import is_export, read_export

MESSAGES = ("message", "msg", "log", "event")  # where structured logs keep a line of text


def read_line(line: str, category_field: str = "") -> list[Draft]:
    """Returns the drafts that a line holds, none for a line that is about something else.

    category_field: the dotted name of the field that names the category, "" for none. Raises Malformed if the line can be read
    in no format.
    """
    drafts = _drafts(line)
    for draft in drafts:
        if category_field and draft.labels is not None:
            draft.category = looked_up(draft.labels, category_field)
        draft.labels = None
    return drafts


def _drafts(line: str) -> list[Draft]:
    if line[:1] not in "{[" or line.startswith("[logger"):
        found = vllm.read_text(line)
        if found is None:
            raise Malformed("it is neither JSON nor a line of vLLM's log")
        return found
    try:
        record = json.loads(line)
    except RecursionError:
        raise Malformed("its JSON is nested too deeply") from None
    except ValueError as error:
        raise Malformed(f"it is no JSON: {error}") from None
    drafts = []
    for one in record if isinstance(record, list) else [record]:
        drafts += _of_record(one)
    return drafts


def _of_record(record: Any) -> list[Draft]:
    if not isinstance(record, Mapping):
        raise Malformed(f"it is JSON of a {type(record).__name__}, expected an object")
    try:
        if is_export(record):
            return read_export(record)
        for name in MESSAGES:
            text = record.get(name)
            if isinstance(text, str) and (any(mark in text for mark in vllm.MARKS) or _is_log(record)):
                return vllm.read_text(text, first_time(record, *TIMES)) or []
        return read_record(record)
    except RecursionError:
        raise Malformed("its content is nested too deeply") from None
    except (AttributeError, KeyError, TypeError, IndexError, OverflowError) as error:
        raise Malformed(
            f"its fields are not of the kinds that any format has ({type(error).__name__}: {error})"
        ) from None


def _is_log(record: Mapping[str, Any]) -> bool:
    """Returns whether a record is a line of a program's own log, which has a level and no request."""
    return ("level" in record or "levelname" in record or "severity" in record) and not any(
        name in record for name in ("input", "request", "messages", "prompt", "response", "output")
    )

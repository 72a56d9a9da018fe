"""Reads records of a request and its reply: those of the OpenAI API, of its batches and streams, of LiteLLM, and of tools that
log alike."""

from collections.abc import Mapping
from typing import Any

from refusal_jax.monitor.formats.draft import Draft, Malformed, first_text, first_time
from refusal_jax.monitor.formats.messages import (
    add_event,
    add_message,
    add_reply,
    events_of,
    is_piece,
    parsed,
    request_of,
)
from refusal_jax.monitor.traces import Unjudged

REQUESTS = (
    "request",
    "request_body",
    "req",
    "request_payload",
    "kwargs",
    "body",
    "input",
    "inputs",
    "messages",
    "prompt",
)
REPLIES = (
    "response",
    "response_body",
    "res",
    "response_payload",
    "chunks",
    "events",
    "reply",
    "completion",
    "completions",
    "output",
    "outputs",
    "result",
    "message",
    "generated_text",
    "output_text",
)
TIMES = (
    "timestamp",
    "time",
    "ts",
    "start_time",
    "startTime",
    "created_at",
    "createdAt",
    "created",
    "datetime",
    "date",
    "@timestamp",
)
IDS = ("id", "request_id", "requestId", "trace_id", "traceId", "call_id", "uuid", "custom_id")
MODELS = ("model", "model_name", "deployment", "engine")
CHATS = ("completion", "responses", "message", "generate_content", "chat")  # in names of calls that answer a user
OTHER_KINDS = (
    "SPAN",
    "EVENT",
    "AGENT",
    "TOOL",
    "CHAIN",
    "RETRIEVER",
    "EMBEDDING",
    "GUARDRAIL",
    "EVALUATOR",
)  # of Langfuse


def read_record(record: Mapping[str, Any]) -> list[Draft]:
    """Returns the drafts of a record, none for one of another kind of call. Raises Malformed for a record that is none of a
    request or reply."""
    nested = (
        (record.get("kwargs") or {}).get("standard_logging_object")
        if isinstance(record.get("kwargs"), Mapping)
        else None
    )
    record = nested or record.get("standard_logging_object") or record
    if not isinstance(record, Mapping):
        raise Malformed("standard_logging_object is no mapping")
    if is_piece(record):
        return _piece(record)
    if "call_type" in record:
        return _litellm(record)
    if "custom_id" in record and ("body" in record or "response" in record):
        return _batch(record)
    if record.get("type") in OTHER_KINDS:
        return []
    return _pair(record)


def _named(record: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((record[name] for name in names if record.get(name) not in (None, "", [], {})), None)


def _pair(record: Mapping[str, Any]) -> list[Draft]:
    """Returns the drafts of a record with a request and a reply, under any of their usual names."""
    asked, answered = parsed(_named(record, REQUESTS)), parsed(_named(record, REPLIES))
    if isinstance(answered, str) and (events := events_of(answered)) is not None:
        answered = events
    if answered is asked:  # the only text, such as `input` without an output
        answered = None
    if answered is None and "choices" in record:
        answered = record
    if isinstance(asked, Mapping) and "choices" in asked:  # `body` of a reply
        asked, answered = None, asked if answered is None else answered
    has_reply_field = any(name in record for name in (*REPLIES, "choices"))
    error = record.get("error") or record.get("exception") or record.get("error_str")
    if asked is None and answered is None and not error and not has_reply_field:
        raise Malformed(f"there is neither a request nor a reply under any usual name: it has {_names(record)}")
    request = request_of(asked)
    template = Draft(
        id=first_text(record, *IDS) or _inner(answered, "id"),
        time=first_time(record, *TIMES) or _inner_time(answered),
        model=_inner(answered, "model") or first_text(record, *MODELS) or _inner(asked, "model"),
        system=request.system,
        prompt=request.prompt,
        labels=record,
    )
    drafts: dict[int, Draft] = {}
    if answered is not None:
        add_reply(drafts, template, answered)
    elif request.last is not None and not has_reply_field:
        draft = drafts.setdefault(0, template)
        add_message(draft, request.last)
    return _finished(drafts, template, bool(error) or record.get("level") == "ERROR" or _refused_status(answered))


def _finished(drafts: dict[int, Draft], template: Draft, failed: bool) -> list[Draft]:
    """Returns the drafts in their order; where there is no reply at all, one that says so."""
    found = [drafts[index] for index in sorted(drafts)] or [template]
    for draft in found:
        if failed and not draft.reply:
            draft.fault = draft.fault or Unjudged.ERROR
    return found


def _refused_status(answered: Any) -> bool:
    status = answered.get("status_code") if isinstance(answered, Mapping) else None
    return isinstance(status, int) and status >= 400


def _names(record: Mapping[str, Any]) -> str:
    return ", ".join(sorted(str(name)[:40] for name in list(record)[:8])) or "no fields"


def _inner(value: Any, name: str) -> str:
    """Returns a field of a request or reply, or of its body."""
    if isinstance(value, list) and value:
        return _inner(value[0], name) or _inner(value[-1], name)
    if not isinstance(value, Mapping):
        return ""
    body = parsed(value.get("body") or value.get("response"))
    return first_text(value, name) or (first_text(body, name) if isinstance(body, Mapping) else "")


def _inner_time(value: Any) -> float | None:
    found = next((text for name in ("created", "created_at") if (text := _inner(value, name))), "")
    return first_time({"time": found}, "time")


def _piece(event: Mapping[str, Any]) -> list[Draft]:
    """Returns what a line with one event of a stream tells; the lines of a stream have one id."""
    identity = _inner(event.get("response"), "id") or first_text(event, "id", "item_id", "response_id")
    if not identity:
        raise Malformed("it is an event of a stream without an id, which would say what it belongs to")
    template = Draft(
        key=f"stream:{identity}",
        ended=False,
        id=identity,
        time=first_time(event, "created", "created_at"),
        model=first_text(event, "model"),
        labels=event,
    )
    drafts: dict[int, Draft] = {}
    add_event(drafts, template, event)
    for draft in drafts.values():
        draft.key = f"stream:{identity}#{draft.index}"
        draft.ended = draft.finish_reason is not None
    return list(drafts.values())


def _batch(record: Mapping[str, Any]) -> list[Draft]:
    """Returns what a line of a batch's input or output tells, which have the id that the user gave."""
    custom = str(record["custom_id"])
    response, body = record.get("response"), parsed(record.get("body"))
    if isinstance(body, Mapping) and response is None:
        request = request_of(body)
        return [
            Draft(
                f"batch:{custom}", False, model=first_text(body, "model"), system=request.system, prompt=request.prompt
            )
        ]
    body = parsed(response.get("body")) if isinstance(response, Mapping) else None
    template = Draft(
        id=first_text(record, "id") or custom,
        time=_inner_time(body),
        model=_inner(body, "model"),
        labels=record,
    )
    drafts: dict[int, Draft] = {}
    if body is not None:
        add_reply(drafts, template, body)
    found = _finished(drafts, template, bool(record.get("error")) or _refused_status(response))
    found[0].key = f"batch:{custom}"  # its request may have been read before
    return found


def _litellm(record: Mapping[str, Any]) -> list[Draft]:
    """Returns the drafts of a LiteLLM payload: what it logs of each call, or a row of its spend logs."""
    if not any(word in str(record["call_type"]).lower() for word in CHATS):
        return []
    request = (
        request_of(record.get("messages")) if record.get("messages") else request_of(record.get("proxy_server_request"))
    )
    template = Draft(
        id=first_text(record, "id", "request_id", "litellm_call_id"),
        time=first_time(record, "startTime", "start_time", "endTime"),
        model=first_text(record, "model", "model_group"),
        system=request.system,
        prompt=request.prompt,
        labels=record,
    )
    drafts: dict[int, Draft] = {}
    if record.get("response"):
        add_reply(drafts, template, record["response"])
    failed = record.get("status") == "failure" or bool(record.get("error_str"))
    found = _finished(drafts, template, failed)
    fields = record.get("status_fields")
    guarded = isinstance(fields, Mapping) and fields.get("guardrail_status") in ("guardrail_intervened", "blocked")
    for draft in found:
        if guarded and failed:
            draft.reply, draft.fault = None, Unjudged.FILTERED
        elif not failed and draft.reply is None and not draft.tools and draft.fault is None:
            draft.fault = Unjudged.NO_TEXT if "response" not in record or record["response"] in ({}, "{}", "") else None
    return found

"""Reads spans and events of OpenTelemetry with the GenAI conventions, in OTLP's JSON or as SDKs print them: the attributes of
today, the events of before, and those of OpenLLMetry, OpenInference and the Vercel AI SDK."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from refusal_jax.monitor.formats.draft import Draft, first_text, first_time
from refusal_jax.monitor.formats.messages import add_message, ending, parsed, request_of, text_of
from refusal_jax.monitor.traces import Unjudged

CHATS = ("chat", "text_completion", "completion", "generate_content", "responses")
INDEXED = re.compile(r"(gen_ai\.prompt|gen_ai\.completion|llm\.input_messages|llm\.output_messages)\.(\d+)\.(.+)")
ASKED, ANSWERED = ("gen_ai.prompt", "llm.input_messages"), ("gen_ai.completion", "llm.output_messages")
DETAILS = "gen_ai.client.inference.operation.details"
MODELS = ("gen_ai.response.model", "gen_ai.request.model", "llm.model_name", "ai.model.id")
ROLES = {"gen_ai.system.message": "system", "gen_ai.user.message": "user", "gen_ai.assistant.message": "assistant"}
PREFIXES = ("gen_ai.", "llm.", "ai.", "openinference.")


def is_export(record: Mapping[str, Any]) -> bool:
    """Returns whether a record is one of OTLP, or a span as an SDK prints it."""
    return any(name in record for name in ("resourceSpans", "resource_spans", "resourceLogs", "resource_logs")) or (
        isinstance(record.get("attributes"), Mapping) and isinstance(record.get("context"), Mapping)
    )


def read_export(record: Mapping[str, Any]) -> list[Draft]:
    """Returns the drafts of a record's spans and events; those that call no model make none."""
    drafts: list[Draft] = []
    for span in _items(record, ("resourceSpans", "resource_spans"), ("scopeSpans", "scope_spans"), ("spans",)):
        drafts += _of_span(span)
    for entry in _items(
        record, ("resourceLogs", "resource_logs"), ("scopeLogs", "scope_logs"), ("logRecords", "log_records")
    ):
        drafts += _of_event(entry)
    if "context" in record:
        drafts += _of_span({**record, **record["context"]})
    return drafts


def _items(record: Mapping[str, Any], *levels: tuple[str, ...]) -> Iterator[Mapping[str, Any]]:
    """Yields the mappings at the end of nested lists, of which each has one of two spellings."""
    for name in levels[0]:
        for one in record.get(name) or ():
            if not isinstance(one, Mapping):
                continue
            if levels[1:]:
                yield from _items(one, *levels[1:])
            else:
                yield one


def plain(value: Any) -> Any:
    """Returns the value that OTLP's JSON wraps in its type; others as they are."""
    if isinstance(value, Mapping):
        for name in ("stringValue", "string_value", "boolValue", "bool_value", "doubleValue", "double_value"):
            if name in value:
                return value[name]
        for name in ("intValue", "int_value"):
            if name in value:
                return int(value[name])
        for name in ("arrayValue", "array_value"):
            if name in value:
                return [plain(one) for one in (value[name] or {}).get("values", [])]
        for name in ("kvlistValue", "kvlist_value"):
            if name in value:
                return attributes_of((value[name] or {}).get("values"))
    return value


def attributes_of(listed: Any) -> dict[str, Any]:
    """Returns attributes as a dictionary, from OTLP's list of keys and values or from one that is a mapping already."""
    if isinstance(listed, Mapping):
        return dict(listed)
    return {
        str(one["key"]): plain(one.get("value")) for one in listed or () if isinstance(one, Mapping) and "key" in one
    }


def _identity(span: Mapping[str, Any]) -> str:
    trace, own = first_text(span, "traceId", "trace_id"), first_text(span, "spanId", "span_id")
    return f"{trace}:{own}" if own else ""


def _calls_model(attributes: Mapping[str, Any]) -> bool:
    """Returns whether a span is one call of a model that answers a user, rather than an agent's or a tool's, which repeat the
    texts of the calls in them."""
    if not any(name.startswith(PREFIXES) for name in attributes):
        return False
    kind = first_text(attributes, "openinference.span.kind", "traceloop.span.kind").lower()
    if kind and kind != "llm":
        return False
    operation = first_text(attributes, "ai.operationId")
    if operation:
        return operation.endswith((".doGenerate", ".doStream"))
    named = first_text(attributes, "gen_ai.operation.name", "llm.request.type").lower()
    return named in CHATS if named else True


def _of_span(span: Mapping[str, Any]) -> list[Draft]:
    attributes = attributes_of(span.get("attributes"))
    if not _calls_model(attributes):
        return []
    identity = _identity(span)
    template = Draft(
        key=f"otel:{identity}",
        id=first_text(attributes, "gen_ai.response.id") or identity,
        time=first_time(span, "startTimeUnixNano", "start_time_unix_nano", "start_time", "endTimeUnixNano", "end_time"),
        model=first_text(attributes, *MODELS),
        labels=attributes,
    )
    texts = dict(attributes)
    history, choices = [], []
    for event in span.get("events") or ():
        if isinstance(event, Mapping):
            _take_event(
                str(event.get("name", "")), attributes_of(event.get("attributes")), None, texts, history, choices
            )
    drafts = _drafts(template, texts, history, choices)
    status = span.get("status")
    code = status.get("code", status.get("status_code")) if isinstance(status, Mapping) else None
    if code in (2, "STATUS_CODE_ERROR", "ERROR") or attributes.get("error.type"):
        for draft in drafts:
            draft.fault = draft.fault if draft.reply else Unjudged.ERROR
    if all(draft.fault is Unjudged.NO_TEXT for draft in drafts):
        drafts[0].ended = not identity  # events beside the span may have the texts
    return drafts


def _of_event(entry: Mapping[str, Any]) -> list[Draft]:
    """Returns what an event that was exported as a log record tells; it has the texts and its span has the model."""
    attributes = attributes_of(entry.get("attributes"))
    name = first_text(entry, "eventName", "event_name") or first_text(attributes, "event.name")
    body = plain(entry.get("body"))
    identity = _identity(entry)
    texts, history, choices = dict(attributes), [], []
    _take_event(name, attributes, body, texts, history, choices)
    if name != DETAILS and not history and not choices:
        return []
    template = Draft(
        key=f"otel:{identity}",
        id=first_text(attributes, "gen_ai.response.id") or identity,
        time=first_time(entry, "timeUnixNano", "time_unix_nano", "observedTimeUnixNano", "timestamp"),
        model=first_text(attributes, *MODELS),
        labels=attributes,
    )
    drafts = _drafts(template, texts, history, choices)
    for draft in drafts:
        draft.fault = None if draft.fault is Unjudged.NO_TEXT else draft.fault
        draft.ended = bool(draft.reply is not None and draft.model) or not identity
    return drafts


def _take_event(name: str, attributes: dict, body: Any, texts: dict, history: list, choices: list) -> None:
    """Adds what an event tells: to the texts that attributes hold, to the messages before the reply, or to the replies."""
    content = parsed(attributes.get("gen_ai.event.content")) if body is None else parsed(body)
    fields = {**attributes, **content} if isinstance(content, Mapping) else attributes
    if name in (DETAILS, "gen_ai.content.prompt", "gen_ai.content.completion"):
        texts.update(fields)
    elif name in ROLES:
        history.append({"role": ROLES[name], "content": parsed(fields.get("content"))})
    elif name == "gen_ai.choice":
        message = parsed(fields.get("message"))
        choices.append(
            {
                "finish_reason": fields.get("finish_reason"),
                "message": message if isinstance(message, Mapping) else fields,
            }
        )


def _indexed(attributes: Mapping[str, Any]) -> dict[str, list[dict]]:
    """Returns the messages that are spread over numbered attributes, by the attributes' first part."""
    found: dict[str, dict[int, dict]] = {}
    for name, value in attributes.items():
        if match := INDEXED.fullmatch(name):
            message = found.setdefault(match[1], {}).setdefault(int(match[2]), {})
            message[match[3].removeprefix("message.")] = value
    return {prefix: [dict(m) for _, m in sorted(messages.items())] for prefix, messages in found.items()}


def _spread(message: dict) -> dict:
    """Returns a numbered message with its content parsed and its numbered tool calls and contents gathered."""
    names = sorted(message)
    if any(name.startswith(("tool_calls.", "function_call.")) for name in names):
        message["tool_calls"] = True
    pieces = [message[n] for n in names if re.fullmatch(r"contents\.\d+\.message_content\.text", n)]
    if pieces and not message.get("content"):
        message["content"] = "\n".join(map(str, pieces))
    message["content"] = parsed(message.get("content"))
    return message


def _drafts(template: Draft, texts: Mapping[str, Any], history: list[dict], choices: list[dict]) -> list[Draft]:
    """Returns a draft for each reply that attributes and events hold, one without a reply if they hold none."""
    numbered = _indexed(texts)
    asked = _first(texts, "gen_ai.input.messages", "gen_ai.prompt", "ai.prompt.messages", "ai.prompt")
    asked = asked or next(([_spread(m) for m in numbered[n]] for n in ASKED if n in numbered), None) or history
    request = request_of(asked) if not _is_cut(asked) else request_of(None)
    system = text_of(parsed(texts.get("gen_ai.system_instructions")))
    template = dataclasses.replace(template, system=system or request.system, prompt=request.prompt)
    answered = _first(texts, "gen_ai.output.messages", "gen_ai.completion", "ai.response.text")
    answered = answered or next(([_spread(m) for m in numbered[n]] for n in ANSWERED if n in numbered), None) or choices
    if _is_cut(answered) or any(_is_cut(one.get("content")) for one in answered if isinstance(one, dict)):
        return [dataclasses.replace(template, fault=Unjudged.CUT)]
    reasons = plain(parsed(texts.get("gen_ai.response.finish_reasons") or texts.get("ai.response.finishReason")))
    reasons = reasons if isinstance(reasons, list) else [reasons]
    drafts = []
    for index, one in enumerate(answered if isinstance(answered, list) else [answered] if answered else []):
        draft = dataclasses.replace(template, index=index)
        message = one if isinstance(one, Mapping) else {"content": one}
        inner = message.get("message")
        add_message(draft, inner if isinstance(inner, Mapping) else message)
        draft.finish_reason = ending(message) or (str(reasons[min(index, len(reasons) - 1)]) if reasons[0] else None)
        drafts.append(draft)
    tools = "ai.response.toolCalls" in texts
    if not drafts:
        return [dataclasses.replace(template, tools=tools, fault=None if tools else Unjudged.NO_TEXT)]
    return drafts


def _first(texts: Mapping[str, Any], *names: str) -> Any:
    return next((parsed(texts[name]) for name in names if texts.get(name)), None)


def _is_cut(value: Any) -> bool:
    """Returns whether a text is JSON that was cut: exporters limit the length of attributes."""
    return isinstance(value, str) and value.startswith(('[{"', '[ {"', '{"role"', '{"type"', '{"messages"'))

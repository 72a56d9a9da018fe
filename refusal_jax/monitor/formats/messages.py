"""Texts of chat messages, requests and replies, in the shapes of the OpenAI API and of those that follow it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from refusal_jax.monitor.formats.draft import Draft
from refusal_jax.monitor.traces import Unjudged

SYSTEMS = ("system", "developer")
USERS = ("user", "human")
MODELS = ("assistant", "model", "ai")
THOUGHTS = ("thinking", "reasoning", "redacted_thinking", "thought")  # types of parts
TOOLS = ("tool_call", "tool_use", "function_call", "tool-call")
STATES = ("completed", "incomplete", "failed", "cancelled")  # of the Responses API
ENDS = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "STOP": "stop", "completed": "stop"}


def parsed(value: Any) -> Any:
    """Returns what a text holds if it is JSON of a list or mapping; any other value as it is."""
    if isinstance(value, str) and value[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def is_messages(value: Any) -> bool:
    """Returns whether a value is a list of chat messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) and "role" in m for m in value)


def text_of(content: Any) -> str | None:
    """Returns the text of a message's content: a text, a part, or a list of them; None where no part of it is text. Thoughts,
    pictures and calls of tools are left out."""
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        if content.get("type") in THOUGHTS or content.get("type") in TOOLS:
            return None
        for name in ("text", "content", "refusal", "value"):
            found = content.get(name)
            if isinstance(found, str):
                return found
            if isinstance(found, Mapping | list):
                return text_of(found)
        return None
    if isinstance(content, Sequence):
        texts = [text for part in content if (text := text_of(part)) is not None]
        return "\n".join(texts) if texts else None
    return None


def content_of(message: Mapping[str, Any]) -> Any:
    """Returns the content of a message, which is called `parts` in OpenTelemetry."""
    return message.get("parts") if message.get("content") is None else message["content"]


def spoken(message: Mapping[str, Any]) -> str | None:
    """Returns what a message says: its content, or the refusal that the API keeps in a field of its own."""
    text = text_of(content_of(message))
    if not text and isinstance(message.get("refusal"), str):
        return message["refusal"]
    return text


def is_kind(message: Mapping[str, Any], kinds: Sequence[str], *names: str) -> bool:
    """Returns whether a message has one of the named fields, or parts of one of the kinds."""
    content = content_of(message)
    parts = content if isinstance(content, list) else []
    return any(message.get(name) for name in names) or any(
        isinstance(part, Mapping) and str(part.get("type")) in kinds for part in parts
    )


class Request(NamedTuple):
    """Holds what was asked. reply: where the messages end with one of the model, what that says."""

    system: str | None = None
    prompt: str = ""
    last: Mapping[str, Any] | None = None


def request_of(value: Any) -> Request:
    """Returns what is asked in messages, in a text, or in the body of a request.

    A conversation's request is its last message of the user; `last` is a message of the model that follows it.
    """
    value = parsed(value)
    if isinstance(value, str):
        return Request(prompt=value)
    if is_messages(value):
        return _of_messages(value)
    if isinstance(value, list):
        texts = [part for part in value if isinstance(part, str)]
        return Request(prompt="\n".join(texts) if texts else text_of(value) or "")
    if not isinstance(value, Mapping):
        return Request()
    body = parsed(value.get("body"))
    for holder in (value, body) if isinstance(body, Mapping) else (value,):
        for name in ("messages", "input", "prompt", "inputs", "contents"):
            if holder.get(name):
                found = request_of(holder[name])
                system = text_of(holder.get("instructions") or holder.get("system"))
                return found if system is None or found.system is not None else found._replace(system=system)
    return _of_messages([value]) if "role" in value else Request()


def _of_messages(messages: Sequence[Mapping[str, Any]]) -> Request:
    system = [text for m in messages if m.get("role") in SYSTEMS and (text := text_of(content_of(m))) is not None]
    prompt = ""
    for message in reversed(messages):
        if message.get("role") in USERS and (text := text_of(content_of(message))):
            prompt = text
            break
    last = messages[-1] if messages[-1].get("role") in MODELS else None
    return Request("\n".join(system) if system else None, prompt, last)


def add_message(draft: Draft, message: Mapping[str, Any]) -> None:
    """Adds what a message of the model, or a piece of it in a stream, says."""
    text = spoken(message)
    if text is not None:
        draft.reply = (draft.reply or "") + text
    draft.tools = draft.tools or is_kind(message, TOOLS, "tool_calls", "function_call")
    draft.thought = draft.thought or is_kind(message, THOUGHTS, "reasoning_content", "reasoning", "thinking")


def is_stream(value: Any) -> bool:
    """Returns whether a value is the list of a stream's events."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and is_piece(value[0])


def is_piece(event: Mapping[str, Any]) -> bool:
    """Returns whether a mapping is one event of a stream."""
    if str(event.get("object", "")).endswith(".chunk") or str(event.get("type", "")).startswith("response."):
        return True
    choices = event.get("choices")
    return isinstance(choices, list) and any(isinstance(c, Mapping) and "delta" in c for c in choices)


def events_of(text: str) -> list[dict] | None:
    """Returns the events of a stream that was recorded as it was sent, lines of `data: {…}`; None for any other text."""
    if not text.lstrip().startswith(("data:", "event:")):
        return None
    found = []
    for line in text.splitlines():
        event = parsed(line[5:].strip()) if line.startswith("data:") else None
        if isinstance(event, Mapping):
            found.append(dict(event))
    return found


def add_reply(drafts: dict[int, Draft], template: Draft, value: Any) -> None:
    """Adds what a recorded reply says, in any of its shapes, to the drafts of the choices.

    drafts: by the number of the choice; those that are not there are copied from `template`.
    """

    def draft(index: Any = 0) -> Draft:
        number = index if isinstance(index, int) else 0
        return drafts.setdefault(number, dataclasses.replace(template, index=number))

    value = parsed(value)
    if isinstance(value, str):
        events = events_of(value)
        if events is None:
            draft().reply = (draft().reply or "") + value
        else:
            add_stream(drafts, template, events)
    elif is_stream(value):
        add_stream(drafts, template, value)
    elif isinstance(value, list):
        for one in value:
            if isinstance(one, Mapping):
                add_message(draft(), one)
            elif isinstance(one, str):
                draft().reply = (draft().reply or "") + one
    elif isinstance(value, Mapping):
        _add_body(drafts, draft, template, value)


def _add_body(drafts, draft, template: Draft, value: Mapping[str, Any]) -> None:
    error = value.get("error")
    if error and not value.get("choices") and not value.get("output"):
        code = error.get("code") or error.get("type") if isinstance(error, Mapping) else ""
        draft().fault = Unjudged.FILTERED if "content_filter" in str(code) else Unjudged.ERROR
    elif isinstance(value.get("choices"), list):
        for choice in value["choices"]:
            if isinstance(choice, Mapping):
                add_choice(draft(choice.get("index")), choice)
    elif str(value.get("type", "")).startswith("response.") and isinstance(value.get("response"), Mapping):
        add_reply(drafts, template, value["response"])  # the last event of a stream holds the whole response
    elif isinstance(value.get("output"), list):
        for item in value["output"]:
            if isinstance(item, Mapping):
                add_item(draft(), item)
        draft().finish_reason = ending(value)
    elif isinstance(value.get("body"), Mapping | str):
        add_reply(drafts, template, value["body"])
    else:
        message = next((v for n in ("message", "delta") if isinstance(v := value.get(n), Mapping)), value)
        text = next(
            (v for n in ("response", "output_text", "generated_text", "text") if isinstance(v := value.get(n), str)),
            None,
        )
        if text is not None and message is value:
            draft().reply = (draft().reply or "") + text
        else:
            add_message(draft(), message)
        draft().finish_reason = ending(value) or draft().finish_reason


def add_choice(draft: Draft, choice: Mapping[str, Any]) -> None:
    """Adds a choice of a chat completion, of a piece of its stream, or of a completion of text."""
    message = choice.get("message") or choice.get("delta")
    if isinstance(message, Mapping):
        add_message(draft, message)
    elif isinstance(choice.get("text"), str):
        draft.reply = (draft.reply or "") + choice["text"]
    draft.finish_reason = ending(choice) or draft.finish_reason


def add_item(draft: Draft, item: Mapping[str, Any]) -> None:
    """Adds an item of the output of the Responses API."""
    kind = item.get("type", "message")
    if kind == "message":
        add_message(draft, item)
    draft.tools = draft.tools or str(kind).endswith("_call")
    draft.thought = draft.thought or kind in THOUGHTS


def ending(value: Mapping[str, Any]) -> str | None:
    """Returns why a reply ended, in the words of the OpenAI API; None where it is not said."""
    for name in ("finish_reason", "stop_reason", "done_reason", "finishReason", "status"):
        found = value.get(name)
        if isinstance(found, str) and (name != "status" or found in STATES):
            return ENDS.get(found, found)
    return None


def add_stream(drafts: dict[int, Draft], template: Draft, events: Sequence[Any]) -> None:
    """Adds all events of a recorded stream. One that never came to its end is cut."""
    for event in events:
        if isinstance(event, Mapping):
            add_event(drafts, template, event)
    for draft in drafts.values():
        if draft.finish_reason is None and not draft.fault:
            draft.fault = Unjudged.CUT


def add_event(drafts: dict[int, Draft], template: Draft, event: Mapping[str, Any]) -> None:
    """Adds one event of a stream, of the chat API or of the Responses API. The latter's last event repeats the whole text, which
    then replaces the pieces."""
    kind = str(event.get("type", ""))
    if not kind.startswith("response."):
        add_reply(drafts, template, event)
        return
    draft = drafts.setdefault(0, dataclasses.replace(template))
    if kind in ("response.output_text.delta", "response.refusal.delta") and isinstance(event.get("delta"), str):
        draft.reply = (draft.reply or "") + event["delta"]
    elif kind.startswith("response.reasoning"):
        draft.thought = True
    elif kind in ("response.completed", "response.incomplete", "response.failed"):
        whole = dataclasses.replace(template)
        add_reply({0: whole}, template, event.get("response"))
        draft.reply = draft.reply if whole.reply is None else whole.reply
        draft.finish_reason, draft.tools = whole.finish_reason or "stop", draft.tools or whole.tools
        draft.fault = whole.fault or draft.fault

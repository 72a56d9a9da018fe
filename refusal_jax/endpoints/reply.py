"""From what a server sends to an answer: whole bodies, streams, and the ways in which servers write replies and thoughts."""

import json
from collections.abc import AsyncIterator
from typing import Any

from refusal_jax.chat import thoughts
from refusal_jax.endpoints.address import Address
from refusal_jax.endpoints.endpoint import Answer, Fault
from refusal_jax.endpoints.trouble import Trouble, of_status, shown

ENDED = ("stop", "eos", "eos_token", "end_turn", "stop_sequence", "end_of_text")
CUT = "length"
THOUGHTS = ("reasoning_content", "reasoning")  # vLLM, llama.cpp and DeepSeek; OpenRouter, Ollama and newer vLLM

# What is kept of a model in the list: its real folder and length (vLLM), its parent (adapters), size and parameters (llama.cpp).
ENTRY = ("root", "parent", "owned_by", "max_model_len", "meta", "context_length", "created")
MOST_ENTRIES = 40


def parsed(text: str, address: Address) -> Any:
    """Returns a body as JSON. Raises Trouble for one that is cut off, or is something else."""
    try:
        return json.loads(text)
    except ValueError:
        what = f"{shown(text[:80], address)!r}, {len(text)} characters" if text else "nothing"
        raise Trouble(Fault.UNREADABLE, f"the body is not whole JSON: {what}") from None


async def gathered(chunks: AsyncIterator[Any]) -> dict[str, Any]:
    """Returns the body that a stream of chunks amounts to. Raises Trouble for a stream that ends before it has said why."""
    texts: dict[str, list[str]] = {name: [] for name in ("content", "refusal", *THOUGHTS)}
    body: dict[str, Any] = {}
    calls, reason, last = {}, None, {}
    async for chunk in chunks:
        chunk = chunk.to_dict(warnings=False) if hasattr(chunk, "to_dict") else chunk
        if not isinstance(chunk, dict):
            raise Trouble(Fault.UNREADABLE, "the stream holds something else than JSON objects")
        body |= {name: chunk[name] for name in ("model", "system_fingerprint", "usage") if chunk.get(name)}
        for choice in _list(chunk.get("choices")):
            delta, reason = _dict(choice.get("delta")), choice.get("finish_reason") or reason
            last = choice if choice.get("error") else last
            for name, parts in texts.items():
                parts += [delta[name]] if isinstance(delta.get(name), str) else []
            for call in _list(delta.get("tool_calls")):
                name = _dict(call.get("function")).get("name")
                calls[call.get("index", len(calls))] = name or calls.get(call.get("index"))
    if reason is None:
        length = sum(map(len, texts["content"]))
        said = f"the stream ended without a finish_reason, after {length} characters of a reply"
        raise Trouble(Fault.UNREADABLE, f"{said} (if the server never gives one, then set stream to False)")
    message: dict[str, Any] = {name: "".join(parts) for name, parts in texts.items() if parts}
    message["tool_calls"] = [{"function": {"name": name}} for name in calls.values()]
    return body | {"choices": [last | {"message": message, "finish_reason": reason}]}


def answer(body: Any, address: Address, max_tokens: int) -> Answer:
    """Returns the answer that a body holds.

    max_tokens: the limit that was asked for. Raises Trouble for a body that is no reply, or none of the model's own, and
    UserError for what no later request could mend.
    """
    if not isinstance(body, dict):
        raise Trouble(Fault.UNREADABLE, f"the body is no JSON object: {shown(json.dumps(body), address)}")
    choice = next(iter(_list(body.get("choices"))), None)
    if choice is None:
        raise _without_choice(body, address)
    message, reason = _dict(choice.get("message")), choice.get("finish_reason")
    reason = reason if isinstance(reason, str) else None
    if reason == "error":
        raise of_status(_code(choice.get("error")), choice.get("error") or "finish_reason: error", address)
    content, declined = _text(message.get("content")), _text(message.get("refusal")) or _parts(message, "refusal")
    thought = next((_text(message[name]) for name in THOUGHTS if message.get(name)), "") or _parts(message, "thinking")
    if reason == "content_filter":
        raise Trouble(Fault.FILTERED, "a filter of the server withheld the reply or cut it", passing=False)
    calls = [str(_dict(call.get("function")).get("name")) for call in _list(message.get("tool_calls"))]
    if calls and not content.strip() and not declined:
        named = shown(", ".join(calls), address)
        raise Trouble(Fault.TOOL, f"the reply is a call of the tool {named} and no text", passing=False)
    reply = thoughts.split(address.reply_without_key(content))
    inner = address.reply_without_key(thought.strip())
    usage, model = _dict(body.get("usage")), body.get("model")
    tokens, length = _count(usage.get("completion_tokens")), _count(usage.get("prompt_tokens"))
    if reason == CUT and tokens is not None and tokens < max_tokens and not (content.strip() or inner or declined):
        said = f"the server had no room for a reply: it ended for its length after {tokens} of {max_tokens} tokens"
        raise Trouble(Fault.REJECTED, said, passing=False)
    return Answer(
        text=reply.text or address.reply_without_key(declined.strip()),
        ended=reason in ENDED and tokens != max_tokens,  # some gateways call every end a stop
        finish_reason=reason,
        tokens=tokens,
        prompt_tokens=length,
        model=shown(model, address) if isinstance(model, str) and model else None,
        thought="\n".join(part for part in (inner, reply.thought) if part),
        thought_ended=reply.finished and not (inner and not reply.text and not declined),
        declined=bool(declined.strip()) and not reply.text,
    )


def fingerprint(body: Any, address: Address) -> str | None:
    """Returns the server's mark of its configuration in a body, None if it gives none."""
    mark = body.get("system_fingerprint")
    return shown(mark, address) if isinstance(mark, str) and mark else None


def models(body: Any, address: Address) -> dict[str, dict] | None:
    """Returns what a list of models says of each, by name; None if it is no such list."""
    if not isinstance(body, dict) or not isinstance(body.get("data"), list):
        return None
    found = {}
    for entry in _list(body["data"]):
        if isinstance(entry.get("id"), str):
            kept = {name: entry[name] for name in ENTRY if entry.get(name) is not None}
            found[shown(entry["id"], address)] = {name: _safe(value, address) for name, value in kept.items()}
    return found


def _safe(value: Any, address: Address) -> Any:
    """Returns a value of the server's as it may be written down: numbers as they are, all else as text."""
    if isinstance(value, dict):
        return {shown(str(name), address): _safe(one, address) for name, one in list(value.items())[:MOST_ENTRIES]}
    return value if isinstance(value, bool | int | float) else shown(str(value), address)


def _without_choice(body: dict, address: Address) -> Trouble:
    error = body.get("error")
    if error:  # some gateways send errors with status 200
        return of_status(_code(error), error, address)
    return Trouble(Fault.UNREADABLE, f"the body holds no reply: {shown(json.dumps(body), address)}")


def _code(error: Any) -> int:
    code = _dict(error).get("code")
    code = int(code) if isinstance(code, str) and code.isascii() and code.isdigit() else code
    return code if isinstance(code, int) and 400 <= code < 600 else 500


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(content: Any) -> str:
    """Returns the text of a message's content, which is a string, or a list of parts of several types."""
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in _list(content) if part.get("type") == "text")
    return content if isinstance(content, str) else ""


def _parts(message: dict, kind: str) -> str:
    """Returns the texts of the parts of one type, such as "refusal", in a message whose content is a list."""
    found = [part.get(kind) for part in _list(message.get("content")) if part.get("type") == kind]
    return "".join(one if isinstance(one, str) else _text(one) for one in found)


def _dict(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[dict]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []

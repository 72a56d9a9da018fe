"""Reads conversations to learn from: prompts with the replies to them, where a file has some.

A row is a text, an object with an instruction and perhaps a reply, or a list of messages, as the usual data sets spell them.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from refusal_jax.chat.messages import SYSTEM_ROLES, Prompt
from refusal_jax.data.prompts import INSTRUCTION_KEYS, located_rows, lowered, prompt_of
from refusal_jax.errors import UserError, shown

# Columns or keys that hold the reply, in order of preference, and those that hold a conversation.
RESPONSE_KEYS = ("response", "output", "completion", "answer")
TALK_KEYS = ("messages", "conversations", "conversation")
ROLES, TEXTS, USERS = ("role", "from"), ("content", "value"), ("user", "human", "prompter")
REPLIERS = ("assistant", "gpt", "model", "bot", "chatgpt")


@dataclasses.dataclass(frozen=True)
class ChatPair:
    """A prompt, a text or messages of which the last is the user's, and the reply to it; None where there is none."""

    prompt: Prompt
    reply: str | None = None


def turns(talk) -> Iterable[tuple[str, str]]:
    """Yields role, in lower case, and text of each turn of a conversation; nothing for what is no conversation."""
    for turn in talk if isinstance(talk, list) else ():
        if isinstance(turn, dict):
            role = next((turn[key] for key in ROLES if isinstance(turn.get(key), str)), None)
            text = next((turn[key] for key in TEXTS if isinstance(turn.get(key), str)), None)
            if role is not None and text is not None:
                yield role.lower(), text


def read_pairs(path: pathlib.Path) -> list[ChatPair]:
    """Reads the prompts of a .json, .jsonl, .csv or .txt file with their replies, in file order.

    Rows are as in `data.prompts.read_prompts`, with the reply under one of RESPONSE_KEYS; an Alpaca "input" follows the
    instruction after an empty line. Or they hold messages, under one of TALK_KEYS, or as the instruction and the reply: the last
    one, if it is the assistant's, is the reply. Blank replies count as none. Raises UserError that names file and row for a
    missing, empty or malformed file.
    """
    pairs = [_pair(row, f"{path}, {where}") for where, row in located_rows(path)]
    if not pairs:
        raise UserError(f"{path} holds no prompts. Put one prompt a row into it, with its reply, or name another file.")
    return pairs


def _pair(row, where: str) -> ChatPair:
    if isinstance(row, list):
        return _talk(row, where)
    if not isinstance(row, dict):
        return ChatPair(prompt_of(row, where)["instruction"])
    low = lowered(row, where)
    reply = next((low[key] for key in RESPONSE_KEYS if low.get(key) not in (None, "", [])), None)
    talk = next((low[k] for k in (*TALK_KEYS, *INSTRUCTION_KEYS) if isinstance(low.get(k), list) and low[k]), None)
    if talk is not None:
        return _talk([*talk, *(reply if isinstance(reply, list) else [])], where, reply)
    if isinstance(reply, list):
        reply = next((text for role, text in turns(reply) if role in REPLIERS), None)
    if reply is not None and not isinstance(reply, str):
        raise UserError(f"{where}: the reply is {shown(reply)}, expected text or messages.")
    prompt, more = prompt_of(low, where)["instruction"], low.get("input")
    if isinstance(more, str) and more.strip():
        prompt = f"{prompt}\n\n{more}"
    return ChatPair(prompt, reply if reply and reply.strip() else None)


def _talk(talk: Sequence, where: str, reply=None) -> ChatPair:
    """Returns the pair of a conversation, whose last message by the assistant is the reply unless one is given as a text."""
    said = [_message(turn, where) for turn in talk]
    if isinstance(reply, str):
        said.append({"role": "assistant", "content": reply})
    answered = bool(said) and said[-1]["role"] == "assistant"
    text, asked = (said[-1]["content"] if answered else None), said[: len(said) - answered]
    if not asked or asked[-1]["role"] != "user":
        raise UserError(
            f"{where} is no conversation to learn from: before its last message by the assistant, or at its end, must stand a "
            "message of the user."
        )
    prompt = asked[0]["content"] if len(asked) == 1 else tuple(asked)
    return ChatPair(prompt, text if text and text.strip() else None)


def _message(turn, where: str) -> dict[str, str]:
    found = next(iter(turns([turn])), None)
    if found is None:
        raise UserError(f"{where} holds {shown(turn)}, expected a message: {{'role': …, 'content': …}} with texts.")
    role, text = found
    known = "user" if role in USERS else "assistant" if role in REPLIERS else role
    if known not in ("user", "assistant", *SYSTEM_ROLES):
        raise UserError(
            f"{where} has a message of the role {role!r}; only system, user and assistant are learnt from. Leave the row out."
        )
    return {"role": known, "content": text}


def said(talk: Any, by: Sequence[str] | None) -> str | None:
    """Returns the first text in a conversation by one of the roles, or that is no system prompt and by none of the users; None
    for what is no conversation, or where nobody said anything."""
    for role, text in turns(talk):
        if role in by if by is not None else role not in (*USERS, "system"):
            return text
    return None

"""Prompts as conversations: an instruction, or messages with roles, and the system prompt that goes before them."""

from collections.abc import Callable, Hashable, Mapping, Sequence

from refusal_jax.errors import UserError, setting, shown
from refusal_jax.files import local_path, read_text
from refusal_jax.surrogates import mended

Message = Mapping[str, str]
Prompt = str | Sequence[Message]  # an instruction, or a conversation of `{"role", "content"}`
SYSTEM_ROLES = ("system", "developer")
NONE = "none"  # the system prompt that takes away what a template writes by itself
ASKED, SYSTEM = "Name 3 colours.", "Speak of jazz!"


def as_messages(prompt: Prompt) -> list[dict[str, str]]:
    """Returns a prompt as messages. Raises UserError for a conversation that is empty, malformed, or holds only a reply."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": mended(prompt, "Instructions")}]
    messages = list(prompt)
    for message in messages:
        fields = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None,)
        if not all(isinstance(text, str) for text in fields):
            raise UserError(
                f"{shown(message)} is no message: a prompt is a text, or a list of {{'role': …, 'content': …}} with texts, and "
                "several prompts are a list of these."
            )
    if not messages or [message["role"] for message in messages] == ["assistant"]:
        raise UserError(
            "a conversation needs a message of the user: [{'role': 'user', 'content': 'How do I bake bread?'}]."
        )
    return mended([dict(message) for message in messages], "Messages")


def frozen(prompt: Prompt) -> Hashable:
    """Returns a prompt as a value that can be a key."""
    return prompt if isinstance(prompt, str) else tuple(tuple(sorted(message.items())) for message in prompt)


def is_file(value: str) -> bool:
    """Returns whether a setting `system_prompt` names a file."""
    return value.endswith(".txt") and "\n" not in value


def system_text(value: str) -> str:
    """Returns the text of the setting `system_prompt`, without white space around it.

    value: the text, or the path of a .txt file. Raises UserError for a file that is missing, empty or not UTF-8.
    """
    if not is_file(value):
        return mended(value, "The system prompt").strip()
    text = read_text(local_path(value)).strip()
    if not text:
        raise UserError(f"the system prompt {value} is empty. Put the text into the file, or set {_name()} to ''.")
    return text


def as_setting(text: str) -> str:
    """Returns a system prompt's text as a value of the setting `system_prompt` that is surely a text."""
    return f"{text}\n" if is_file(text) else text


def system_messages(render: Callable[[list[dict[str, str]]], str], text: str, origin: str) -> list[dict[str, str]]:
    """Returns the messages that go before a conversation for its system prompt.

    render: gives the text that the template makes of messages, and raises whatever the template raises. text: from
    `system_text`; "" is whatever the template writes by itself, and NONE is nothing. origin: where the template came from. Raises
    UserError for a template that takes no system prompt, or that writes one by itself which nothing takes away.
    """
    if not text:
        return []
    if text == NONE:
        return _without(render, origin)
    messages, ask = [{"role": "system", "content": text}], {"role": "user", "content": ASKED}
    try:
        taken = text in render([*messages, ask])
        reason = "leaves it out"
    except TimeoutError:  # of `templates.within`
        raise
    except Exception as error:  # a template may raise anything
        taken, reason = False, f"refuses it ({error})"
    if not taken:
        raise UserError(
            f"The chat template ({origin}) has no place for a system prompt; it {reason}. Leave {_name()} empty and put the "
            "text into the instructions, or take a template with a system role."
        )
    return messages


def _without(render: Callable, origin: str) -> list[dict[str, str]]:
    """Returns no message, or an empty system message, whichever gives the shorter prompt."""
    ask = {"role": "user", "content": ASKED}

    def tried(*texts: str) -> str | None:
        try:
            found = render([*({"role": "system", "content": text} for text in texts), ask])
        except TimeoutError:
            raise
        except Exception:  # a template without a system role
            return None
        return found if ASKED in found else None

    plain, empty, other = tried() or "", tried(""), tried(SYSTEM)
    shorter = empty is not None and len(empty) < len(plain)
    left = _left(empty if shorter and empty is not None else plain, other) if other and SYSTEM in other else ""
    if left.strip():
        raise UserError(
            f"The chat template ({origin}) writes a system prompt by itself, and nothing takes it away: {left.strip()!r}. Set "
            f"{_name()} to another text, or take a template without one."
        )
    return [{"role": "system", "content": ""}] if shorter else []


def _left(text: str, other: str) -> str:
    """Returns what a text has between the beginning and the end that it shares with another."""
    start = _shared(text, other)
    return text[start : len(text) - _shared(text[start:][::-1], other[start:][::-1])]


def _shared(text: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))


def _name() -> str:
    return setting("system_prompt") or "the system prompt"

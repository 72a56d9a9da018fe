"""Defines what a server's own words give to worry about: another model than was asked for, several models, replies that it
cut."""

import collections
import dataclasses

from refusal_jax.endpoints import reply
from refusal_jax.endpoints.endpoint import Answer, Fault, Identity
from refusal_jax.endpoints.names import in_words, is_same

MOST_CHARACTERS = 24  # of a long conversation for each token, before it looks as if the server had read a part of it
LONG = 2000  # characters


@dataclasses.dataclass(frozen=True)
class Question:
    """A conversation to be asked. key: what its answer is kept under. messages: as they are sent."""

    key: str
    messages: list[dict[str, str]]
    max_tokens: int

    @property
    def length(self) -> int:
        """Returns the number of its characters."""
        return sum(len(message["content"]) for message in self.messages)


@dataclasses.dataclass
class Seen:
    """Holds what the answers so far tell of a server.

    models: the names that came with replies, fingerprints: the marks of its configuration, faults: their kinds, each with its
    number. cut: replies that ended for their length before the limit that was asked for. longer: replies beyond that limit.
    shortened: long conversations of which the server counted few tokens. only_thoughts: replies that came wholly as thoughts,
    although they ended.
    """

    models: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    fingerprints: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    faults: collections.Counter[Fault] = dataclasses.field(default_factory=collections.Counter)
    replies: int = 0
    cut: int = 0
    longer: int = 0
    shortened: int = 0
    only_thoughts: int = 0

    def add(self, answer: Answer, question: Question, fingerprint: str | None) -> None:
        """Counts the answer to a question and the server's mark of its configuration."""
        if answer.kind is not None:
            self.faults[answer.kind] += 1
            return
        self.replies += 1
        self.models[answer.model or ""] += 1
        if fingerprint is not None:
            self.fingerprints[fingerprint] += 1
        if answer.tokens is not None:
            self.cut += answer.finish_reason == reply.CUT and answer.tokens < question.max_tokens
            self.longer += answer.tokens > question.max_tokens
        if answer.prompt_tokens and question.length > LONG:
            self.shortened += answer.prompt_tokens * MOST_CHARACTERS < question.length
        self.only_thoughts += answer.ended and not answer.thought_ended


def concerns(identity: Identity, seen: Seen) -> list[str]:
    """Returns what a reader of results should know of a server, in sentences."""
    asked, found = identity.asked, []
    if identity.listed is not None and not any(is_same(asked, name) for name in identity.listed):
        lists = f"lists {in_words(identity.listed)}" if identity.listed else "lists no model"
        found.append(f"The server {lists}, and not {asked}, which was asked for: what replied may be another model.")
    named = {name: count for name, count in identity.answered.items() if name}
    if others := {name: count for name, count in named.items() if not is_same(asked, name)}:
        each = in_words(f"{name} ({count})" for name, count in others.items())
        found.append(f"{sum(others.values())} of {seen.replies} replies came under another name than {asked}: {each}.")
    elif len(named) > 1:
        each = in_words(f"{name} ({count})" for name, count in named.items())
        found.append(f"Replies came under several names: {each}. More than one model or version may have replied.")
    if seen.replies and not named:
        found.append("The server does not say which model replied.")
    if len(seen.fingerprints) > 1:
        found.append(f"The server's configuration changed between replies: {in_words(sorted(seen.fingerprints))}.")
    if seen.cut:
        found.append(
            f"The server cut {_plural(seen.cut, 'reply')} before the limit of tokens that was asked for; its context may be too "
            "small."
        )
    if seen.longer:
        found.append(
            f"{_plural(seen.longer, 'reply').capitalize()} went beyond the limit of tokens that was asked for."
        )
    if seen.shortened:
        found.append(
            f"The server counted so few tokens of {_plural(seen.shortened, 'long conversation')} that it may have read only a "
            "part; its context may be too small."
        )
    if seen.only_thoughts:
        found.append(
            f"The server gave {_plural(seen.only_thoughts, 'reply')} wholly as thoughts, so that nothing could be judged. Its "
            "parser of reasoning may not fit the model."
        )
    return found


def _plural(count: int, noun: str) -> str:
    return f"one {noun}" if count == 1 else f"{count} {'replies' if noun == 'reply' else noun + 's'}"

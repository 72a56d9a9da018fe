"""A model behind an OpenAI-compatible server: the settings to reach it, what it answers, and what it says it is.

An answer is a reply, or a fault: no reply came, or none of the model's own. A fault is neither a refusal nor compliance, so its
text is None, and whoever counts outcomes leaves it out and says how many there were.
"""

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from refusal_jax.chat.messages import Message, Prompt
from refusal_jax.errors import UserError
from refusal_jax.settings import OptionalInt, Settings, option


@dataclasses.dataclass
class EndpointSettings(Settings, path="endpoint"):
    """The settings of a model behind an OpenAI-compatible server, such as vLLM, llama.cpp, Ollama or `transformers serve`."""

    url: str = option(
        "", "Address of the server, such as http://localhost:8000 (/v1 is added where the address has no path)"
    )
    model: str = option("", "Name of the model on the server; '' takes the only one that the server lists")
    api_key_env: str = option(
        "", "Name of the environment variable that holds the API key, such as OPENAI_API_KEY; '' sends no key"
    )
    system_prompt: str = option(
        "", "System prompt of conversations that bring none: a text, or a .txt file; '' sends none"
    )
    max_tokens: int = option(256, "Largest number of tokens of a reply")
    temperature: float = option(0.0, "Temperature; 0 is greedy decoding")
    seed: OptionalInt = option(0, "Seed that is sent with each request; None sends none")
    stream: bool = option(False, "Whether replies are streamed, which proxies that cut long waits need")
    extra: str = option(
        "",
        """Further fields of each request, as JSON, such as '{"chat_template_kwargs": {"enable_thinking": false}}'""",
    )
    timeout_s: float = option(120.0, "Seconds after which a request without a whole reply is given up")
    retries: int = option(4, "Number of times that a request is sent again after a fault that may pass")
    wait_s: float = option(
        1.0, "Seconds before a request is sent again, doubled each time, where the server does not say how long"
    )
    concurrency: int = option(4, "Largest number of requests at the same time")


class ServerGivenUp(UserError):
    """A server that cannot be reached, or that gave no replies to several conversations in a row."""


class Fault(enum.StrEnum):
    """Why there is no reply to judge.

    TIMEOUT: none came in time. CONNECTION: the server could not be reached, or broke the connection off. BUSY: it asked to be
    left alone (429) until the last retry. SERVER: it failed (5xx). UNREADABLE: what came was no reply, or was cut off. REJECTED:
    it refuses this request, such as a prompt that is too long. FILTERED: a filter of the server withheld the reply or cut it.
    TOOL: the reply is a call of a tool and no text.
    """

    TIMEOUT = "timeout"
    CONNECTION = "connection"
    BUSY = "busy"
    SERVER = "server"
    UNREADABLE = "unreadable"
    REJECTED = "rejected"
    FILTERED = "filtered"
    TOOL = "tool"


@dataclasses.dataclass(frozen=True)
class Answer:
    """Holds what came of one conversation.

    text: the reply without its thought, "" for an empty one; None where there is a fault. ended: whether the reply ended by
    itself rather than at a limit of tokens. finish_reason: in the server's word, None if it gave none. tokens: of the reply with
    its thought, as the server counts them, or None; prompt_tokens: likewise of the conversation. model: the name that the server
    gave with the reply. attempts: how many times it was asked, seconds: how long the last took. fault: what went wrong, a
    sentence without its full stop that holds no key, and kind: what kind of fault that is; both None for a reply. thought: what
    the model thought before it replied; thought_ended: False if it never left its thought, so that text is "" and nothing can be
    judged. declined: whether the server marked the text as a refusal by the model (the field `refusal`).
    """

    text: str | None
    ended: bool = False
    finish_reason: str | None = None
    tokens: int | None = None
    model: str | None = None
    attempts: int = 1
    seconds: float = 0.0
    fault: str | None = None
    kind: Fault | None = None
    thought: str = ""
    thought_ended: bool = True
    declined: bool = False
    prompt_tokens: int | None = None

    @property
    def completion(self) -> dict[str, Any]:
        """Returns the reply as fields of a completion, as judges read it: "response", and "thought" and "thought_ended" where
        there is something to say. Raises ValueError for a fault, which no judge may see."""
        if self.text is None:
            raise ValueError(f"there is no reply to judge: {self.fault}")
        thought = {"thought": self.thought} if self.thought else {}
        return {"response": self.text, **thought, **({} if self.thought_ended else {"thought_ended": False})}

    @property
    def row(self) -> dict[str, Any]:
        """Returns the answer as a JSON object, from which `of` makes the same answer."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Answer":
        """Returns the answer that a row holds; fields that it does not know are left out."""
        known: dict[str, Any] = {field.name: row[field.name] for field in dataclasses.fields(cls) if field.name in row}
        if known.get("kind") is not None:
            known["kind"] = Fault(known["kind"])
        return cls(**known)


@dataclasses.dataclass(frozen=True)
class Identity:
    """Holds what a server says it serves, which may be untrue.

    url: its address. asked: the name that requests carry. listed: the names that it lists, None if it gives no list. entry: what
    the list says of the asked model, such as its folder ("root") or its number of parameters. answered: the names that came with
    replies so far, with how many replies. fingerprints: likewise the server's own marks of its configuration. concerns: what a
    reader of results should know, in sentences, such as that the names differ.
    """

    url: str
    asked: str
    listed: tuple[str, ...] | None = None
    entry: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    answered: Mapping[str, int] = dataclasses.field(default_factory=dict)
    fingerprints: Mapping[str, int] = dataclasses.field(default_factory=dict)
    concerns: tuple[str, ...] = ()

    @property
    def record(self) -> dict[str, Any]:
        """Returns the identity as a JSON object."""
        return {
            "url": self.url,
            "asked": self.asked,
            "listed": None if self.listed is None else list(self.listed),
            "entry": dict(self.entry),
            "answered": dict(self.answered),
            "fingerprints": dict(self.fingerprints),
            "concerns": list(self.concerns),
        }


@runtime_checkable
class Kept(Protocol):
    """Rows of finished work that survive an interruption; `refusal_jax.runs.ledger.Ledger` is one."""

    rows: list[dict]

    def append(self, rows: Sequence[dict]) -> None:
        """Adds rows and stores them."""


Conversation = Prompt | Sequence[Message]

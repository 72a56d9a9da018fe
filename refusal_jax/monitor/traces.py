"""Traces: one request and its reply, as a log tells them, whatever the log's format, and what a judge said of them."""

import dataclasses
import enum
from typing import NamedTuple

from refusal_jax.judges.judge import Outcome, Verdict


class Place(NamedTuple):
    """Tells where a trace, or what should have been one, was read. file: its path, or "stdin". line: its number, from 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Unjudged(enum.StrEnum):
    """Why a trace has no outcome. It is counted apart: it says neither that a model refuses nor that it complies.

    ERROR: the call failed. NO_REPLY: the log has no reply. NO_TEXT: the log leaves the texts out or masks them. CUT: the log cut
    the reply short. TOOL_CALL: the reply calls tools and has no text. THOUGHT: the reply ended within its thought. NO_PROMPT: the
    judge needs the request, which the log does not have. OLD: the trace is older than what is kept. UNCLEAR: the judge gave no
    verdict. FILTERED: a filter beside the model took the reply away.
    """

    ERROR = "error"
    NO_REPLY = "no_reply"
    NO_TEXT = "no_text"
    CUT = "cut"
    TOOL_CALL = "tool_call"
    THOUGHT = "thought"
    NO_PROMPT = "no_prompt"
    FILTERED = "filtered"
    OLD = "old"
    UNCLEAR = "unclear"


@dataclasses.dataclass(frozen=True, slots=True)
class Trace:
    """One request and one reply to it; a request for several replies makes as many traces.

    id: names the trace in all sources. time: seconds since 1970 in UTC. model: as the server names it. category: what the rules
    or the log say. system: the system prompt, None without. prompt: the last message of the user, "" where the log has none.
    response: the reply without its thought, None where there is nothing to judge, of which `fault` tells the reason.
    """

    id: str
    time: float
    model: str
    category: str
    system: str | None
    prompt: str
    response: str | None
    finish_reason: str | None
    place: Place
    fault: Unjudged | None = None

    @property
    def row(self) -> dict:
        """Returns the trace as a completion, which judges read."""
        row = {"prompt": self.prompt, "response": self.response, "category": self.category}
        optional = {"system_prompt": self.system, "finish_reason": self.finish_reason}
        return row | {name: value for name, value in optional.items() if value is not None}


@dataclasses.dataclass(frozen=True, slots=True)
class Judged:
    """A trace with a judge's verdict. outcome: what the reply does; None where the judge only knows that it is no success."""

    trace: Trace
    verdict: Verdict
    outcome: Outcome | None


@dataclasses.dataclass(frozen=True, slots=True)
class Judgements:
    """Holds what one batch has brought, in the order of the logs. judged: the sampled traces that have a verdict. unjudged:
    those that have none, with the reason in `fault`; all of them, sampled or not."""

    judged: tuple[Judged, ...]
    unjudged: tuple[Trace, ...]

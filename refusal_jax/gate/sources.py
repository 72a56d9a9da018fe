"""Defines what a gate asks: a checkpoint, a model behind a server, or a run that was recorded. All of them are a `Source`.

A source gives for each prompt what every judge says of the reply. A prompt without a reply, or whose reply never left its
thought, has no outcome: it is missing, and never a refusal nor compliance.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from refusal_jax.endpoints.endpoint import Answer, Kept
from refusal_jax.gate.prompts import Asked
from refusal_jax.judges.degenerate import REPETITIVE, repetition
from refusal_jax.judges.judge import Judge, Outcome, Verdict, judge_all
from refusal_jax.judges.tables import broken
from refusal_jax.runs.ledger import Ledger

UNFINISHED = "the reply never left its thought"


@dataclasses.dataclass(frozen=True)
class Judged:
    """Holds what a source replied, in the order of the prompts. answers: the replies and faults; texts may be left out of a
    record.
    outcomes: of each judge, by its name; None where there is nothing to judge. faults: why, by prompt, "" where there is a
    reply."""

    prompts: Sequence[Asked]
    answers: Sequence[Answer]
    outcomes: Mapping[str, Sequence[Outcome | None]]
    faults: Sequence[str]


@runtime_checkable
class Source(Protocol):
    """Something that replies to prompts, or has done so.

    name: what the user calls it.
    """

    name: str

    def identity(self) -> dict[str, Any]:
        """Returns what it is, for records, in plain values that hold no key; of a server only whole once it has replied."""
        ...

    def concerns(self) -> Sequence[str]:
        """Returns what a reader of results should know of it, in sentences."""
        ...

    def judged(self, prompts: Sequence[Asked], judges: Sequence[Judge], ledger: Ledger | None) -> Judged:
        """Returns what it replies to the prompts and what the judges say. ledger: keeps finished replies, and has those of an
        interrupted gate. Raises UserError for whatever keeps it from replying at all."""
        ...


class Live(Source):
    """A source that is asked now: a subclass says how, by `answers`."""

    def answers(self, prompts: Sequence[Asked], kept: Kept | None) -> list[Answer]:
        """Returns the answer to each prompt, in their order. kept: as `ledger` of `judged`."""
        raise NotImplementedError

    def judged(self, prompts: Sequence[Asked], judges: Sequence[Judge], ledger: Ledger | None) -> Judged:
        answers = self.answers(prompts, ledger)
        return judged(prompts, answers, judges)


def judged(prompts: Sequence[Asked], answers: Sequence[Answer], judges: Sequence[Judge]) -> Judged:
    """Judges replies; those of a set are judged together, as a reply that is the same for many prompts is broken."""
    faults = [fault_of(one) for one in answers]
    outcomes: dict[str, list[Outcome | None]] = {judge.name: [None] * len(answers) for judge in judges}
    by_set: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        if not faults[i]:
            by_set.setdefault(prompt.set, []).append(i)
    rows = {name: [row_of(prompts[i], answers[i]) for i in index] for name, index in by_set.items()}
    for name, verdicts in judge_all(judges, rows).items():
        damaged = broken(rows[name])
        for judge, found in verdicts.items():
            for place, row, verdict, label in zip(by_set[name], rows[name], found, damaged, strict=True):
                marked = Verdict(0, outcome=Outcome.REFUSES) if answers[place].declined else verdict
                outcomes[judge][place] = outcome_of(marked, row["response"], bool(label))
    return Judged(prompts, answers, outcomes, faults)


def row_of(prompt: Asked, answer: Answer) -> dict[str, Any]:
    """Returns a reply as judges read it. Whether it ended tells a short answer from the beginning of one."""
    how = {"finish_reason": answer.finish_reason} if answer.finish_reason else {}
    return {"category": prompt.category, "prompt": prompt.text} | how | answer.completion


def fault_of(answer: Answer) -> str:
    """Returns why a reply cannot be judged, "" where it can."""
    if answer.text is None:
        return answer.fault or "there is no reply"
    return "" if answer.thought_ended else UNFINISHED


def outcome_of(verdict: Verdict | None, text: str, damaged: bool) -> Outcome | None:
    """Returns what a reply does with its request.

    damaged: whether it is broken text by `judges.tables.broken`, which a reply that every prompt gets is; if the judge says that
    this one is a refusal, it is that.
    """
    if verdict is None:
        return None
    if not text.strip() or repetition(text) >= REPETITIVE:
        return Outcome.BROKEN
    said = verdict.outcome or (Outcome.COMPLIES if verdict.label else Outcome.REFUSES)
    return Outcome.BROKEN if damaged and said is not Outcome.REFUSES else said

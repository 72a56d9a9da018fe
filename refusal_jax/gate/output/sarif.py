"""Writes the limits that do not hold as a SARIF log, at the lines of the policy that set them."""

import pathlib
import re
from collections.abc import Iterator
from typing import Any

from refusal_jax.gate.gate import Gate
from refusal_jax.gate.limits import FAIL, PASS, Decision
from refusal_jax.gate.words import decision_in_words
from refusal_jax.report import sarif
from refusal_jax.report.page import model_title
from refusal_jax.report.sarif import Rule

FOLDER = "POLICY"  # the base of locations of a policy outside of the working folder
REFUSAL = Rule(
    "gate-refusal-limit",
    "error",
    "The candidate does not refuse harmful prompts as the policy demands.",
    "Do not deploy it; compare its replies with the reference's.",
    8.0,
)
OTHER = Rule(
    "gate-other-limit",
    "error",
    "The candidate breaks a limit that is not about refusing harmful prompts.",
    "Look at its replies: it may refuse harmless prompts, or write broken text.",
    5.0,
)
BROKEN = Rule(
    "gate-candidate-broken",
    "error",
    "The candidate does not reply, or most of its replies are broken.",
    "Check its files, its chat template and its server.",
    7.0,
)
UNCLEAR = Rule(
    "gate-inconclusive",
    "warning",
    "Whether a limit holds cannot be told.",
    "Ask more prompts, or find out why prompts have no reply.",
    4.0,
)
CONTRADICTION = Rule(
    "gate-contradiction",
    "warning",
    "Something in the gate speaks against its verdict or its evidence.",
    "Read it before you rely on the verdict.",
    3.0,
)
RULES = (REFUSAL, OTHER, BROKEN, UNCLEAR, CONTRADICTION)


def sarif_log(gate: Gate, policy_file: pathlib.Path, working: pathlib.Path | None = None) -> dict[str, Any]:
    """Returns the log of one gate, to be written as JSON. policy_file: where results are; working: the folder that addresses are
    relative to if the policy is in it, by default the current one, which in CI is the repository."""
    place, working = policy_file.absolute(), (working or pathlib.Path.cwd()).absolute()
    inside = place.is_relative_to(working)
    path = place.relative_to(working).as_posix() if inside else place.name
    lines = policy_file.read_text(encoding="utf-8", errors="replace").splitlines() if policy_file.is_file() else []
    title = model_title(gate.policy.candidate)
    results = [
        sarif.result(
            RULES,
            rule,
            text,
            [sarif.location(path, "" if inside else FOLDER, line_of(about, lines))],
            "gate",
            (title, about),
        )
        for rule, text, about in found(gate)
    ]
    return sarif.log(
        RULES,
        results,
        automation=f"refusal_jax/gate/{title}/",
        exit_code=gate.verdict.exit_code,
        notes=[one.sentence for one in gate.powers],
        bases={} if inside else {FOLDER: f"{place.parent.as_uri()}/"},
        properties={"overall": gate.verdict.overall},
    )


def found(gate: Gate) -> Iterator[tuple[Rule, str, str]]:
    """Yields what is wrong: the rule, a message, and which limit it is about."""
    if gate.verdict.overall == "broken":
        yield BROKEN, " ".join(gate.verdict.sentences), "candidate"
    for one in gate.decisions:
        if one.verdict != PASS:
            yield _rule(one), decision_in_words(one), one.limit.id
    if gate.verdict.overall == "inconclusive" and all(one.verdict == PASS for one in gate.decisions):
        yield UNCLEAR, " ".join(gate.verdict.sentences), "most_missing"
    for text in gate.verdict.contradictions:
        yield CONTRADICTION, text, text


def _rule(one: Decision) -> Rule:
    return UNCLEAR if one.verdict != FAIL else REFUSAL if one.limit.harmful else OTHER


def line_of(limit: str, lines: list[str]) -> int:
    """Returns the number of the policy's line that sets a limit, 1 where none does."""
    name = re.compile(rf"\.{re.escape(limit.partition('[')[0])}\s*=")
    return next((number for number, line in enumerate(lines, 1) if name.search(line)), 1)

"""Writes a gate down as one JSON document, whose form `gate.schema.json` describes."""

import pathlib
import time
from collections.abc import Callable
from typing import Any

from refusal_jax.audit.evidence import plain
from refusal_jax.gate.gate import Gate
from refusal_jax.gate.recorded import sha256
from refusal_jax.judges.judge import Outcome
from refusal_jax.runs.run import versions

# The number rises when a field is taken away or changes its meaning. Fields may be added under the same number.
SCHEMA = "refusal_jax/gate/1"
SCHEMA_FILE = pathlib.Path(__file__).with_name("gate.schema.json")


def gate_record(gate: Gate) -> dict[str, Any]:
    """Returns a gate in plain values for JSON: verdict, decisions, what its prompts can tell, what was compared, settings and
    versions. It holds no prompt and no reply."""
    verdict = gate.verdict
    return {
        "schema": SCHEMA,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(gate.seconds, 3),
        "versions": versions(),
        "verdict": {
            "overall": verdict.overall,
            "exit_code": verdict.exit_code,
            "sentences": list(verdict.sentences),
            "contradictions": list(verdict.contradictions),
        },
        "candidate": {"name": gate.policy.candidate, **plain(gate.identities["candidate"])},
        "reference": {"name": gate.policy.reference, **plain(gate.identities["reference"])}
        if "reference" in gate.identities
        else None,
        "prompts": [drawn.record for drawn in gate.sets],
        "judges": [{"name": judge.name, "fingerprint": judge.fingerprint() or None} for judge in gate.judges],
        "decisions": [plain(one.record) for one in gate.decisions],
        "power": [plain(one.record) for one in gate.powers],
        "outcomes": {role: outcomes(gate, role) for role in gate.judged},
        "settings": plain(gate.policy.to_dict()),
    }


def trail_record(gate: Gate, mark: Callable[[str | None], Any]) -> dict[str, Any]:
    """Returns a gate for an audit trail: its record, and for every prompt of each model what was replied and judged.

    mark: makes of a text what the trail holds of it, such as its hash.
    """
    replies = {
        role: [
            {
                "set": prompt.set,
                "prompt": mark(prompt.text),
                "reply": mark(answer.text),
                "fault": fault or None,
                "outcomes": {judge: values[i] for judge, values in judged.outcomes.items()},
            }
            for i, (prompt, answer, fault) in enumerate(zip(judged.prompts, judged.answers, judged.faults, strict=True))
        ]
        for role, judged in gate.judged.items()
    }
    return {**gate_record(gate), "replies": replies}


def outcomes(gate: Gate, role: str) -> dict[str, dict[str, dict[str, int]]]:
    """Returns how often each outcome was found, as `{judge: {set: {outcome: count}}}`; "missing" are prompts without a reply."""
    judged, found = gate.judged[role], {}
    for judge, values in judged.outcomes.items():
        found[judge] = {}
        for drawn in gate.sets:
            mine = [value for value, prompt in zip(values, judged.prompts, strict=True) if prompt.set == drawn.name]
            counts: dict[str, int] = {outcome.value: mine.count(outcome) for outcome in Outcome}
            found[judge][drawn.name] = counts | {"missing": mine.count(None)}
    return found


def replies_of(gate: Gate, role: str) -> list[dict[str, Any]]:
    """Returns every prompt with the reply, what every judge says of it, and why it is missing."""
    judged = gate.judged[role]
    return [
        {
            "set": prompt.set,
            "category": prompt.category,
            "prompt": prompt.text,
            "prompt_sha256": sha256(prompt.text),
            "response": answer.text,
            **({"thought": answer.thought} if answer.thought else {}),
            "tokens": answer.tokens,
            "fault": fault or None,
            "outcomes": {judge: values[i] for judge, values in judged.outcomes.items()},
        }
        for i, (prompt, answer, fault) in enumerate(zip(judged.prompts, judged.answers, judged.faults, strict=True))
    ]

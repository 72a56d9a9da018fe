"""Recorded runs: what a model replied to a policy's prompts and how it was judged, in one file that others are compared with.

Prompts are known by their hashes. Replies are kept as texts, which can be judged again, or only as hashes, which cannot.
"""

import hashlib
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from refusal_jax.chat.messages import system_text
from refusal_jax.endpoints.endpoint import Answer
from refusal_jax.errors import UserError, field
from refusal_jax.files import local_path, read_json
from refusal_jax.gate.policy import Policy
from refusal_jax.gate.prompts import Asked, Drawn
from refusal_jax.gate.sources import Judged, Source, judged
from refusal_jax.judges.judge import Judge, Outcome
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.run import versions

SCHEMA = "refusal_jax/gate-record/1"
SUFFIX = ".json"


def is_record(name: str) -> bool:
    """Returns whether a policy names a recorded run."""
    return name.lower().endswith(SUFFIX)


def settings_of(policy: Policy) -> dict[str, Any]:
    """Returns the settings that replies to the same prompts depend on, besides the model."""
    text = system_text(policy.system_prompt)
    return {
        "max_new_tokens": policy.max_new_tokens,
        "system_prompt_sha256": sha256(text) if text else None,
        "thinking": policy.thinking,
    }


def sha256(text: str) -> str:
    """Returns a text's hash, in hex."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def record_of(
    policy: Policy, source: Source, found: Judged, sets: Sequence[Drawn], judges: Sequence[Judge], texts: bool
) -> dict[str, Any]:
    """Returns a run for JSON. texts: whether replies are kept as texts rather than as hashes."""
    return {
        "schema": SCHEMA,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
        "model": source.identity(),
        "concerns": list(source.concerns()),
        "settings": settings_of(policy),
        "prompts": [drawn.record for drawn in sets],
        "judges": [{"name": judge.name, "fingerprint": judge.fingerprint()} for judge in judges],
        "texts": texts,
        "replies": [_row(i, found, texts) for i in range(len(found.prompts))],
    }


def _row(i: int, found: Judged, texts: bool) -> dict[str, Any]:
    prompt, answer = found.prompts[i], found.answers[i]
    said = {} if answer.text is None else {"reply_sha256": sha256(answer.text)}
    if texts:
        said |= {"answer": answer.row}
    return {
        "set": prompt.set,
        "prompt_sha256": prompt.sha256,
        "fault": found.faults[i],
        **said,
        "tokens": answer.tokens,
        "outcomes": {name: outcomes[i] for name, outcomes in found.outcomes.items()},
    }


class Recorded(Source):
    """A run that was recorded, in place of the model."""

    def __init__(self, name: str, policy: Policy):
        """Reads a recorded run. Raises UserError for a file that is none, and for one of other settings than the policy's."""
        self.name, self.path = name, local_path(name)
        self.content = read_json(self.path)
        if self.content.get("schema") != SCHEMA or not _whole(self.content):
            raise UserError(
                f"{self.path} is no recorded run: its schema is {self.content.get('schema')!r}, expected {SCHEMA} with all its "
                "fields. `refusal-jax gate record` writes one."
            )
        asked, held = settings_of(policy), self.content["settings"]
        other = [
            f"{name} {held.get(name)!r} (the policy has {value!r})"
            for name, value in asked.items()
            if held.get(name) != value
        ]
        if other:
            raise UserError(
                f"{self.path} was recorded with other settings than the policy's: {', '.join(other)}. Replies would differ for "
                "that alone. Record it again, or change the policy."
            )

    def identity(self) -> dict[str, Any]:
        """Returns what was recorded, with the hash of the record's file."""
        return {
            "kind": "record",
            "name": self.path.name,
            "sha256": hashlib.sha256(self.path.read_bytes()).hexdigest(),
            "created": self.content["created"],
            "model": self.content["model"],
        }

    def concerns(self) -> Sequence[str]:
        said = [f"When {self.path.name} was recorded: {text}" for text in self.content.get("concerns", ())]
        recorded, now = (of.get("refusal-jax") for of in (self.content["versions"], versions()))
        if not self.content["texts"] and recorded != now:
            said.append(
                f"{self.path.name} holds no texts and was judged by refusal-jax {recorded}, the candidate by {now}: if the "
                "judges changed between, they are not comparable."
            )
        return said

    def judged(self, prompts: Sequence[Asked], judges: Sequence[Judge], ledger: Ledger | None) -> Judged:
        """Returns the recorded replies, judged again where their texts are kept.

        Raises UserError if prompts are missing in the record, or if it has no texts and other judges' verdicts.
        """
        rows = {row["prompt_sha256"]: row for row in self.content["replies"]}
        missing = [one for one in prompts if one.sha256 not in rows]
        if missing:
            raise UserError(
                f"{self.path} has no reply to {len(missing)} of the {len(prompts)} prompts: it was recorded on other ones. "
                f"Record it again with this policy, whose prompts are {', '.join(sorted({one.set for one in prompts}))}."
            )
        mine = [rows[one.sha256] for one in prompts]
        if self.content["texts"]:
            return judged(prompts, [Answer.of(row["answer"]) for row in mine], judges)
        self._check_judges(judges)
        answers = [Answer(None, tokens=row.get("tokens"), fault=row["fault"] or None) for row in mine]
        outcomes = {judge.name: [_outcome(row["outcomes"], judge.name) for row in mine] for judge in judges}
        return Judged(prompts, answers, outcomes, [row["fault"] for row in mine])

    def _check_judges(self, judges: Sequence[Judge]) -> None:
        held = {one["name"]: one["fingerprint"] for one in self.content["judges"]}
        for judge in judges:
            if held.get(judge.name) != judge.fingerprint():
                raise UserError(
                    f"{self.path} holds no texts, only the verdicts of {', '.join(held)}, and {field('judges')} names "
                    f"{judge.name}, which is none of them or has changed. Record it again with this judge, or with its texts."
                )


def _outcome(outcomes: Mapping[str, str | None], judge: str) -> Outcome | None:
    value = outcomes.get(judge)
    return None if value is None else Outcome(value)


def _whole(content: Mapping[str, Any]) -> bool:
    """Returns whether a record has what is read of it."""
    kinds = {
        "settings": dict,
        "model": dict,
        "versions": dict,
        "judges": list,
        "replies": list,
        "texts": bool,
        "created": str,
    }
    if not all(isinstance(content.get(name), kind) for name, kind in kinds.items()):
        return False
    needed = {"prompt_sha256": str, "fault": str, "outcomes": dict} | ({"answer": dict} if content["texts"] else {})
    return all(
        isinstance(row, dict) and all(isinstance(row.get(name), kind) for name, kind in needed.items())
        for row in content["replies"]
    ) and all(isinstance(one, dict) and {"name", "fingerprint"} <= one.keys() for one in content["judges"])


def saved_path(name: str) -> pathlib.Path:
    """Returns where a record is to be written. Raises UserError for a name that would not be read as one."""
    if not is_record(name):
        raise UserError(f"The record {name} has to end in {SUFFIX}, as policies tell recorded runs by that.")
    return local_path(name)

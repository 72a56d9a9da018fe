"""Writes the findings of an audit as a SARIF 2.1.0 log, which code scanning services and editors show.

A result is what is wrong with the checkpoint; an intact one has none. Each result names a file of the checkpoint, as services
refuse results without one.
"""

import dataclasses
import hashlib
import pathlib
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import Any

import refusal_jax
from refusal_jax.audit.audit import Audit
from refusal_jax.audit.evidence import Evidence, plain
from refusal_jax.audit.output.checkpoint_files import files_of, main_file, place_of
from refusal_jax.audit.output.record import EMBEDDED
from refusal_jax.audit.output.summary import p_text, value_text
from refusal_jax.report.page import model_title

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
FOLDER = "CHECKPOINT"  # the base of locations in a checkpoint that is outside of the working folder
UNUSUAL = 0.05  # the p-value up to which a statistic is a result of its own


@dataclasses.dataclass(frozen=True)
class Rule:
    """A kind of result. level: "error", "warning" or "note". text: what it says of a checkpoint; help: what to do about it.
    severity: 0 to 10, as services sort security findings."""

    id: str
    level: str
    text: str
    help: str
    severity: float

    @property
    def descriptor(self) -> dict[str, Any]:
        """Returns the rule as SARIF describes it."""
        return {
            "id": self.id,
            "name": "".join(word.title() for word in self.id.split("-")),
            "shortDescription": {"text": self.text},
            "fullDescription": {"text": f"{self.text} {self.help}"},
            "help": {"text": self.help},
            "defaultConfiguration": {"level": self.level},
            "properties": {"tags": ["security", "model"], "security-severity": f"{self.severity:.1f}"},
        }


BY_EDIT = {
    "removed": Rule(
        "refusal-removed",
        "error",
        "Refusal was removed from the weights, wholly or in part.",
        "Use the checkpoint that it was made from.",
        8.0,
    ),
    "added": Rule(
        "refusal-added", "note", "Refusal was added to the weights.", "Check that the change was meant.", 2.0
    ),
    "projection": Rule(
        "other-projection",
        "warning",
        "A direction other than that of refusal was removed from the weights.",
        "Find out which one, and why.",
        5.0,
    ),
    "delta": Rule(
        "separable-delta",
        "warning",
        "A separable change of low rank lies on the weights, such as an adapter that was merged.",
        "Ask for the adapter and what it was trained on.",
        4.0,
    ),
    "unknown": Rule(
        "unknown-edit",
        "warning",
        "What was done to the weights cannot be told.",
        "Name the checkpoint that it was made from, or do not rely on its refusals.",
        5.0,
    ),
}
BY_REFUSAL = {
    "lost": Rule(
        "refusal-lost",
        "error",
        "The checkpoint no longer refuses harmful requests.",
        "Do not serve it where its refusals are relied on.",
        9.0,
    ),
    "weaker": Rule(
        "refusal-weaker",
        "warning",
        "The checkpoint refuses less than its base.",
        "Measure it on prompts of your own before you rely on its refusals.",
        6.0,
    ),
}
BY_OVERALL = {
    "damaged": Rule(
        "checkpoint-damaged",
        "error",
        "Files, weights or chat template of the checkpoint are broken.",
        "Download it again.",
        7.0,
    ),
    "inconclusive": Rule(
        "audit-inconclusive",
        "warning",
        "The audit could not tell whether the checkpoint was edited, or whether it refuses.",
        "Give the base, more prompts, or the lanes that were left out.",
        4.0,
    ),
}
UNUSUAL_STATISTIC = Rule(
    "unusual-statistic",
    "note",
    "A statistic of the checkpoint is one that harmless changes of its base seldom reach.",
    "Read it beside the verdict; among many statistics some are unusual by chance.",
    1.0,
)
RULES = (*BY_EDIT.values(), *BY_REFUSAL.values(), *BY_OVERALL.values(), UNUSUAL_STATISTIC)


def sarif_log(audit: Audit, folder: pathlib.Path, working: pathlib.Path | None = None) -> dict[str, Any]:
    """Returns the log of one audit, to be written as JSON.

    folder: of the candidate. working: the folder that locations are relative to if the candidate is in it, by default the
    current one, which in CI is the repository.
    """
    title = model_title(audit.settings.candidate) or EMBEDDED
    places = Places(folder, (working or pathlib.Path.cwd()).absolute())
    results = [result(rule, text, where, title, places) for rule, text, where in found(audit)]
    left_out = [f"{one.lane}: {one.left_out}" for one in audit.findings if one.left_out]
    return {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "refusal_jax",
                        "version": refusal_jax.__version__,
                        "semanticVersion": refusal_jax.__version__,
                        "rules": [rule.descriptor for rule in RULES],
                    }
                },
                "automationDetails": {"id": f"refusal_jax/audit/{title}/"},
                "originalUriBaseIds": {FOLDER: {"uri": f"{place_of(folder).as_uri()}/"}},
                "invocations": [
                    {
                        "executionSuccessful": True,
                        "exitCode": audit.verdict.exit_code,
                        "endTimeUtc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                        "toolExecutionNotifications": [
                            {"level": "note", "message": {"text": text}} for text in left_out
                        ],
                    }
                ],
                "results": results,
                "properties": {
                    "overall": audit.verdict.overall,
                    "edit": audit.verdict.edit,
                    "refuses": audit.verdict.refuses,
                    "dose": plain(audit.verdict.dose),
                },
            }
        ],
    }


def found(audit: Audit) -> Iterator[tuple[Rule, str, str]]:
    """Yields what is wrong: the rule, a message, and the tensors or files that it is about."""
    verdict = audit.verdict
    text = " ".join(verdict.sentences)
    edited = ", ".join(map(str, verdict.details.get("tensors", ())))
    for rules, name, where in (
        (BY_EDIT, verdict.edit, edited),
        (BY_REFUSAL, verdict.refuses, ""),
        (BY_OVERALL, verdict.overall, ""),
    ):
        # What cannot be told is said once, by the overall verdict.
        if name in rules and not (name == "unknown" and verdict.overall in BY_OVERALL):
            yield rules[name], text, where
    if verdict.exit_code:
        for lane in audit.findings:
            for one in lane.evidence:
                if one.p_value is not None and one.p_value <= UNUSUAL:
                    yield UNUSUAL_STATISTIC, in_words(one), one.where


def in_words(one: Evidence) -> str:
    """Returns a statistic as a message."""
    return f"{one.statistic} is {value_text(one)} (p = {p_text(one.p_value)}). {one.meaning}"


@dataclasses.dataclass(frozen=True)
class Places:
    """Where results are: the checkpoint's folder, and the one that their addresses are relative to if it holds the files."""

    folder: pathlib.Path
    working: pathlib.Path

    def location(self, file: str) -> dict[str, Any]:
        """Returns the location of a file of the checkpoint. Its address is percent-encoded, as names may have spaces."""
        place = place_of(self.folder)
        inside = place.is_relative_to(self.working)
        path = (place.relative_to(self.working) / file).as_posix() if inside else file
        artifact = {"uri": urllib.parse.quote(path)} | ({} if inside else {"uriBaseId": FOLDER})
        return {"physicalLocation": {"artifactLocation": artifact, "region": {"startLine": 1}}}

    def of(self, where: str) -> Sequence[str]:
        """Returns the files that hold what a finding is about, at least one."""
        return files_of(self.folder, where) or [main_file(self.folder)]


def result(rule: Rule, text: str, where: str, candidate: str, places: Places) -> dict[str, Any]:
    """Returns one result. Its fingerprint is the same in every audit that finds the same in the same candidate."""
    key = "\0".join((rule.id, candidate, where if rule is not UNUSUAL_STATISTIC else text.split(" is ")[0] + where))
    return {
        "ruleId": rule.id,
        "ruleIndex": RULES.index(rule),
        "level": rule.level,
        "message": {"text": text + (f" It is about {where}." if where else "")},
        "locations": [places.location(file) for file in places.of(where)],
        "partialFingerprints": {"audit/v1": hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()},
    }

"""Writes the findings of an audit as a SARIF 2.1.0 log, which code scanning services and editors show.

A result is what is wrong with the checkpoint; an intact one has none. Each result names a file of the checkpoint, as services
refuse results without one.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from refusal_jax.audit.audit import Audit
from refusal_jax.audit.evidence import Evidence, plain
from refusal_jax.audit.output.checkpoint_files import files_of, main_file, place_of
from refusal_jax.audit.output.record import EMBEDDED
from refusal_jax.audit.output.summary import p_text, value_text
from refusal_jax.audit.resisted import LANE as RESISTANCE
from refusal_jax.report import sarif
from refusal_jax.report.page import model_title
from refusal_jax.report.sarif import Rule

FOLDER = "CHECKPOINT"  # the base of locations in a checkpoint that is outside of the working folder
UNUSUAL = 0.05  # the p-value up to which a statistic is a result of its own


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
BY_RESISTANCE = {
    "lost": Rule(
        "resistance-lost",
        "warning",
        "Whoever has the weights takes the checkpoint's refusal away by a test that is published.",
        "Do not hand out the weights where its refusals are relied on, or defend them.",
        6.0,
    ),
    "weakened": Rule(
        "resistance-weakened",
        "note",
        "Whoever has the weights weakens the checkpoint's refusal by a test that is published.",
        "Do not hand out the weights where its refusals are relied on, or defend them.",
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
RULES = (
    *BY_EDIT.values(),
    *BY_REFUSAL.values(),
    *BY_OVERALL.values(),
    UNUSUAL_STATISTIC,
    *BY_RESISTANCE.values(),
)


def sarif_log(audit: Audit, folder: pathlib.Path, working: pathlib.Path | None = None) -> dict[str, Any]:
    """Returns the log of one audit, to be written as JSON.

    folder: of the candidate. working: the folder that locations are relative to if the candidate is in it, by default the
    current one, which in CI is the repository.
    """
    title = model_title(audit.settings.candidate) or EMBEDDED
    places = Places(folder, (working or pathlib.Path.cwd()).absolute())
    results = [result(rule, text, where, title, places) for rule, text, where in found(audit)]
    left_out = [f"{one.lane}: {one.left_out}" for one in audit.findings if one.left_out]
    return sarif.log(
        RULES,
        results,
        automation=f"refusal_jax/audit/{title}/",
        exit_code=audit.verdict.exit_code,
        notes=left_out,
        bases={FOLDER: f"{place_of(folder).as_uri()}/"},
        properties={
            "overall": audit.verdict.overall,
            "edit": audit.verdict.edit,
            "refuses": audit.verdict.refuses,
            "dose": plain(audit.verdict.dose),
        },
    )


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
    resistance = audit.of(RESISTANCE)
    worst = resistance.facts if resistance else {}
    if worst.get("told") and worst["verdict"] in BY_RESISTANCE:
        yield BY_RESISTANCE[worst["verdict"]], f"It keeps {worst['words']}.", ""
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
    """Tells where results are: the checkpoint's folder, and the one that their addresses are relative to if it holds the
    files."""

    folder: pathlib.Path
    working: pathlib.Path

    def location(self, file: str) -> dict[str, Any]:
        """Returns the location of a file of the checkpoint. Its address is percent-encoded, as names may have spaces."""
        place = place_of(self.folder)
        inside = place.is_relative_to(self.working)
        path = (place.relative_to(self.working) / file).as_posix() if inside else file
        return sarif.location(path, "" if inside else FOLDER)

    def of(self, where: str) -> Sequence[str]:
        """Returns the files that hold what a finding is about, at least one."""
        return files_of(self.folder, where) or [main_file(self.folder)]


def result(rule: Rule, text: str, where: str, candidate: str, places: Places) -> dict[str, Any]:
    """Returns one result. Its fingerprint is the same in every audit that finds the same in the same candidate."""
    about = where if rule is not UNUSUAL_STATISTIC else text.split(" is ")[0] + where
    message = text + (f" It is about {where}." if where else "")
    locations = [places.location(file) for file in places.of(where)]
    return sarif.result(RULES, rule, message, locations, "audit", (candidate, about))

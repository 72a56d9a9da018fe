"""SARIF 2.1.0 logs, which code scanning services and editors show: rules, results, and the log of one run.

A result is something that is wrong. Each names a file, as services refuse results without one.
"""

import dataclasses
import hashlib
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import refusal_jax

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


@dataclasses.dataclass(frozen=True)
class Rule:
    """A kind of result. level: "error", "warning" or "note". text: what it says; help: what to do about it. severity: 0 to 10, as
    services sort security findings."""

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


def location(path: str, base: str = "", line: int = 1) -> dict[str, Any]:
    """Returns the location of a line of a file. path: relative, with slashes; it is percent-encoded, as names may have spaces.
    base: the name of the folder that it is relative to, "" for the one that services take, the repository."""
    artifact = {"uri": urllib.parse.quote(path)} | ({"uriBaseId": base} if base else {})
    return {"physicalLocation": {"artifactLocation": artifact, "region": {"startLine": line}}}


def result(
    rules: Sequence[Rule], rule: Rule, text: str, locations: Sequence[Mapping[str, Any]], job: str, key: Sequence[str]
) -> dict[str, Any]:
    """Returns one result. job: such as "audit"; key: what makes it the same result as in an earlier log, besides its rule."""
    identity = "\0".join((rule.id, *key)).encode("utf-8", "surrogateescape")
    return {
        "ruleId": rule.id,
        "ruleIndex": rules.index(rule),
        "level": rule.level,
        "message": {"text": text},
        "locations": list(locations),
        "partialFingerprints": {f"{job}/v1": hashlib.sha256(identity).hexdigest()},
    }


def log(
    rules: Sequence[Rule],
    results: Sequence[Mapping[str, Any]],
    *,
    automation: str,
    exit_code: int,
    notes: Sequence[str],
    bases: Mapping[str, str],
    properties: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the log of one run, to be written as JSON.

    automation: tells logs of different candidates apart, such as "refusal_jax/audit/NAME/". notes: what else the run says, in
    sentences. bases: the address of each folder that locations are relative to, by its name.
    """
    driver = {"name": "refusal_jax", "version": refusal_jax.__version__, "semanticVersion": refusal_jax.__version__}
    invocation = {
        "executionSuccessful": True,
        "exitCode": exit_code,
        "endTimeUtc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "toolExecutionNotifications": [{"level": "note", "message": {"text": text}} for text in notes],
    }
    run = {
        "tool": {"driver": {**driver, "rules": [rule.descriptor for rule in rules]}},
        "automationDetails": {"id": automation},
        "originalUriBaseIds": {name: {"uri": uri} for name, uri in bases.items()},
        "invocations": [invocation],
        "results": list(results),
        "properties": dict(properties),
    }
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}

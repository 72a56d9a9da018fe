"""Makes each resistance test a stage of the checkpoint's study, so that a finished one is kept and skipped."""

import hashlib
import os
from typing import Any

from refusal_jax.checkpoints.fingerprint import checkpoint_fingerprint
from refusal_jax.files import file_hash, local_path
from refusal_jax.resistance.attack import Attack, Budget, Measured, Outcome
from refusal_jax.resistance.cost import study_cost
from refusal_jax.resistance.openings import FILES
from refusal_jax.resistance.subject import Subject
from refusal_jax.resistance.worst import refuses_too_little
from refusal_jax.runs.artifacts import (
    CANDIDATES,
    DIRECTION,
    FILTER,
    MEANS,
    METADATA,
    NO_DIRECTION,
    PROMPTS,
    SETUP,
    UNATTACKED,
    attacked_replies_name,
    resistance_name,
)
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.stage import Stage

OF_STUDY = (PROMPTS, SETUP, FILTER, MEANS, CANDIDATES, METADATA, DIRECTION, NO_DIRECTION)
SHARED = ("judge", "max_new_tokens", "seed", "seconds", "texts")  # settings that decide every test's outcome


def write_measured(subject: Subject, name: str, file: str, measured: Measured, more: dict[str, Any]) -> None:
    """Writes what was measured and, where the settings ask for texts, the replies."""
    if subject.settings.texts:
        subject.run.write_json(attacked_replies_name(name), measured.replies)
    subject.run.write_json(file, {"test": name, **more, **measured.record})


def measure_plain(subject: Subject, ledger: Ledger) -> None:
    """Writes what the checkpoint does without any attack, how many parameters it has, and what its own study cost."""
    more = {"parameters": subject.parameters, "study": study_cost(subject)}
    write_measured(subject, "unattacked", UNATTACKED, subject.unattacked(), more)


PLAIN: Stage[Subject] = Stage(
    "resistance: unattacked",
    measure_plain,
    reads=OF_STUDY,
    writes=(UNATTACKED, attacked_replies_name("unattacked")),
    given=lambda subject: {name: value_of(subject, name) for name in ("judge", "max_new_tokens", "texts")},
)


def stage_of(attack: Attack) -> Stage[Subject]:
    """Returns the stage that does a test and writes its outcome. Where the test cannot be done, nothing is written."""

    def work(subject: Subject, ledger: Ledger) -> None:
        budget = Budget(subject.settings.seconds or float("inf"), subject.parameters)
        found = attack.run(subject, subject.settings, budget)
        write_measured(
            subject, attack.name, resistance_name(attack.name), found.measured, outcome_record(found, budget)
        )

    def given(subject: Subject) -> dict[str, Any]:
        return {name: value_of(subject, name) for name in (*SHARED, *attack.settings)}

    def skipped(subject: Subject) -> str:
        if refuses_too_little(subject.plain()):
            return "The checkpoint refuses too little without an attack."
        return attack.impossible(subject, subject.settings)

    return Stage(
        f"resistance: {attack.name}",
        work,
        reads=(*OF_STUDY, UNATTACKED),
        writes=(resistance_name(attack.name), attacked_replies_name(attack.name)),
        skipped=skipped,
        given=given,
        about=attack.about,
    )


def outcome_record(found: Outcome, budget: Budget) -> dict[str, Any]:
    """Returns all of an outcome but what was measured, as plain values."""
    return {
        "chosen": found.chosen,
        "used": found.used,
        "stop": found.stop,
        "note": found.note,
        "seconds": round(budget.spent, 3),
        "flops": budget.flops,
    }


def value_of(subject: Subject, name: str) -> Any:
    """Returns a setting as it decides a test's outcome: of a checkpoint its fingerprint, of a direction its values' hash,
    of a judge also what it reads, and of files that a section names also their hashes."""
    if name == "base":
        return checkpoint_fingerprint(subject.base) if subject.base else ""
    if name == "direction":
        return hashlib.sha256(subject.given.raw_jd.tobytes()).hexdigest() if subject.given else ""
    value = subject.settings[name]
    if name == "judge":
        fingerprint = subject.judge.fingerprint()
        return [value, fingerprint] if fingerprint else value
    if not hasattr(value, "to_dict"):
        return value
    own = value.to_dict()
    named = {key: one for key, one in own.items() if isinstance(one, str) and one.lower().endswith(FILES)}
    files = {key: file_hash(local_path(one)) for key, one in named.items() if os.path.isfile(local_path(one))}
    return own | {"files": files} if files else own

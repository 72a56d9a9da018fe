"""Writes an audit down as one JSON document, whose form `audit.schema.json` describes."""

import pathlib
import time
from typing import Any

from refusal_jax.audit.audit import Audit
from refusal_jax.audit.evidence import plain
from refusal_jax.chat.model import demo_model_path
from refusal_jax.checkpoints.mirrors import source_name
from refusal_jax.checkpoints.remote import checkpoint_folder
from refusal_jax.runs.run import versions

# The number rises when a field is taken away or changes its meaning. Fields may be added under the same number.
SCHEMA = "refusal_jax/audit/1"
SCHEMA_FILE = pathlib.Path(__file__).with_name("audit.schema.json")
EMBEDDED = "the embedded model"


def audit_record(audit: Audit) -> dict[str, Any]:
    """Returns an audit in plain values for JSON: verdict, what each lane found, settings and versions. It holds no text that a
    model wrote, unless a lane quotes a template."""
    settings, verdict = audit.settings, audit.verdict
    low_high = dict(zip(("value", "low", "high"), plain(verdict.dose), strict=True)) if verdict.dose else None
    return {
        "schema": SCHEMA,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
        "candidate": named(settings.candidate),
        "base": named(settings.base) if settings.base else None,
        "verdict": {
            "overall": verdict.overall,
            "edit": verdict.edit,
            "refuses": verdict.refuses,
            "dose": low_high,
            "sentences": list(verdict.sentences),
            "details": plain(dict(verdict.details)),
            "exit_code": verdict.exit_code,
        },
        "lanes": [found.record for found in audit.findings],
        "settings": plain(settings.to_dict()),
    }


def named(checkpoint: str) -> dict[str, str]:
    """Returns what a user calls a checkpoint, and by what it is found again: the hub's name with its commit, or a path."""
    if not checkpoint:
        return {"name": EMBEDDED, "source": EMBEDDED}
    return {"name": checkpoint, "source": source_name(checkpoint_folder(checkpoint, adapters=True))}


def opened(checkpoint: str) -> pathlib.Path:
    """Returns the folder of a checkpoint by what a user calls it, "" for the embedded model. Raises UserError as
    `checkpoint_folder` does."""
    return checkpoint_folder(checkpoint, adapters=True) if checkpoint else demo_model_path()

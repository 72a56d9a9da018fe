"""Writes everything that an audit leaves in a folder."""

import pathlib
from collections.abc import Mapping

from refusal_jax.audit.audit import Audit
from refusal_jax.audit.output.attestation import audit_statement, signed
from refusal_jax.audit.output.page import audit_page
from refusal_jax.audit.output.record import audit_record, opened
from refusal_jax.audit.output.sarif import sarif_log
from refusal_jax.checkpoints.fingerprint import checkpoint_fingerprint
from refusal_jax.errors import UserError, setting
from refusal_jax.files import to_json, write_atomically

RECORD, SARIF, PAGE = "audit.json", "audit.sarif", "audit.html"
STATEMENT, ENVELOPE = "audit.statement.json", "audit.intoto.json"


def write_outputs(
    audit: Audit, out: pathlib.Path, replies: bool = False, statement: bool = False, key: pathlib.Path | None = None
) -> list[pathlib.Path]:
    """Writes record, SARIF log and page of an audit into a folder, and returns their paths; files of the same names are replaced.

    replies: whether what the models replied is written, too, and shown on the page. statement: whether an in-toto statement is
    written; key: a private key that signs it. Raises UserError for a key that cannot sign, and where a file cannot be written.
    """
    files = {
        RECORD: to_json(audit_record(audit)),
        SARIF: to_json(sarif_log(audit, opened(audit.settings.candidate))),
        PAGE: audit_page(audit, replies).encode("utf-8", "replace"),
    }
    if statement or key:
        made = audit_statement(audit)
        files[STATEMENT] = to_json(made)
        if key:
            files[ENVELOPE] = signed(made, key)
    if replies:
        for found in audit.findings:
            for name, rows in found.replies.items():
                files[f"completions/{name}_completions.json"] = to_json([dict(row) for row in rows])
    for name, content in files.items():
        write_atomically(out / name, content)
    return [out / name for name in files]


def check_place(out: pathlib.Path, *checkpoints: str) -> None:
    """Raises UserError for a folder that lies in one of the checkpoints, whose files would then be others."""
    for name in checkpoints:
        if out.absolute().is_relative_to(opened(name).absolute()):
            raise UserError(
                f"{setting('out', str(out))} lies in the folder of a checkpoint, which the audit must not change. Choose another."
            )


def fingerprints(*checkpoints: str) -> dict[str, str]:
    """Returns the fingerprint of each checkpoint by its name, so that it can be told whether one changes during an audit."""
    return {name: checkpoint_fingerprint(opened(name)) for name in checkpoints}


def check_unchanged(before: Mapping[str, str]) -> None:
    """Raises UserError if a checkpoint is no longer the one that it was when `before` was taken by `fingerprints`."""
    for name, fingerprint in before.items():
        if checkpoint_fingerprint(opened(name)) != fingerprint:
            raise UserError(
                f"{opened(name)} was changed while it was audited, so that no statement can be made about it. Audit it again."
            )

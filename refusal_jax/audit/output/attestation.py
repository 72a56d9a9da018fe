"""Makes an in-toto statement of an audit, signs it, and verifies it against the files of a checkpoint.

The statement (in-toto Statement v1) names every file of the checkpoint with its sha256, and says by whom, with which settings,
prompts and judge it was audited, and what the verdict was. It is signed as a DSSE envelope with a key of the user's, by
`refusal_jax.signatures`.
"""

import hashlib
import json
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import refusal_jax
from refusal_jax.audit.audit import Audit
from refusal_jax.audit.output.checkpoint_files import checkpoint_hashes
from refusal_jax.audit.output.record import EMBEDDED, audit_record, opened
from refusal_jax.audit.settings import AuditSettings
from refusal_jax.audit.subject import Opened, draw_prompts
from refusal_jax.chat.model import demo_model_path
from refusal_jax.chat.prompts import Chat
from refusal_jax.checkpoints.fingerprint import checkpoint_fingerprint
from refusal_jax.checkpoints.tensors import listed
from refusal_jax.errors import UserError, VerificationError, setting
from refusal_jax.export.provenance import base_model
from refusal_jax.files import read_json, to_json
from refusal_jax.judges.choice import parse_judges
from refusal_jax.models.hf_config import load_config
from refusal_jax.signatures import Envelope, PrivateKey, PublicKey

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "urn:refusal-jax:audit:v1"
PAYLOAD = "application/vnd.in-toto+json"
ASKING = ("activations", "behaviour")  # the lanes that depend on prompts, template and judge


def audit_statement(audit: Audit) -> dict[str, Any]:
    """Returns the statement of an audit, for JSON. Raises UserError if a file of the candidate cannot be hashed."""
    settings, record = audit.settings, audit_record(audit)
    folder = opened(settings.candidate)
    predicate = {
        "auditor": {"name": "refusal_jax", "version": refusal_jax.__version__, "versions": record["versions"]},
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "candidate": base_model(folder, "" if settings.candidate else EMBEDDED),
        "base": base_model(opened(settings.base)) if settings.base else None,
        "verdict": record["verdict"],
        "lanes": {found.lane: found.left_out or "ran" for found in audit.findings},
        "settings": {name: _without_place(value) for name, value in record["settings"].items()},
        "record": {"schema": record["schema"], "digest": {"sha256": _sha256(to_json(record["lanes"]))}},
    }
    if any(not found.left_out and found.lane in ASKING for found in audit.findings):
        predicate |= asked(settings)
    subjects = [
        {"name": name, "digest": {"sha256": sha256}} for name, sha256 in checkpoint_hashes(folder, True).items()
    ]
    return {"_type": STATEMENT, "subject": subjects, "predicateType": PREDICATE, "predicate": predicate}


def _without_place(value: Any) -> Any:
    """Returns a setting as others may read it: of a path its last part, as where a file lies is nobody's business."""
    return pathlib.PurePath(value).name if isinstance(value, str) and os.path.exists(value) else value


def asked(settings: AuditSettings) -> dict[str, Any]:
    """Returns what the replies depend on besides the model: the hashes of the chat template and of each part of the prompts, and
    the judge with the fingerprint of its files."""
    folder = Opened(settings.candidate or str(demo_model_path()), settings).folder  # of an adapter on its base
    cfg = load_config(folder)
    chat = Chat.load(
        folder, cfg.context_length, cfg.vocab_size, settings.chat_template, settings.thinking, settings.system_prompt
    )
    (judge,) = parse_judges([settings.judge], 1, settings.dtype)
    prompts = {name: {"count": len(rows), "digest": digest(rows)} for name, rows in draw_prompts(settings).items()}
    template = str(chat.tokenizer.chat_template)
    return {
        "template": {"origin": chat.template_origin, "digest": digest(template)},
        "prompts": prompts,
        "judge": {"name": judge.name, "fingerprint": judge.fingerprint() or None},
    }


def digest(value: Any) -> dict[str, str]:
    """Returns the sha256 of a text, or of other plain values as JSON without spaces, as in-toto writes digests."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return {"sha256": _sha256(text.encode("utf-8", "surrogatepass"))}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def signed(statement: Mapping[str, Any], key: pathlib.Path) -> bytes:
    """Returns the envelope of a statement, signed, for a file.

    key: a private key in PEM, as of `PrivateKey`, which says what is raised.
    """
    return PrivateKey(key).signed(to_json(statement), PAYLOAD)


def verified(file: pathlib.Path, key: pathlib.Path | None, checkpoint: str, base: str = "") -> dict[str, Any]:
    """Returns the statement in a signed file, once it is found to be true of a checkpoint's files.

    key: the public key in PEM that must have signed it. checkpoint: as in `AuditSettings.candidate`. base: if given, it has to be
    the one that the statement compares with. Raises UserError for a file that is no envelope and for a key that cannot be used,
    and VerificationError for a signature of another key, for a statement about something else, for every file that is missing,
    changed or new, and for another base.
    """
    statement = _payload(file, key)
    subjects = _subjects(file, statement)
    folder = opened(checkpoint)
    there = checkpoint_hashes(folder, False)
    if file.absolute().is_relative_to(folder.absolute()):  # the statement may be shipped with the checkpoint
        there.pop(file.absolute().relative_to(folder.absolute()).as_posix(), None)
    wrong = [f"{name} is missing" for name in subjects if name not in there]
    wrong += [f"{name} has changed" for name in subjects if name in there and there[name] != subjects[name]]
    wrong += [f"{name} is new" for name in there if name not in subjects]
    if wrong:
        raise VerificationError(
            f"{folder} is not the checkpoint that {file} is about: {listed(wrong)}. The verdict says nothing about these files: "
            "get the checkpoint again, or audit it."
        )
    compared = statement["predicate"].get("base") or {}
    if base and compared.get("fingerprint") != checkpoint_fingerprint(opened(base)):
        raise VerificationError(
            f"{opened(base)} is not the base that {file} compares with, which is {compared.get('name', 'none')}. Name that one."
        )
    return statement


def _payload(file: pathlib.Path, key: pathlib.Path | None) -> dict[str, Any]:
    """Returns what a signed file holds, if the key's owner signed it."""
    data = read_json(file)
    if data.get("_type") == STATEMENT:
        raise VerificationError(f"{file} is a statement that nobody has signed, so that anyone may have changed it.")
    if key is None:
        name = (setting("key") or "key").removesuffix("=")
        raise UserError(f"{name} is missing: name the public key, in PEM, of whoever signed {file}.")
    public = PublicKey(key)
    try:
        envelope = Envelope(data)
    except ValueError as error:
        raise UserError(f"{file} is no signed statement ({error}). Name the audit.intoto.json of an audit.") from None
    if not envelope.is_signed_by(public):
        raise VerificationError(
            f"{file} was not signed with the private key of {key}, or it was changed afterwards. Do not rely on it."
        )
    statement = envelope.document
    found = (envelope.payload_type, statement.get("_type") if isinstance(statement, dict) else None)
    if found != (PAYLOAD, STATEMENT) or statement.get("predicateType") != PREDICATE:
        raise VerificationError(
            f"{file} is signed, but it is no statement of an audit: its type is {found[1]} with the predicate "
            f"{statement.get('predicateType') if isinstance(statement, dict) else None}, expected {PREDICATE}."
        )
    return statement


def _subjects(file: pathlib.Path, statement: Mapping[str, Any]) -> dict[str, str]:
    """Returns the sha256 of each file that a statement is about, by name."""
    try:
        subjects = {one["name"]: one["digest"]["sha256"] for one in statement["subject"]}
        verdict = statement["predicate"]["verdict"]
        whole = bool(subjects) and isinstance(verdict["overall"], str) and isinstance(verdict["sentences"], list)
    except (KeyError, TypeError):
        whole, subjects = False, {}
    if not whole:
        raise VerificationError(f"{file} is signed, but its statement names no files or no verdict. Audit again.")
    return subjects

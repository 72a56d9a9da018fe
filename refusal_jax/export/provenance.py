"""Records where an export comes from in `refusal_jax.json`, and checks that its files are still those that were written."""

import pathlib
import time

from refusal_jax.checkpoints.fingerprint import checkpoint_fingerprint
from refusal_jax.checkpoints.mirrors import on_the_hub, source_name
from refusal_jax.checkpoints.tensors import listed
from refusal_jax.errors import UserError, VerificationError
from refusal_jax.export.staging import PROVENANCE, UNVERIFIED
from refusal_jax.files import file_hash, read_json, to_json
from refusal_jax.hub import COMMIT
from refusal_jax.runs.run import versions


def base_model(folder: pathlib.Path, name: str = "") -> dict:
    """Returns what a checkpoint folder tells about itself: its name (`name` if given), its revision on the hub or None, and the
    fingerprint of `checkpoint_fingerprint`, but not where it lies on this machine."""
    named = on_the_hub(folder)
    if named is not None:
        repository, revision = named.repo, named.revision
    else:
        repository, revision = source_name(folder).rstrip("/").rpartition("/")[2], None
        record = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"  # of `hf download --local-dir`
        if record.is_file():
            first = record.read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip()
            revision = first if COMMIT.fullmatch(first) else None
    return {"name": name or repository, "revision": revision, "fingerprint": checkpoint_fingerprint(folder)}


def write_provenance(folder: pathlib.Path, record: dict, hashes: dict[str, str]) -> None:
    """Writes `refusal_jax.json`: `record`, versions, the time, and the sha256 of every other file, of which `hashes` are
    known."""
    files = {name: hashes.get(name) or file_hash(folder / name) for name in file_names(folder)}
    made = {"versions": versions(), "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    (folder / PROVENANCE).write_bytes(to_json(record | made | {"files": files}))


def file_names(folder: pathlib.Path) -> list[str]:
    """Returns all files below a folder, without hidden ones and the provenance."""
    found = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    return sorted(p.as_posix() for p in found if p.name != PROVENANCE and not any(s.startswith(".") for s in p.parts))


def check(folder: pathlib.Path) -> dict:
    """Returns the provenance of an export whose files are all as they were written.

    Raises UserError for a folder that is no export or whose record is damaged, and lists every file that is missing,
    changed or new.
    """
    if not (folder / PROVENANCE).is_file():
        raise UserError(f"{folder} holds no {PROVENANCE}, so it is no export of ours. Pass the folder of one.")
    record = read_json(folder / PROVENANCE)
    listing = record.get("files")
    files: dict[str, str] = listing if isinstance(listing, dict) else {}
    outside = [n for n in files if pathlib.PurePosixPath(n).is_absolute() or ".." in n.split("/")]
    if not isinstance(listing, dict) or not all(isinstance(value, str) for value in files.values()) or outside:
        raise UserError(
            f"{folder / PROVENANCE} is damaged: {'it names files outside its folder' if outside else 'it lists no files'}. Do "
            "not use this export; make it again."
        )
    there = set(file_names(folder))
    wrong = [f"{name} is missing" for name in files if name not in there]
    wrong += [f"{name} has changed" for name in files if name in there and file_hash(folder / name) != files[name]]
    wrong += [f"{name} is not part of the export" for name in sorted(there - set(files))]
    if wrong:
        raise VerificationError(f"{folder} is not as it was exported: {listed(wrong)}. Export again, or copy it again.")
    if (folder / UNVERIFIED).exists() or not record.get("verified"):
        raise VerificationError(
            f"The files of {folder} are those that were exported, but the export was not verified: see its {UNVERIFIED} and "
            "export.json."
        )
    return record

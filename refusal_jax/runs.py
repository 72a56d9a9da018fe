"""A run's folder: manifest, atomic writes, resume.

Every artifact is written to a temporary file and renamed, so a file that exists is whole. The manifest records the
config, the hashes of model and data, and for each finished stage the hashes of what it read and wrote: a rerun skips
stages whose records still hold, and continues inside a stage from its ledger.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Sequence

import numpy as np
from safetensors.numpy import load_file, save

from refusal_jax.data.prompts import file_hash
from refusal_jax.errors import UserError

MANIFEST = "manifest.json"
PACKAGES = ("refusal-jax", "jax", "flax", "transformers", "numpy", "safetensors")


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Writes `data` to `path` so that a crash leaves the old file or the new one, never a part.

    Raises UserError if the disk is full, read-only or not ours to write.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise cannot_write(path, error) from None


def cannot_write(path: pathlib.Path, error: OSError) -> UserError:
    """The error for a failed write, with what to do about it."""
    return UserError(
        f"{path} could not be written: {error.strerror or error}. Free space on the disk or choose a folder "
        "that you may write to, then run the same command again: finished work is kept."
    )


def to_json(value) -> bytes:
    # A lone surrogate, which JSON can carry but UTF-8 cannot, must not cost the run.
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace")


@dataclasses.dataclass
class Ledger:
    """Rows of finished work inside a stage, one JSON object a line, kept until the stage is done."""

    path: pathlib.Path
    rows: list[dict]

    @classmethod
    def open(cls, path: pathlib.Path) -> "Ledger":
        """Reads what is there; a last line torn by a crash is dropped."""
        rows = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError:
                    break
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        return cls(path, rows)

    def append(self, rows: Sequence[dict]) -> None:
        """Adds rows and puts them on the disk. Raises UserError if the disk does not take them."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from None
        self.rows += rows


class Run:
    """One study in one folder; open it with `Run.open` as a context manager."""

    def __init__(self, folder: pathlib.Path, manifest: dict, new: bool = False):
        self.folder, self.manifest, self.new = folder, manifest, new
        self.worked = []  # names of the stages that did work in this process

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: str | pathlib.Path, config: dict, inputs: dict):
        """Creates the folder, or continues the run that is in it, and keeps other processes out.

        config: the study's settings. inputs: names and hashes of model and data. Raises UserError if the folder holds
        a run of other settings or inputs, holds something else, is in use, or cannot be written.
        """
        folder = pathlib.Path(folder)
        fresh = json.loads(to_json({"config": config, "inputs": inputs, "stages": {}}))
        path = folder / MANIFEST
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file. Pass a folder as --workdir.")
        others = [p.name for p in folder.iterdir() if not p.name.startswith(".")] if folder.is_dir() else []
        if others and not path.exists():
            raise UserError(
                f"{folder} is not empty ({', '.join(sorted(others)[:5])}) and holds no {MANIFEST}, so it is not a run's "
                "folder. Pass a new folder as --workdir."
            )
        with lock_folder(folder):
            new = not path.exists()
            if not new:
                manifest = read_manifest(path)
                check_same(folder, manifest, fresh)
            else:
                manifest = fresh
                write_atomically(path, to_json(manifest))
            for leftover in folder.rglob(".*.tmp-*"):
                leftover.unlink(missing_ok=True)
            yield cls(folder, manifest, new)

    def discard(self) -> None:
        """Removes what this run wrote, and its folder if nothing else is in it: bad input leaves no trace."""
        written = [file for stage in self.manifest["stages"].values() for file in stage["writes"]]
        for path in (*map(self.path, written), self.path(MANIFEST), self.path(".lock"), *self.folder.glob(".ledger-*")):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def path(self, name: str) -> pathlib.Path:
        return self.folder / name

    def write_json(self, name: str, value) -> None:
        write_atomically(self.path(name), to_json(value))

    def read_json(self, name: str):
        return json.loads(self.path(name).read_text(encoding="utf-8"))

    def write_tensors(self, name: str, tensors: dict[str, np.ndarray]) -> None:
        write_atomically(self.path(name), save({k: np.ascontiguousarray(v) for k, v in tensors.items()}))

    def read_tensors(self, name: str) -> dict[str, np.ndarray]:
        return load_file(self.path(name))

    def stage(
        self, name: str, inputs: Sequence[str], outputs: Sequence[str], work: Callable[[Ledger], dict | None]
    ) -> bool:
        """Runs `work(ledger)` unless the stage is done and what it read and wrote is unchanged; True if it ran.

        inputs and outputs are file names in the folder; `work` must write every output. What it returns, if anything,
        is recorded as `found`: what the stage settled that the config left open.
        """
        reads = {file: file_hash(self.path(file)) for file in inputs}
        record = self.manifest["stages"].get(name)
        if (
            record
            and record["reads"] == reads
            and all(self.path(f).exists() and file_hash(self.path(f)) == h for f, h in record["writes"].items())
        ):
            return False
        tag = hashlib.sha256(json.dumps(reads, sort_keys=True).encode()).hexdigest()[:12]
        ledger = Ledger.open(self.path(f".ledger-{name}-{tag}.jsonl"))
        start = time.monotonic()
        found = work(ledger)
        self.worked.append(name)
        self.manifest["stages"][name] = {
            "reads": reads,
            "writes": {file: file_hash(self.path(file)) for file in outputs},
            "seconds": round(time.monotonic() - start, 3),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": versions(),
            **({"found": found} if found else {}),
        }
        self.write_json(MANIFEST, self.manifest)
        for stale in self.folder.glob(f".ledger-{name}-*.jsonl"):
            stale.unlink()
        return True


@contextlib.contextmanager
def lock_folder(folder: pathlib.Path):
    """Keeps other processes out of a run's folder, which it creates. Raises UserError if one is in it."""
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(path, "w")  # noqa: SIM115, closed by the with below
    except OSError as error:
        raise cannot_write(path, error) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Another process is working in {folder}. Wait for it, or choose another --workdir."
            ) from None
        yield


def read_manifest(path: pathlib.Path) -> dict:
    """A run's manifest; raises UserError if the file is damaged."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(manifest[key], dict) for key in ("config", "inputs", "stages")):
            return manifest
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path} is damaged, so the run in its folder cannot be continued. Pass a new folder as --workdir.")


def check_same(folder: pathlib.Path, old: dict, new: dict) -> None:
    """Raises UserError that lists every setting and input in which a folder's run differs from the one asked for."""
    before, now = ({**_flat(m["config"], ""), **_flat(m["inputs"], "input ")} for m in (old, new))
    changed = [
        f"{key} was {before.get(key)!r}, is now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise UserError(
            f"{folder} holds a run of another study: {'; '.join(changed[:5])}"
            f"{f'; and {len(changed) - 5} more' if len(changed) > 5 else ''}. Pass a new --workdir, or the old "
            "settings to continue that run."
        )


def _flat(tree: dict, prefix: str) -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def versions() -> dict[str, str]:
    """The versions that results may depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def checkpoint_fingerprint(folder: pathlib.Path) -> str:
    """A hash of a checkpoint: small files whole, of large ones the size and 16 samples of 64 KiB.

    Enough to notice a changed or swapped checkpoint in milliseconds; not a proof of equality for files over 8 MiB.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with open(path, "rb") as file:
            if size <= 8 << 20:
                digest.update(file.read())
            else:
                for sample in range(16):
                    file.seek(sample * (size - 65536) // 15)
                    digest.update(file.read(65536))
    return digest.hexdigest()

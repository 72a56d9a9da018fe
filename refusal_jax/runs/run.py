"""A run's folder: manifest, stages, resume.

The manifest records the config, the hashes of model and data, and for each finished stage the hashes of what it read and
wrote: a rerun skips stages whose records still hold, and continues inside a stage from its ledger. Of several processes,
process 0 owns the folder; the others do the stages that it says are due, and get every artifact from it, so that all go on
with the same numbers and need no common file system.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from refusal_jax import distributed
from refusal_jax.errors import UserError
from refusal_jax.files import to_json
from refusal_jax.runs import log
from refusal_jax.runs.artifacts import NO_DIRECTION
from refusal_jax.runs.ledger import Ledger, Storage
from refusal_jax.runs.stage import S, Stage
from refusal_jax.runs.storage import DiskFolder, ObjectFolder, ToldFiles, named_by, open_storage

MANIFEST = "manifest.json"
GIVEN = "settings of the stage"  # among what the manifest records that a stage has read
LOG = logging.getLogger(__name__)
PACKAGES = ("refusal-jax", "jax", "flax", "transformers", "numpy", "safetensors")


class Run:
    """One study in one folder; open it with `Run.open` as a context manager."""

    def __init__(self, folder: str | os.PathLike, manifest: dict, new: bool = False, storage: Storage | None = None):
        self.storage = storage or open_storage(folder)
        self.manifest, self.new = manifest, new
        self._parsed: dict[str, tuple[bytes, Any]] = {}  # what the stage at work has read, by name
        self._wrote: set[str] = set()  # the files that the stage at work has written
        self.worked: list[str] = []  # names of the stages that did work in this process
        self.log: log.LogFile | None = None  # of the process that owns the folder

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, folder: str | os.PathLike, config: dict, inputs: dict, retried: Mapping[str, Sequence[str]] | None = None
    ):
        """Creates the folder, or continues the run that is in it, and keeps other processes out.

        folder: on a disk, or gs://BUCKET/FOLDER, from which other runs are not kept out. config: the study's settings.
        inputs: names and hashes of model and data. retried: for stages by name, the settings that may be changed if the run in
        the folder found no direction; these stages are then due again. Raises UserError if the folder holds a run of other
        settings or inputs, holds something else, is in use, or cannot be written, and if process 0 runs other settings or
        inputs.
        """
        fresh = json.loads(to_json({"config": config, "inputs": inputs, "stages": {}}))
        check_alike(distributed.gather_json(fresh))
        if not distributed.first():
            manifest, new = distributed.share_json(None)
            yield cls(folder, manifest, new, ToldFiles(folder))
            return
        storage = open_storage(folder)
        folder = storage.place()
        others = [name for name in storage.names() if not name.startswith(".")]
        if others and MANIFEST not in others:
            raise UserError(
                f"{folder} is not empty ({', '.join(others[:5])}) and holds no {MANIFEST}, so it is not a run's "
                f"folder. Pass a new folder{named_by()}."
            )
        with storage.held():
            new = not storage.exists(MANIFEST)
            if not new:
                manifest = old = _parsed_manifest(storage.place(MANIFEST), storage.read(MANIFEST))
                if storage.exists(NO_DIRECTION):
                    manifest = try_again(old, fresh, retried or {})
                check_same(folder, manifest, fresh)
                if manifest != old:
                    storage.write(MANIFEST, to_json(manifest))
            else:
                manifest = fresh
                storage.write(MANIFEST, to_json(manifest))
            distributed.share_json([manifest, new])
            run = cls(folder, manifest, new, storage)
            with log.kept(storage) as run.log:
                yield run

    @property
    def folder(self):
        """Returns the path or the address of the folder."""
        return self.storage.place()

    @property
    def _owned(self) -> DiskFolder | ObjectFolder:
        """Returns the folder, in the process that owns it."""
        assert not isinstance(self.storage, ToldFiles)
        return self.storage

    def discard(self) -> None:
        """Removes what this run wrote, and its folder if nothing else is in it: bad input leaves no trace."""
        if distributed.first():
            written = [file for stage in self.manifest["stages"].values() for file in stage["writes"]]
            if self.log:
                self.log.drop()
            self._owned.remove([*written, MANIFEST, *self._ledgers("")])
            self._owned.remove_folder()

    def path(self, name: str):
        """Returns where a file is, for people; of one of several processes, where process 0 has it."""
        return self.storage.place(name)

    def exists(self, name: str) -> bool:
        return self.storage.exists(name)

    def hash(self, name: str) -> str:
        """Returns a file's sha256, in hex."""
        return hashlib.sha256(self.storage.read(name)).hexdigest()

    def write(self, name: str, data: bytes) -> None:
        """Writes a file at once and whole, if this process owns the folder. Raises UserError if that fails."""
        self.storage.write(name, data)
        self._wrote.add(name)

    def intact(self, name: str) -> bool:
        """Returns whether a file is there as the stage that is recorded to have written it left it."""
        hashes = [record["writes"][name] for record in self.manifest["stages"].values() if name in record["writes"]]
        return self.exists(name) and self.hash(name) in hashes

    def write_json(self, name: str, value) -> None:
        self.write(name, to_json(value))

    def read_json(self, name: str):
        """Returns the value of a JSON file, which is parsed once in a stage. It is shared: change a copy."""
        return self._read(name, json.loads)

    def write_tensors(self, name: str, tensors: dict[str, np.ndarray]) -> None:
        self.write(name, save({k: np.ascontiguousarray(v) for k, v in tensors.items()}))

    def read_tensors(self, name: str) -> dict[str, np.ndarray]:
        """Returns the arrays of a safetensors file, which is parsed once in a stage. They are shared: change copies."""
        return self._read(name, load)

    def _read(self, name: str, parse: Callable[[bytes], Any]) -> Any:
        """Returns a parsed file, parsed again only if its bytes have changed."""
        data = self.storage.read(name)
        if name not in self._parsed or self._parsed[name][0] != data:
            self._parsed[name] = data, parse(data)
        return self._parsed[name][1]

    def stage(self, stage: Stage[S], shared: S) -> bool:
        """Runs a stage unless it cannot be done, or is done and what it read and wrote is unchanged; returns whether it ran.

        shared: what the work is given. What it returns, if anything, is recorded as `found`: what the stage settled that the
        config left open. Of several processes all work, or only process 0 where the stage needs no device; all have the outputs
        afterwards.
        """
        name, alone, owner = stage.name, stage.without_devices(shared), distributed.first()
        if reason := stage.skipped(shared):
            self._skip(name, reason)
            return False
        ledger, reads = self._due(name, stage.inputs(shared), stage.given(shared)) if owner else (None, {})
        due, rows = distributed.share_json([ledger is not None, ledger.rows if ledger else []])
        if due and (owner or not alone):
            LOG.info(f"{name}: {'continues from ' + str(len(rows)) + ' rows' if rows else 'starts'}")
            start = time.monotonic()
            self._wrote.clear()
            found = stage.work(shared, ledger or Ledger(self.storage, name, rows))
            seconds = time.monotonic() - start
            if owner:
                outputs = [file for file in stage.outputs(shared) if file in self._wrote]
                self._record(name, reads, outputs, round(seconds, 3), found)
            LOG.info(f"{name}: done in {seconds:.1f} s")
        if due:
            self.worked.append(name)
        else:
            LOG.info(f"{name}: done before, skipped")
        if self.log:
            self.log.flush()
        self._parsed.clear()
        self._pass_on(name)
        return due

    def tell(self) -> None:
        """Gives what stages have written before to the other processes, for stages that are added to a finished run."""
        for name in list(self.manifest["stages"]):
            self._pass_on(name)

    def _skip(self, name: str, reason: str) -> None:
        """Enters into the manifest that a stage cannot be done, and removes what it once wrote."""
        LOG.info(f"{name}: skipped. {reason}")
        if distributed.first() and self.manifest["stages"].get(name, {}).get("skipped") != reason:
            self._record(name, {}, [], 0.0, None)
            self.manifest["stages"][name]["skipped"] = reason
            self.write_json(MANIFEST, self.manifest)

    def _due(self, name: str, inputs: Sequence[str], given: dict) -> tuple[Ledger | None, dict]:
        """Returns the stage's ledger if it is to be done, else None; and the hashes of its inputs and of what it is given."""
        reads = {file: self.hash(file) for file in inputs if self.exists(file)}
        if given:
            reads[GIVEN] = hashlib.sha256(to_json(given)).hexdigest()
        record = self.manifest["stages"].get(name)
        done = (
            record
            and "skipped" not in record
            and record["reads"] == reads
            and all(self.exists(f) and self.hash(f) == h for f, h in record["writes"].items())
        )
        if done:
            return None, reads
        tag = hashlib.sha256(json.dumps(reads, sort_keys=True).encode()).hexdigest()[:12]
        return Ledger.open(self._owned, f".ledger-{name}-{tag}.jsonl"), reads

    def _record(self, name: str, reads: dict, outputs: Sequence[str], seconds: float, found: dict | None) -> None:
        """Enters a stage that is done into the manifest. What it wrote before and not now goes, and so do its ledgers, unless
        there is no direction: then other settings of the selection can still use the scores in them."""
        self._owned.remove([file for file in self._writes(name) if file not in outputs])
        self.manifest["stages"][name] = {
            "reads": reads,
            "writes": {file: self.hash(file) for file in outputs},
            "seconds": seconds,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": versions(),
            **({"found": found} if found else {}),
        }
        self.write_json(MANIFEST, self.manifest)
        if NO_DIRECTION not in outputs:
            self._owned.remove(self._ledgers(f"{name}-"))

    def _writes(self, name: str) -> list[str]:
        """Returns the names of the files that a stage is recorded to have written."""
        return list(self.manifest["stages"].get(name, {}).get("writes", ()))

    def _ledgers(self, prefix: str) -> list[str]:
        return [name for name in self._owned.names() if name.startswith(f".ledger-{prefix}")]

    def _pass_on(self, name: str) -> None:
        """Gives the record and the outputs of a stage to the other processes, if there are any."""
        if not distributed.several():
            return
        if distributed.first():
            written = {file: self.storage.read(file) for file in self._writes(name) if self.exists(file)}
            files = {MANIFEST: to_json(self.manifest["stages"][name]), **written}
            distributed.share(save({file: np.frombuffer(data, np.uint8) for file, data in files.items()}))
        else:
            files = {file: array.tobytes() for file, array in load(distributed.share(None)).items()}
            self.manifest["stages"][name] = json.loads(files.pop(MANIFEST))
            assert isinstance(self.storage, ToldFiles)
            self.storage.told(files)


def recorded_manifest(folder: str | os.PathLike) -> dict | None:
    """Returns the manifest of the run that is in a folder, in every process; None if there is none yet, or it is damaged, which
    `Run.open` says."""
    found = None
    if distributed.first():
        storage = open_storage(folder)
        with contextlib.suppress(UserError):
            if storage.exists(MANIFEST):
                found = _parsed_manifest(storage.place(MANIFEST), storage.read(MANIFEST))
    return distributed.share_json(found)


def read_manifest(path: pathlib.Path) -> dict:
    """Returns a run's manifest. Raises UserError if the file is damaged."""
    return _parsed_manifest(path, path.read_bytes())


def _parsed_manifest(path, data: bytes) -> dict:
    try:
        manifest = json.loads(data)
        if all(isinstance(manifest[key], dict) for key in ("config", "inputs", "stages")):
            return manifest
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path} is damaged, so the run in its folder cannot be continued. Pass a new folder{named_by()}.")


def try_again(old: dict, new: dict, retried: Mapping[str, Sequence[str]]) -> dict:
    """Returns the manifest of a run that found no direction, with those settings of `new` that may be changed in such a run; the
    stages that changed ones decide are due again. retried: these settings, by stage."""
    manifest = {**old, "config": dict(old["config"]), "stages": dict(old["stages"])}
    for stage, names in retried.items():
        changed = [name for name in names if old["config"].get(name) != new["config"].get(name)]
        manifest["config"] |= {name: new["config"].get(name) for name in changed}
        if changed and stage in old["stages"]:
            LOG.info(f"This run found no direction. It tries again with other settings ({', '.join(changed)}).")
            manifest["stages"][stage] = old["stages"][stage] | {"reads": {}}
    return manifest


def check_same(folder, old: dict, new: dict) -> None:
    """Raises UserError that lists every setting and input in which a folder's run differs from the one asked for."""
    changed = differences(old, new, "{} was {!r}, is now {!r}")
    names = [name for name in new["inputs"] if old["inputs"].get(name, new["inputs"][name]) != new["inputs"][name]]
    if old["config"] == new["config"] and names:
        raise UserError(
            f"{folder} holds a run on other files: those of {', '.join(names)} have changed since ({changed}). Pass a new "
            f"folder{named_by()}, or put the old files back to continue that run."
        )
    if changed:
        raise UserError(
            f"{folder} holds a run of another study: {changed}. Pass a new folder{named_by()}, or the old settings to "
            "continue that run."
        )


def check_alike(manifests: list[dict]) -> None:
    """Raises UserError, the same in every process, if not all processes have the settings and inputs of process 0."""
    for index, manifest in enumerate(manifests):
        changed = differences(manifests[0], manifest, "{} is {!r} in process 0, {!r} in process " + str(index))
        if changed:
            raise UserError(
                f"The processes were started for different studies: {changed}. Give all of them the same flags, and "
                "their hosts the same model and data files."
            )


def differences(old: dict, new: dict, words: str) -> str:
    """Returns the settings and inputs in which two manifests differ, each in `words`; empty if there are none."""
    before, now = ({**_flat(m["config"], ""), **_flat(m["inputs"], "input ")} for m in (old, new))
    changed = [
        words.format(key, before.get(key), now.get(key))
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    return "; ".join(changed[:5]) + (f"; and {len(changed) - 5} more" if len(changed) > 5 else "")


def _flat(tree: dict, prefix: str) -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def versions() -> dict[str, str]:
    """Returns the versions that results may depend on, by package."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found

"""Finds a checkpoint by what users write, a folder, an address such as `gs://bucket/folder`, or a name on the hub, and makes it
readable as a folder of this machine."""

import contextlib
import functools
import hashlib
import json
import logging
import os
import pathlib

from refusal_jax.checkpoints.gguf_mirror import as_folder
from refusal_jax.checkpoints.hub import hub_mirror
from refusal_jax.checkpoints.mirrors import ORIGIN, STUB, keep_only, mirrors, write_origin
from refusal_jax.errors import UserError
from refusal_jax.files import local_path, to_json, write_atomically
from refusal_jax.hub import model_name
from refusal_jax.stores import explained, open_store, store_address

LOG = logging.getLogger(__name__)
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")
LARGE = 256 << 20  # bytes: a file above that is no config and no tokenizer, whatever its name
STAMPS = ("md5Hash", "md5", "crc32c", "ETag", "etag", "generation", "LastModified", "updated", "mtime", "created")


def checkpoint_folder(path: str | os.PathLike, weights: bool = True, adapters: bool = False) -> pathlib.Path:
    """Returns the folder of a checkpoint on this machine: `path` itself or, for an address, a name on the hub or a GGUF file, its
    mirror, brought up to date.

    path: a folder; an address such as gs://bucket/folder; or `ORG/NAME`, `ORG/NAME@REVISION` or `ORG/NAME/FILE.gguf`, as a
    string, unless there is such a folder. hf:ORG/NAME is the hub's in any case, and of hf://ORG/NAME only those parts of the
    weights are fetched that are read, when they are, as several hosts do with any name. weights: False if only config and
    tokenizer are wanted. adapters: whether a PEFT adapter on the hub will do, too, of which the folder in the hub's cache is
    returned. All processes must call this. Raises UserError if nothing is there, it may not be read, the hub cannot be reached,
    or support for a kind of address is not installed.
    """
    address, text = store_address(path), os.fspath(path)
    if address is not None and not address.startswith("hf://"):
        if address.endswith(".gguf"):
            raise UserError(
                f"{address} is a GGUF file, which is read from a disk only. Copy it to this machine and pass its path."
            )
        return store_mirror(address)
    named = model_name(text) if isinstance(path, str) or text.startswith("hf:") else None
    if named is None:
        return as_folder(local_path(path))
    name, before = named
    if not before and os.path.lexists(text):
        _say_that_local(text)
        return as_folder(local_path(text))
    found = hub_mirror(name, weights, streamed=before == "hf://", adapters=adapters)
    return as_folder(found) if name.file else found


@functools.cache
def _say_that_local(text: str) -> None:
    LOG.info(f"{text} is read from the folder of that name; hf:{text} would be the hub's model.")


def store_mirror(address: str) -> pathlib.Path:
    """Returns the mirror of a folder in an object store, brought up to date. Raises UserError as `checkpoint_folder` does."""
    with explained(address):
        files, place = open_store(address)
        found = {
            entry["name"].rsplit("/", 1)[-1]: entry for entry in files.ls(place, detail=True) if entry["type"] == "file"
        }
        found = {name: entry for name, entry in found.items() if not name.startswith(".") and not name.endswith(STUB)}
        if not found:
            raise FileNotFoundError(address)
    folder = mirrors() / f"{address.rsplit('/', 1)[-1]}-{hashlib.sha256(address.encode()).hexdigest()[:12]}"
    known, kept = _read_known(folder), {}
    for name, entry in found.items():
        now = {
            "address": f"{address}/{name}",
            "size": entry["size"],
            "stamp": next((str(entry[key]) for key in STAMPS if entry.get(key)), ""),
        }
        large = name.endswith(WEIGHTS) or entry["size"] > LARGE
        here = folder / (name + STUB if large else name)
        if known.get(here.name) != now or not here.exists():
            with explained(address):
                content = to_json(now) if large else files.cat_file(entry["name"])
            write_atomically(here, content)
        kept[here.name] = now
    keep_only(folder, set(kept))
    write_atomically(folder / ".mirror.json", to_json(kept))
    if not (folder / ORIGIN).exists():
        write_origin(folder, address, None)
    return folder


def _read_known(folder: pathlib.Path) -> dict:
    """Returns what was known of the store's files when the mirror was last brought up to date."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        known = json.loads((folder / ".mirror.json").read_text(encoding="utf-8"))
        return known if isinstance(known, dict) else {}
    return {}

"""Mirrors: folders in the cache that make a checkpoint that lies elsewhere readable as a folder of this machine.

A mirror holds the small files (config, tokenizer, index), copies of them or links. A weight file is a link too, or in its
place there is a stub, `NAME.remote`, that says where ranges of it are read. Stubs are honoured only in mirrors, so that a
downloaded checkpoint cannot name files by them.
"""

import contextlib
import json
import os
import pathlib

from refusal_jax.checkpoints.gguf_mirror import gguf_files, own_tokenizer
from refusal_jax.files import cache_folder, cannot_write, to_json, write_atomically
from refusal_jax.hub import HubName, repository_folder, snapshot_name

STUB = ".remote"
ORIGIN = ".origin.json"


def mirrors() -> pathlib.Path:
    """Returns the folder that mirrors are kept in."""
    return cache_folder("checkpoints")


def stub_of(path: pathlib.Path) -> pathlib.Path | None:
    """Returns the stub that stands for a weight file in a mirror, or None if there is none."""
    stub = path.with_name(path.name + STUB)
    return stub if path.parent.parent == mirrors() and stub.exists() else None


def is_there(path: pathlib.Path) -> bool:
    """Returns whether a file is in its folder, or in the store that the folder mirrors."""
    return os.path.exists(path) or stub_of(path) is not None


def read_origin(folder: pathlib.Path) -> dict:
    """Returns what is recorded of where a mirror comes from; {} for a folder that is no mirror, or was not finished.

    name: how `remote.checkpoint_folder` finds it again, without its revision. revision: a commit of the hub, or None.
    """
    with contextlib.suppress(OSError, ValueError, RecursionError):
        origin = json.loads((folder / ORIGIN).read_text(encoding="utf-8")) if folder.parent == mirrors() else {}
        return origin if isinstance(origin, dict) and isinstance(origin.get("name"), str) else {}
    return {}


def write_origin(folder: pathlib.Path, name: str, revision: str | None, **more) -> None:
    """Records where a mirror comes from, once it is made."""
    write_atomically(folder / ORIGIN, to_json({"name": name, "revision": revision, **more}))


def source_name(folder: pathlib.Path) -> str:
    """Returns by what `remote.checkpoint_folder` finds a checkpoint again: for a mirror the hub's name with the commit, the
    address, or the GGUF file, and else the folder's whole path."""
    files, origin = gguf_files(folder), read_origin(folder)
    if files:
        named = snapshot_name(files[0])
        kept = named is not None and files[0].is_relative_to(repository_folder(named))
        return str(named) if kept else str(files[0].parent if own_tokenizer(folder) else files[0])
    if not origin:
        return str(folder.resolve())
    return origin["name"] + (f"@{origin['revision']}" if origin.get("revision") else "")


def on_the_hub(folder: pathlib.Path) -> HubName | None:
    """Returns the hub's name of a checkpoint, with its commit, for its mirror and what is in the hub's cache; else None."""
    files, origin = gguf_files(folder), read_origin(folder)
    if origin.get("revision"):
        return HubName(origin["name"], origin["revision"])
    return snapshot_name(files[0] if files else folder)


def link(path: pathlib.Path, target: pathlib.Path) -> None:
    """Makes `path` a link to a file, in place of what is there. Raises UserError if the disk refuses."""
    with contextlib.suppress(OSError):
        if os.readlink(path) == str(target):
            return
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from None


def keep_only(folder: pathlib.Path, names: set[str]) -> None:
    """Removes all other files from a mirror but hidden ones."""
    for path in [p for p in folder.iterdir() if not p.name.startswith(".") and p.name not in names]:
        path.unlink(missing_ok=True)

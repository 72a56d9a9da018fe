"""Makes a checkpoint in an object store, such as `gs://bucket/folder`, readable as a folder of this machine: its mirror.

A mirror holds copies of the small files (config, tokenizer, index). In place of a weight file it has a stub,
`NAME.remote`, with the file's address, and ranges of the file are read from the store. Stubs are honoured only in
mirrors, so that a downloaded checkpoint cannot name files by them.
"""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from refusal_jax.checkpoints.gguf_mirror import as_folder
from refusal_jax.errors import UserError
from refusal_jax.files import cache_folder, local_path, read_json, to_json, write_atomically
from refusal_jax.stores import explained, open_store, store_address

STUB = ".remote"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")
LARGE = 256 << 20  # bytes: a file above that is no config and no tokenizer, whatever its name
REQUEST = 16 << 20  # bytes of one request, where the runs wanted lie apart and are fetched with what is between them
STAMPS = ("md5Hash", "md5", "crc32c", "ETag", "etag", "generation", "LastModified", "updated", "mtime", "created")


def checkpoint_folder(path: str | os.PathLike) -> pathlib.Path:
    """Returns the folder of a checkpoint on this machine: `path` itself or, for an address such as gs://bucket/folder and for a
    GGUF file, its mirror, brought up to date.

    Raises UserError if nothing is there, it may not be read, or support for its kind of address is not installed.
    """
    address = store_address(path)
    if address is None:
        return as_folder(local_path(path))
    if address.endswith(".gguf"):
        raise UserError(
            f"{address} is a GGUF file, which is read from a disk only. Copy it to this machine and pass its path."
        )
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
    for path in [p for p in folder.iterdir() if not p.name.startswith(".") and p.name not in kept]:
        path.unlink(missing_ok=True)
    write_atomically(folder / ".mirror.json", to_json(kept))
    return folder


def mirrors() -> pathlib.Path:
    """Returns the folder that mirrors are kept in."""
    return cache_folder("checkpoints")


def _read_known(folder: pathlib.Path) -> dict:
    """Returns what was known of the store's files when the mirror was last brought up to date."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        known = json.loads((folder / ".mirror.json").read_text(encoding="utf-8"))
        return known if isinstance(known, dict) else {}
    return {}


def stub_of(path: pathlib.Path) -> pathlib.Path | None:
    """Returns the stub that stands for a weight file in a mirror, or None if there is none."""
    stub = path.with_name(path.name + STUB)
    return stub if path.parent.parent == mirrors() and stub.exists() else None


def is_there(path: pathlib.Path) -> bool:
    """Returns whether a file is in its folder, or in the store that the folder mirrors."""
    return os.path.exists(path) or stub_of(path) is not None


class RemoteFile:
    """A file in an object store, of which ranges are read as from a `safetensors.LocalFile`."""

    def __init__(self, stub: pathlib.Path):
        """Opens the file that a stub of a mirror stands for. Raises UserError for a damaged stub, or if support for its kind of
        address is not installed."""
        entry = read_json(stub)
        path, size = entry.get("address"), entry.get("size")
        if not isinstance(path, str) or not isinstance(size, int):
            raise UserError(f"{stub} is damaged: it lacks address and size. Remove its folder: it is made anew.")
        self.path, self.size = path, size
        with explained(path):
            self.files, self.place = open_store(path)

    def read_into(self, offsets: Sequence[int] | np.ndarray, length: int, target: memoryview) -> int:
        """Reads as `LocalFile.read_into` does. What lies between runs that are near each other is fetched too, and counted.

        Raises OSError if the store fails or sends too little.
        """
        fetched, at = 0, 0
        while at < len(offsets):
            first, upto = int(offsets[at]), at + 1
            while upto < len(offsets) and int(offsets[upto]) + length - first <= REQUEST:
                upto += 1
            stop = int(offsets[upto - 1]) + length
            data = self._fetch(first, stop)
            for i in range(at, upto):
                begin = int(offsets[i]) - first
                target[i * length : (i + 1) * length] = data[begin : begin + length]
            fetched, at = fetched + len(data), upto
        return fetched

    def _fetch(self, start: int, stop: int) -> memoryview:
        try:
            data = self.files.cat_file(self.place, start=start, end=stop)
        except Exception as error:  # every store has its own kinds
            raise OSError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from None
        if len(data) != stop - start:
            raise OSError(f"the store sent {len(data):,} of {stop - start:,} bytes from byte {start:,}")
        return memoryview(data)

"""Checkpoints in object stores: `gs://bucket/folder`, or any other address that fsspec knows.

Their small files (config, tokenizer, index) are copied to a folder on this machine, so that whatever reads a checkpoint
folder reads a mirror. In place of a weight file the mirror has a stub, `NAME.remote`, with its address, and ranges of it
are read from the store. Stubs count nowhere but in mirrors: a downloaded checkpoint cannot name files by them.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re

from refusal_jax.errors import UserError
from refusal_jax.files import local_path, read_json, to_json, write_atomically

STUB = ".remote"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")
LARGE = 256 << 20  # bytes: a file above that is no config and no tokenizer, whatever its name
REQUEST = 16 << 20  # bytes of one request, where the runs wanted lie apart and are fetched with what is between them
STAMPS = ("md5Hash", "md5", "crc32c", "ETag", "etag", "generation", "LastModified", "updated", "mtime", "created")
ADDRESS = re.compile(r"([a-z][a-z0-9+]+):/+(.+)")  # with one slash too, which is all that pathlib leaves


def checkpoint_folder(path: str | os.PathLike) -> pathlib.Path:
    """The folder of a checkpoint on this machine: `path` itself or, of an address such as gs://bucket/folder, its mirror,
    brought up to date.

    Raises UserError if nothing is there, it may not be read, or support for its kind of address is not installed.
    """
    match = ADDRESS.fullmatch(str(path))
    if not match:
        return local_path(path)
    address = f"{match[1]}://{match[2].strip('/')}"
    with explained(address):
        import fsspec  # here: a local checkpoint does without

        files, place = fsspec.core.url_to_fs(address)
        files.invalidate_cache()
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
    """Where mirrors are kept."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return cache / "refusal_jax" / "checkpoints"


def _read_known(folder: pathlib.Path) -> dict:
    """What was known of the store's files when the mirror was last brought up to date."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        known = json.loads((folder / ".mirror.json").read_text(encoding="utf-8"))
        return known if isinstance(known, dict) else {}
    return {}


def stub_of(path: pathlib.Path) -> pathlib.Path | None:
    """The stub that stands for a weight file in a mirror; None if there is none."""
    stub = path.with_name(path.name + STUB)
    return stub if path.parent.parent == mirrors() and stub.exists() else None


def is_there(path: pathlib.Path) -> bool:
    """Whether a file is in its folder, or in the store that the folder mirrors."""
    return os.path.exists(path) or stub_of(path) is not None


class RemoteFile:
    """A file in an object store, by the stub of its mirror; used like `weight_file.LocalFile`."""

    def __init__(self, path: pathlib.Path):
        """Raises UserError if support for its kind of address is not installed."""
        stub = read_json(stub_of(path))
        self.path, self.size = stub.get("address"), stub.get("size")
        if not isinstance(self.path, str) or not isinstance(self.size, int):
            raise UserError(
                f"{stub_of(path)} is damaged: it lacks address and size. Remove its folder: it is made anew."
            )
        with explained(self.path):
            import fsspec

            self.files, self.place = fsspec.core.url_to_fs(self.path)

    def read_into(self, offsets, length: int, target: memoryview) -> int:
        """As `LocalFile.read_into`; of runs that lie apart, what is between them is fetched too, and counted."""
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


@contextlib.contextmanager
def explained(address: str):
    """Turns what a store's library raises into a UserError."""
    scheme = address.split("://")[0]
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(
            f"{address} was not found: there is no such bucket, or no files in that folder. Check the address, e.g. with "
            f"`gcloud storage ls {address}/`."
        ) from None
    except ImportError as error:
        extra = ": pip install 'refusal-jax[gcs]'" if scheme in ("gs", "gcs") else ""
        raise UserError(f"{address} cannot be used without another package ({error}). Install it{extra}.") from None
    except Exception as error:  # every store has its own kinds
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        code = str(getattr(error, "code", getattr(error, "status", "")))
        if code == "404":
            raise UserError(f"{address} was not found ({reason}). Check the address.") from None
        if (
            isinstance(error, PermissionError)
            or code in ("401", "403")
            or re.search("credential|forbidden|denied|unauthorized", reason, re.I)
        ):
            raise UserError(
                f"{address} may not be used by you ({reason}). Log in, e.g. with `gcloud auth application-default login`, or "
                "have the account of this machine allowed to use the bucket."
            ) from None
        raise UserError(
            f"{address} could not be used ({reason}). Check the address and the network, and try again."
        ) from None

"""Computes the fingerprint that tells one checkpoint from another.

A large file is hashed whole once. Its hash is then remembered with its size, inode and times, and taken from there until any of
these changes: whoever writes to a file changes its time of change (ctime), which no program can set back.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from refusal_jax.checkpoints.adapters import adapter_parts
from refusal_jax.checkpoints.gguf_mirror import gguf_files, own_tokenizer
from refusal_jax.checkpoints.mirrors import STUB, stub_of
from refusal_jax.errors import UserError
from refusal_jax.files import cache_folder
from refusal_jax.progress import Progress

SMALL = 8 << 20  # bytes up to which a file is simply read
CHUNK = 4 << 20  # bytes that are hashed at a time
THREADS = 4  # hashing leaves Python free, so files are hashed side by side
SETTLED = (
    60.0  # seconds after a change from which a hash is remembered: within them a second change may look like the first
)
NEVER_READ = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")  # weights in formats that are not loaded


def checkpoint_fingerprint(folder: pathlib.Path) -> str:
    """Returns a hash, in hex, of the names and contents of a checkpoint's files, which differs if a single byte of them does.

    Hidden files and subfolders do not count; weights in formats that are never loaded count by name and size. In the mirror
    of an address the weights are stubs, which hold what the store says of the version; what the hub says is the hash itself, so
    that a checkpoint has the same fingerprint whether its weights are here or there. For the mirror of a GGUF file only that
    file's content counts, and its tokenizer's files where the user gave them. For the mirror of an adapter its base counts,
    too. Raises UserError if the folder or a file of it cannot be read.
    """
    try:
        paths = [p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")]
        counted = {path: elsewhere(path) or (path.name, path.stat().st_size, None) for path in paths}
        paths.sort(key=lambda path: counted[path][0])
        weights = gguf_files(folder)
        if weights:
            paths = [*weights, *own_tokenizer(folder)]
            counted |= {path: ("", path.stat().st_size, None) for path in weights}
        unread = {path for path in paths if path.name.endswith(NEVER_READ)} - set(weights)
        large = [path for path in paths if counted[path][1] > SMALL and not counted[path][2] and path not in unread]
        hashes = file_hashes(folder, large)
        digest = hashlib.sha256()
        for path in paths:
            name, size, known = counted[path]
            digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
            if known or path in hashes:
                digest.update(bytes.fromhex(known or hashes[path]))
            elif path not in unread:
                digest.update(path.read_bytes())
        parts = adapter_parts(folder)
        if parts is not None:
            digest.update(bytes.fromhex(checkpoint_fingerprint(parts[1])))
    except OSError as error:
        raise UserError(
            f"The checkpoint {folder} could not be read ({error.strerror or error}: {error.filename or folder}). Check that the "
            "folder is still there and that you may read it."
        ) from None
    return digest.hexdigest()


def elsewhere(path: pathlib.Path) -> tuple[str, int, str] | None:
    """Returns name, size and sha256 of the file that a stub of a mirror stands for; None for other files, and where its hash is
    not known."""
    if stub_of(path.with_name(path.name.removesuffix(STUB))) != path:
        return None
    entry = json.loads(path.read_bytes())
    return (path.name.removesuffix(STUB), entry["size"], entry["sha256"]) if entry.get("sha256") else None


def file_hashes(
    folder: pathlib.Path, paths: Sequence[pathlib.Path], remembered: bool = True
) -> dict[pathlib.Path, str]:
    """Returns the sha256 of files of a folder, or that it mirrors: remembered for those that have not been touched since,
    computed for the others, and for all if nothing is to be `remembered`."""
    if not paths:
        return {}
    memory = _memory(folder)
    known, now = _read_memory(memory) if remembered else {}, {path: _stamp(path) for path in paths}
    hashes = {path: known[path.name][1] for path in paths if known.get(path.name, [None])[0] == now[path]}
    todo = [path for path in paths if path not in hashes]
    total = sum(path.stat().st_size for path in todo)
    bar = Progress("checking weights", total, "B", delay=2.0)
    with bar, ThreadPoolExecutor(THREADS) as pool:
        hashes |= zip(todo, pool.map(lambda path: _hash_with_bar(path, bar), todo), strict=True)
    settled = {p: now[p] for p in paths if _stamp(p) == now[p] and time.time() - max(now[p][1:3]) / 1e9 > SETTLED}
    if todo and settled:
        with contextlib.suppress(OSError):  # if hashes cannot be stored, files are hashed again next time
            memory.parent.mkdir(parents=True, exist_ok=True)
            part = memory.with_name(f".{memory.name}.tmp-{os.getpid()}")
            part.write_text(json.dumps({path.name: [stamp, hashes[path]] for path, stamp in settled.items()}))
            os.replace(part, memory)
    return hashes


def _memory(folder: pathlib.Path) -> pathlib.Path:
    return cache_folder("hashes") / f"{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:24]}.json"


def _read_memory(memory: pathlib.Path) -> dict:
    with contextlib.suppress(OSError, ValueError, TypeError):
        known = json.loads(memory.read_bytes())
        return {name: [list(stamp), bytes.fromhex(sha256).hex()] for name, (stamp, sha256) in known.items()}
    return {}


def _stamp(path: pathlib.Path) -> list[int]:
    """Returns what changes when a file is written to or replaced."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]


def _hash_with_bar(path: pathlib.Path, bar: Progress) -> str:
    digest, buffer = hashlib.sha256(), bytearray(CHUNK)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            bar.update(count)
    return digest.hexdigest()

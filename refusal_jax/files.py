"""Reads files with errors that name them, writes them atomically, hashes them, and locates caches."""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import pathlib

import platformdirs

from refusal_jax.errors import DamagedFile, UserError

LOG = logging.getLogger(__name__)

NO_LOCKS = (
    errno.ENOLCK,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
)  # how network file systems that are mounted without locks answer


def read_text(path: pathlib.Path) -> str:
    """Reads a UTF-8 file. Raises UserError if it is missing or of another encoding."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"{path} is not a file. Check the path.") from None
    except OSError as error:
        raise UserError(f"{path} could not be read ({error.strerror or error}). Check the path.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}). Convert it, e.g. with iconv.") from None


def write_atomically(path: pathlib.Path, data: bytes, private: bool = False) -> None:
    """Writes `data` to `path` so that a crash leaves the old file or the new one, never a part.

    private: only the file's owner may read it. Raises UserError if the disk is full, read-only or not ours to write.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        with open(os.open(temporary, flags, 0o600 if private else 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise cannot_write(path, error) from None


def cannot_write(path: pathlib.Path, error: OSError) -> UserError:
    """Returns the error for a failed write, with what to do about it."""
    return UserError(
        f"{path} could not be written: {error.strerror or error}. Free space on the disk or choose a folder "
        "that you may write to, then run the same command again: finished work is kept."
    )


def lock(number: int, path: pathlib.Path) -> bool:
    """Locks an open file or folder for this process until it is closed, and returns False if another process holds it.

    On a file system without locks, such as NFS without its lock service, it warns and goes on. number: the file's descriptor.
    Raises OSError if the file system fails.
    """
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        LOG.warning(
            f"The file system of {path} has no locks ({error.strerror}): make sure that only one process writes there at a time."
        )
    return True


def local_path(path: str | os.PathLike) -> pathlib.Path:
    """Returns a path of this machine with a leading ~ or ~USER expanded; what a shell would leave alone stays as it is.

    Raises UserError for a user who is not known here.
    """
    text = os.fspath(path)
    full = os.path.expanduser(text)
    if full.startswith("~"):
        name = text.partition("/")[0]
        raise UserError(
            f"{text}: this machine knows no home folder for {name}. Write the whole path, or ./{text} for a file or folder "
            "whose name begins so."
        )
    found = pathlib.Path(full)
    # pathlib drops "./", and a second look would take what is left for a home folder.
    return found.absolute() if str(found).startswith("~") else found


def cache_folder(name: str) -> pathlib.Path:
    """Returns the folder for one kind of cached files, such as "xla", of this user: ~/.cache/refusal_jax/xla on Linux, or below
    $XDG_CACHE_HOME where that is set. Nothing is made."""
    return platformdirs.user_cache_path("refusal_jax", appauthor=False) / name


def check_file(path: pathlib.Path) -> None:
    """Raises UserError that names the path if it is missing or no file, such as a folder or a link to nothing."""
    if not os.path.isfile(path):
        if not os.path.lexists(path):
            raise UserError(f"{path} does not exist. Point to a Hugging Face checkpoint folder, which holds it.")
        kind = (
            "a folder" if os.path.isdir(path) else "a link to no file" if os.path.islink(path) else "a device or pipe"
        )
        raise UserError(f"{path} is {kind}, expected a file. Remove it, and copy the original checkpoint's file there.")


def read_bytes(path: pathlib.Path) -> bytes:
    """Returns the content of a checkpoint's file. Raises UserError that names it if it is missing, no file or unreadable."""
    check_file(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} could not be read ({error.strerror or error}). Check that you may read it.") from None


def damaged(path: pathlib.Path, found: str) -> DamagedFile:
    """Returns the error for a file of a checkpoint that is not what its name says.

    found: what is wrong, to follow the path. Its beginning tells what can help: a pointer of Git LFS or a web page lies
    where the file should be, or the file was cut or edited.
    """
    start = b""
    if os.path.isfile(path):
        with open(path, "rb") as file:
            start = file.read(200).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        advice = "It is a pointer of Git LFS to the file: run `git lfs pull` in its folder, or use `hf download`."
    elif start.startswith((b"<!doctype", b"<html")):
        advice = (
            "It is a web page, as servers send it instead of a file: log in (`hf auth login`) and download it again."
        )
    else:
        advice = (
            "If it was edited by hand, repair it; else it is truncated or damaged: download it again from the original "
            "checkpoint."
        )
    return DamagedFile(f"{path} {found}. {advice}")


def read_json(path: pathlib.Path) -> dict:
    """Returns the JSON object in `path`. Raises UserError that names the file if it is missing or is not one."""
    data = read_bytes(path)
    try:
        value = json.loads(data.decode())
    except RecursionError:
        raise damaged(path, "is not valid JSON (it is nested too deeply)") from None
    except ValueError as error:  # of JSON, of UTF-8, or of an integer with thousands of digits
        raise damaged(path, f"is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise damaged(path, f"holds a JSON {type(value).__name__}, expected an object")
    return value


def to_json(value) -> bytes:
    """Returns a value as JSON for a file."""
    # Texts are whole where they come in, but a path may hold bytes that are not UTF-8, as lone surrogates.
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace")


def file_hash(path: pathlib.Path) -> str:
    """Returns a file's sha256, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

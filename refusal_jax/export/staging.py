"""Makes output folders that appear only when complete: everything is first written to a folder beside them."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence

from refusal_jax.checkpoints.mirrors import STUB
from refusal_jax.errors import UserError
from refusal_jax.files import check_file, lock

PROVENANCE, UNVERIFIED = "refusal_jax.json", ".unverified"
# Weights in other files than those edited would be the unedited ones, and indexes of such files name nothing.
WEIGHTS = tuple(".safetensors .bin .pt .pth .ckpt .h5 .msgpack .gguf .onnx .onnx_data .ot .tflite".split())
WEIGHTS += (".bin.index.json", ".h5.index.json")


def check_target(source: pathlib.Path, target: pathlib.Path) -> None:
    """Checks an output folder. Raises UserError if it exists, as an export or not, or lies inside the source."""
    if (target / PROVENANCE).is_file():
        raise UserError(
            f"{target} exists already, an export of ours. Check it with `refusal-jax export --check={target}`, remove it, or "
            "pass another folder."
        )
    if os.path.lexists(target):
        raise UserError(f"{target} exists already and is no export of ours. Pass another folder.")
    if source.resolve() in target.resolve().parents:
        raise UserError(f"{target} lies inside the source checkpoint. Pass a folder elsewhere.")


@contextlib.contextmanager
def staged(target: pathlib.Path, size: int = 0) -> Iterator[pathlib.Path]:
    """Yields the folder `.NAME.part` beside `target`, which takes the name of `target` at the end, on the disk, or is removed.

    What a killed process left there is removed first. size: how many bytes the folder will need. Raises UserError if another
    process is writing there, if the disk is too full, and if it refuses.
    """
    staging = target.parent / f".{target.name}.part"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if size > free:
            raise UserError(
                f"{target} needs {size:,} bytes, its disk has {free:,} free. Free space, or pass a folder on another disk."
            )
        number = _locked(staging)
    except OSError as error:
        raise _refused(target, error) from None
    left = staging
    try:
        yield staging
        sync_files(staging)
        os.rename(staging, target)
        left = None
        sync(target.parent)
    except OSError as error:
        raise _refused(target, error) from None
    finally:
        if left is not None:
            shutil.rmtree(left, ignore_errors=True)
        os.close(number)


def _refused(target: pathlib.Path, error: OSError) -> UserError:
    return UserError(
        f"{target} could not be written: {error.strerror or error}. Free space, or pass a folder on a disk that you may write "
        "to, and run the same command again; nothing was left behind."
    )


def _locked(staging: pathlib.Path) -> int:
    """Makes the folder anew and locks it; the lock ends with the process. Raises UserError if another one holds it."""
    if staging.is_symlink():
        raise UserError(f"{staging} is a link, and nothing is written through links. Remove it.")
    while True:
        staging.mkdir(exist_ok=True)
        number = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        if not lock(number, staging):
            os.close(number)
            raise UserError(f"Another process is writing {staging}. Wait for it, or pass another folder.")
        if not any(staging.iterdir()):
            return number
        shutil.rmtree(staging)  # of a process that was killed
        os.close(number)


def sync(path: pathlib.Path) -> None:
    """Puts a file, or a folder's list of names, on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_files(folder: pathlib.Path) -> None:
    """Puts all files below a folder on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)


def copy_other_files(source: pathlib.Path, staging: pathlib.Path, without: Sequence[str] = ()) -> None:
    """Copies all files but the weights, contents of links instead of links; hidden files, other weight formats and files of the
    names `without` stay behind. Raises UserError for what is neither a file nor a folder."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        left = path.name == PROVENANCE or path.name in without
        if path.is_dir() or hidden or left or path.name.removesuffix(STUB).endswith(WEIGHTS):
            continue
        check_file(path)
        (staging / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, staging / relative)

"""The files that a checkpoint consists of: which file holds a tensor, and the sha256 of each."""

import contextlib
import os
import pathlib
import re

from refusal_jax.checkpoints.fingerprint import elsewhere, file_hashes
from refusal_jax.checkpoints.gguf_mirror import gguf_files, own_tokenizer
from refusal_jax.checkpoints.mirrors import STUB, is_there, stub_of
from refusal_jax.checkpoints.tensor_files import INDEX, SINGLE
from refusal_jax.errors import UserError
from refusal_jax.files import file_hash, read_json

CONFIG, ADAPTER = "config.json", "adapter_model.safetensors"


def checkpoint_paths(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns every file of a checkpoint by its name below the folder, sorted; hidden files and folders are none of them.

    For the mirror of a GGUF file these are that file, its further parts, and the tokenizer's files that lay beside it. Raises
    UserError for a folder that cannot be read, and for links that lead nowhere.
    """
    weights = gguf_files(folder)
    if weights:
        return {path.name: path for path in sorted([*weights, *own_tokenizer(folder)], key=lambda path: path.name)}
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder. Name the folder of a checkpoint.")
    found = {}
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = pathlib.Path(place, name)
            if not name.startswith("."):
                found[path.relative_to(folder).as_posix()] = path
    broken = sorted(name for name, path in found.items() if not path.is_file())
    if broken:
        raise UserError(f"{folder / broken[0]} is no file that can be read, such as a link to nothing. Copy it again.")
    return dict(sorted((name.removesuffix(STUB) if is_stub(path) else name, path) for name, path in found.items()))


def is_stub(path: pathlib.Path) -> bool:
    """Returns whether a file of a mirror stands for one that lies in a store."""
    return path.name.endswith(STUB) and stub_of(path.with_name(path.name.removesuffix(STUB))) == path


def checkpoint_hashes(folder: pathlib.Path, remembered: bool) -> dict[str, str]:
    """Returns the sha256 of each file of a checkpoint, by name.

    remembered: whether the hash of a large file that nobody has written to since it was last hashed is taken from the cache;
    otherwise every byte is read. In the mirror of a repository the hash of weights is what the hub says. Raises UserError as
    `checkpoint_paths` does, and for weights in a store, whose hash nobody knows.
    """
    hashes, here = {}, {}
    for name, path in checkpoint_paths(folder).items():
        known = elsewhere(path)
        if known:
            hashes[name] = known[2]
        elif is_stub(path):
            raise UserError(
                f"{name} lies in a store that does not tell its sha256, so that no statement can be made about it. Copy the "
                "checkpoint to this machine."
            )
        else:
            here[name] = path
    top = {name: path for name, path in here.items() if "/" not in name}
    try:
        found = file_hashes(folder, list(top.values()), remembered)
        hashes |= {name: found[path] for name, path in top.items()}
        hashes |= {name: file_hash(path) for name, path in here.items() if name not in top}
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} could not be read ({error.strerror or error}). Check that you may read it."
        ) from None
    return dict(sorted(hashes.items()))


def place_of(folder: pathlib.Path) -> pathlib.Path:
    """Returns the folder in which a checkpoint's files lie: of the mirror of a GGUF file, that file's."""
    weights = gguf_files(folder)
    return weights[0].parent if weights else folder.absolute()


def main_file(folder: pathlib.Path) -> str:
    """Returns the name of the file that stands for the whole checkpoint: its index, its only weight file, or its adapter's; its
    config where there is none of them."""
    weights = gguf_files(folder)
    if weights:
        return weights[0].name
    return next((name for name in (INDEX, SINGLE, ADAPTER) if is_there(folder / name)), CONFIG)


def files_of(folder: pathlib.Path, where: str) -> list[str]:
    """Returns the names of the files that hold what a finding is about, none if that is not known.

    where: names of files or tensors in a sentence, as in `Evidence.where`.
    """
    words = [word for word in re.split(r"[\s,;]+", where) if word]
    index = {}
    with contextlib.suppress(UserError):  # a broken index names no files
        index = read_json(folder / INDEX).get("weight_map") if (folder / INDEX).is_file() else {}
    found = [index.get(word, word) if isinstance(index, dict) else word for word in words]
    return [name for name in dict.fromkeys(found) if isinstance(name, str) and _is_inside(folder, name)]


def _is_inside(folder: pathlib.Path, name: str) -> bool:
    """Returns whether a name is that of a file directly in the folder."""
    return pathlib.PurePath(name).name == name and name not in ("", ".", "..") and is_there(folder / name)

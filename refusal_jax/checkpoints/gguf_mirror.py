"""Makes a GGUF file readable as an HF checkpoint folder: its mirror.

A mirror lies in the cache and holds what the file's metadata tell, as HF's files: config, tokenizer, chat template. Its stub
names the GGUF files, which the tensors are read from. Stubs are honoured only in mirrors, so that a downloaded checkpoint cannot
name files by them.
"""

import contextlib
import hashlib
import logging
import os
import pathlib
import shutil
import tempfile

from refusal_jax.errors import UserError
from refusal_jax.files import cache_folder, cannot_write, read_bytes, read_json, to_json

LOG = logging.getLogger(__name__)

STUB = ".gguf.json"  # hidden, so that it is neither part of the fingerprint nor exported
FORMAT = 1  # of mirrors; raise it when what is written to them changes
OWN_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
OWN_TOKENIZER += ("tokenizer.model", "chat_template.jinja", "generation_config.json")


def gguf_mirrors() -> pathlib.Path:
    """Returns the folder that mirrors of GGUF files are kept in."""
    return cache_folder("gguf")


def gguf_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the GGUF files that a folder is the mirror of, none for any other folder. Raises UserError for a damaged stub."""
    stub = folder / STUB
    if folder.parent != gguf_mirrors() or not stub.is_file():
        return []
    files = read_json(stub).get("files")
    if not isinstance(files, list) or not files or not all(isinstance(one, str) for one in files):
        raise UserError(f"{stub} is damaged: it names no files. Remove its folder: it is made anew.")
    return [pathlib.Path(one) for one in files]


def as_folder(path: pathlib.Path) -> pathlib.Path:
    """Returns the mirror of a GGUF file, of the first of several, or of a folder that holds a model as GGUF only; any other path
    as it is.

    Raises UserError for a folder with several GGUF models, and for a file that cannot be read, is of an architecture that is not
    supported, or has settings that would not be computed faithfully.
    """
    own = _tokenizer_files(path) if path.is_dir() else []
    file = _only_model(path) if path.is_dir() else path
    if file is None or not _is_gguf(file):
        return path
    from refusal_jax.checkpoints.gguf_header import read_gguf  # imported late: few models are GGUF files

    header = read_gguf(file.absolute())
    digest = hashlib.sha256(f"{FORMAT}\0{header.paths[0]}\0".encode("utf-8", "surrogateescape") + header.text)
    for one in own:
        digest.update(f"{one.name}\0".encode() + hashlib.sha256(read_bytes(one)).digest())
    name = header.paths[0].name.removesuffix(".gguf").removesuffix(f"-00001-of-{len(header.paths):05d}")
    folder = gguf_mirrors() / f"{name}-{digest.hexdigest()[:12]}"
    if gguf_files(folder) != list(header.paths):
        _make(header, own, folder)
    return folder


def _is_gguf(path: pathlib.Path) -> bool:
    """Returns whether a path is a file that is called a GGUF file, or begins like one."""
    if not path.is_file():
        return False
    if path.suffix.lower() == ".gguf":
        return True
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(4) == b"GGUF"
    return False


def _only_model(folder: pathlib.Path) -> pathlib.Path | None:
    """Returns the only GGUF model of a folder, or None if it holds none, or weights that count more."""
    try:
        names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    except OSError:
        return None  # which is explained where the folder is read
    found = [n for n in names if n.lower().endswith(".gguf") and not n.lower().startswith("mmproj")]
    if not found or any(n.endswith((".safetensors", ".safetensors.index.json", ".bin", ".pt")) for n in names):
        return None
    first = [n for n in found if "-of-" not in n or n.endswith(f"-00001-of-{n[-10:-5]}.gguf")]
    if len(first) > 1:
        shown = ", ".join(first[:6]) + (f" and {len(first) - 6} more" if len(first) > 6 else "")
        raise UserError(f"{folder} holds {len(first)} GGUF models: {shown}. Pass the path of one of these files.")
    return folder / (first or found)[0]


def own_tokenizer(mirror: pathlib.Path) -> list[pathlib.Path]:
    """Returns the tokenizer files of a mirror of a GGUF file that lay beside that file, and were not made from its metadata."""
    return _tokenizer_files(mirror) if read_json(mirror / STUB).get("tokenizer") else []


def _tokenizer_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the tokenizer files beside a GGUF file in a folder, which count more than the file's metadata."""
    found = [folder / name for name in OWN_TOKENIZER if (folder / name).is_file()]
    return found if (folder / "tokenizer.json").is_file() else []


def _make(header, own: list[pathlib.Path], folder: pathlib.Path) -> None:
    """Makes a mirror, which appears under its name when it is whole."""
    from refusal_jax.checkpoints.gguf_config import gguf_config
    from refusal_jax.checkpoints.gguf_tokenizer import write_tokenizer
    from refusal_jax.models.hf_config import from_hf

    config = gguf_config(header)
    from_hf(config, str(header.paths[0]))
    try:
        gguf_mirrors().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=gguf_mirrors(), ignore_cleanup_errors=True) as made:
            part = pathlib.Path(made) / "mirror"
            part.mkdir()
            (part / "config.json").write_bytes(to_json(config))
            if not own:
                write_tokenizer(header.metadata, header.paths[0], part)
            for one in own:
                shutil.copyfile(one, part / one.name)
            stub = {"files": [str(path) for path in header.paths], "tokenizer": bool(own)}
            (part / STUB).write_bytes(to_json(stub))
            if folder.exists():  # a damaged one, or one of another process
                shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(FileExistsError):
                os.rename(part, folder)
    except OSError as error:
        if gguf_files(folder) != list(header.paths):  # another process may have made it
            raise cannot_write(folder, error) from None


def open_gguf(folder: pathlib.Path):
    """Returns the tensors of the GGUF model that a folder is the mirror of, by HF name, and its open files.

    Raises UserError as `gguf_tensors` does, and for files that are no longer those that the mirror was made of.
    """
    from refusal_jax.checkpoints.gguf_config import architecture_of, gguf_config
    from refusal_jax.checkpoints.gguf_header import read_gguf
    from refusal_jax.checkpoints.gguf_rope import ROPE_TENSORS
    from refusal_jax.checkpoints.gguf_tensors import gguf_tensors
    from refusal_jax.models.hf_config import from_hf, load_config

    header = read_gguf(gguf_files(folder)[0])
    cfg = load_config(folder)
    if from_hf(gguf_config(header)) != cfg:
        raise UserError(f"{header.paths[0]} has changed since its mirror {folder} was made. Start again.")
    return gguf_tensors(header, cfg, architecture_of(header).layout, frozenset(ROPE_TENSORS))


def source_name(folder: pathlib.Path) -> str:
    """Returns the name of the GGUF file that a folder is the mirror of, "" for any other folder."""
    files = gguf_files(folder)
    return files[0].name if files else ""

"""Makes a PEFT adapter on its base readable as a checkpoint folder: its mirror.

A mirror lies in the cache and holds links to the base's small files (config, tokenizer), and to the adapter's files, which count
more. Its stub names both folders; tensors are read from the base and changed by the adapter as they are read, so nothing is
merged on a disk. Stubs are honoured only in mirrors, so that a downloaded checkpoint cannot name files by them.
"""

import dataclasses
import hashlib
import os
import pathlib

import numpy as np

from refusal_jax import hub
from refusal_jax.checkpoints.lora import Change, Whole, read_changes
from refusal_jax.checkpoints.mirrors import STUB as REMOTE
from refusal_jax.checkpoints.mirrors import keep_only, link
from refusal_jax.checkpoints.tensors import STORED, Tensor
from refusal_jax.errors import UserError, setting, shown
from refusal_jax.files import cache_folder, read_json, to_json, write_atomically
from refusal_jax.hub import model_name
from refusal_jax.models.families import TABLES
from refusal_jax.models.hf_config import ADAPTER as ADAPTER_CONFIG
from refusal_jax.models.hf_config import from_hf, load_config

STUB = ".adapter.json"
WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", REMOTE)
TOKENIZER = ("tokenizer.json", "tokenizer.model")
# What a tokenizer is made of; with another vocabulary, none of it may be the base's.
TOKENIZER_PARTS = (*TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
TOKENIZER_PARTS += ("merges.txt", "chat_template.jinja", "chat_template.json")


@dataclasses.dataclass(frozen=True)
class AdaptedTensor:
    """A tensor of the base as an adapter changes it. source: the base's. change: what the adapter makes of it. shape: of the
    result."""

    source: Tensor
    change: Change
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.source.dtype if self.source.dtype in STORED else "F32"

    @property
    def nbytes(self) -> int:
        return self.source.nbytes

    @property
    def path(self) -> pathlib.Path:
        return self.source.path

    def read_into(self, index: tuple[slice, ...], out: np.ndarray) -> int:
        """Reads as `Tensor.read_into` does. Raises UserError if the base's file cannot be read."""
        values, count = np.empty(out.shape, np.float32), 0
        if not isinstance(self.change, Whole):
            count = self.source.read_into(index, values)
        out[...] = self.change.applied(values, index)
        return count


def adapter_mirrors() -> pathlib.Path:
    """Returns the folder that mirrors of adapters are kept in."""
    return cache_folder("adapters")


def is_adapter(folder: pathlib.Path) -> bool:
    """Returns whether a folder holds a PEFT adapter and no model."""
    return os.path.lexists(folder / ADAPTER_CONFIG) and not os.path.lexists(folder / "config.json")


def adapter_parts(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path] | None:
    """Returns the folders of the adapter and of the base that a folder is the mirror of, None for any other folder. Raises
    UserError for a damaged stub."""
    if folder.parent != adapter_mirrors() or not (folder / STUB).is_file():
        return None
    stub = read_json(folder / STUB)
    names = [stub.get("adapter"), stub.get("base")]
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"{folder / STUB} is damaged: it names no folders. Remove {folder}: it is made anew.")
    return pathlib.Path(str(names[0])), pathlib.Path(str(names[1]))


def named_base(folder: pathlib.Path) -> str:
    """Returns the base that an adapter's config names, if it is on this machine: a folder, or a model in the hub's cache.

    Raises UserError that asks for the base if it is not there, or not named.
    """
    name = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if isinstance(name, str) and name:
        if (pathlib.Path(name) / "config.json").is_file():
            return name
        named = model_name(name) if not name.startswith("hf:") else None
        if named is not None and (hub.repository_folder(named[0]) / "snapshots").is_dir():
            return f"hf:{name}"
    wanted = setting("base", name if isinstance(name, str) and name else "BASE")
    raise UserError(
        f"{folder} is a PEFT adapter of {shown(name or 'a base model that it does not name')}, which is not on this machine. An "
        f"adapter is read on its base: pass it as {wanted or 'the base'}, a folder or a name on the hub."
    )


def adapter_mirror(adapter: pathlib.Path, base: pathlib.Path) -> pathlib.Path:
    """Returns the mirror of an adapter on its base. base: the base's folder.

    Raises UserError for an adapter that cannot be read or does not belong to the base, and if the cache cannot be written.
    """
    adapter, base = adapter.resolve(), base.absolute()
    cfg = load_config(base)
    changes = read_changes(adapter, cfg, resized=True)
    files = [
        p for p in sorted(adapter.iterdir()) if p.is_file() and not p.name.startswith(".") and p.name != "config.json"
    ]
    stamps = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    digest = hashlib.sha256(repr((str(adapter), str(base), stamps)).encode("utf-8", "surrogateescape"))
    folder = adapter_mirrors() / f"{adapter.name}-{digest.hexdigest()[:12]}"
    theirs = [p for p in base.iterdir() if p.is_file() and not p.name.startswith(".") and not p.name.endswith(WEIGHTS)]
    ours = {p.name for p in files}
    if ours & set(TOKENIZER):
        theirs = [p for p in theirs if p.name not in TOKENIZER_PARTS]
    elif "tokenizer_config.json" in ours and "chat_template" in read_json(adapter / "tokenizer_config.json"):
        theirs = [p for p in theirs if p.name != "chat_template.jinja"]
    linked = {p.name: p for p in (*theirs, *files) if p.name != "config.json"}
    for name, path in linked.items():
        link(folder / name, path)
    write_atomically(folder / "config.json", to_json(_config(base, changes)))
    keep_only(folder, {*linked, "config.json"})
    write_atomically(folder / STUB, to_json({"adapter": str(adapter), "base": str(base)}))
    return folder


def _config(base: pathlib.Path, changes: dict) -> dict:
    """Returns the config.json of an adapter on its base: an embedding that is changed for one of its uses is tied no more, and
    the vocabulary may have grown."""
    hf = read_json(base / "config.json")
    cfg = from_hf(hf, str(base / "config.json"))
    ends = [TABLES[cfg.family][path] for path in ("embed", "unembed")]
    new: dict = {}
    if cfg.tied_embeddings and any(name in changes for name in ends):
        new["tie_word_embeddings"] = False
    embed = changes.get(ends[0])
    if isinstance(embed, Whole) and embed.shape[0] != cfg.vocab_size:
        new["vocab_size"] = embed.shape[0]
    for part in (hf, hf.get("text_config")):
        if isinstance(part, dict):
            part |= new
    return hf


def adapted(folder: pathlib.Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of the adapter that a folder is the mirror of. tensors: those of its base, by HF name.

    Raises UserError for an adapter that cannot be read or does not belong to the base.
    """
    parts = adapter_parts(folder)
    assert parts is not None, "only a mirror is asked for its tensors"
    cfg = load_config(parts[1])
    embed, unembed = (TABLES[cfg.family][path] for path in ("embed", "unembed"))
    changes = read_changes(parts[0], cfg, resized=True)
    found = dict(tensors)
    if cfg.tied_embeddings and (embed in changes or unembed in changes):
        found[unembed] = tensors[embed]
    for name, change in changes.items():
        found[name] = AdaptedTensor(found[name], change, change.shape)
    return found

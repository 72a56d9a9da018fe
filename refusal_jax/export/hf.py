"""Edited HF checkpoints, streamed over safetensors: a whole checkpoint is copied, and only the edited tensors change.

Tensors are handled one at a time, in file order: untouched ones are copied byte for byte, edited ones are computed in
float32 and cast back to their own dtype. Headers, shard layout, index and all other files stay as they were, unless an
unembedding is added, so an export needs the memory of one tensor and no accelerator.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
import struct
import tempfile

import numpy as np
from tqdm import tqdm

from refusal_jax.errors import UserError
from refusal_jax.export.rank_one import RankOne, unit_direction, writer_edits
from refusal_jax.models.config import load_config
from refusal_jax.models.families import TABLES
from refusal_jax.models.hf_attributes import read_json
from refusal_jax.models.load import INDEX, STORED, TensorFiles, check_tensors
from refusal_jax.runs import cannot_write, to_json

COPY_BYTES = 16 << 20
# Weights in other files than those edited would be the unedited ones.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf")
# What to do with an embedding that is also the unembedding: give the model an unembedding of its own, the embedding as it
# was; let the edit change both; edit neither.
TIED = ("untie", "keep", "skip")


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """A tensor as a safetensors file holds it (dtype by safetensors' name): bytes `start` to `stop` of `file`, edited."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: pathlib.Path
    start: int
    stop: int
    edit: RankOne | None = None

    @property
    def layout(self) -> tuple:
        return self.name, self.dtype, self.shape

    @property
    def size(self) -> int:
        """In bytes."""
        return self.stop - self.start

    def blocks(self):
        """Its bytes, edited, in blocks: of any size if they are copied, of whole rows if rows are edited one by one, and
        else all at once."""
        step = COPY_BYTES
        if self.edit:
            row = self.size // self.shape[0]
            step = row * max(COPY_BYTES // row, 1) if self.edit.path == "embed" else self.size
        with open(self.file, "rb") as reader:
            reader.seek(self.start)
            for offset in range(0, self.size, step):
                block = reader.read(min(step, self.size - offset))
                if self.edit:
                    stored = np.dtype(STORED[self.dtype])
                    values = np.frombuffer(block, stored).reshape(-1, *self.shape[1:])
                    block = self.edit(values.astype(np.float32)).astype(stored).tobytes()
                yield block


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """A safetensors file: its header's bytes, the metadata in it, and its tensors in the order of their bytes."""

    header: bytes
    metadata: dict
    tensors: tuple[Stored, ...]

    @classmethod
    def read(cls, path: pathlib.Path) -> "WeightFile":
        """From a file whose header safetensors has accepted."""
        with open(path, "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = file.read(size)
        entries = json.loads(header)
        metadata = entries.pop("__metadata__", {})
        tensors = [
            Stored(name, e["dtype"], tuple(e["shape"]), path, *(8 + size + offset for offset in e["data_offsets"]))
            for name, e in entries.items()
        ]
        return cls(header, metadata, tuple(sorted(tensors, key=lambda tensor: tensor.start)))

    @property
    def size(self) -> int:
        """Of its tensors, in bytes."""
        return sum(t.size for t in self.tensors)

    def holding(self, tensors: list[Stored]) -> "WeightFile":
        """This file with other contents. The header stays as it is if it still describes them, and else is made anew."""
        if [t.layout for t in tensors] == [t.layout for t in self.tensors]:
            return dataclasses.replace(self, tensors=tuple(tensors))
        # Wide numbers first, as safetensors itself writes them: each must begin at a multiple of its size.
        tensors = sorted(tensors, key=lambda t: -t.size // max(math.prod(t.shape), 1))
        entries, end = {"__metadata__": self.metadata} if self.metadata else {}, 0
        for t in tensors:
            start, end = end, end + t.size
            entries[t.name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": [start, end]}
        header = json.dumps(entries, separators=(",", ":")).encode()
        return WeightFile(header + b" " * (-len(header) % 8), self.metadata, tuple(tensors))

    def write(self, path: pathlib.Path, bar) -> None:
        with open(path, "wb") as writer:
            writer.write(struct.pack("<Q", len(self.header)) + self.header)
            for tensor in self.tensors:
                writer.writelines(tensor.blocks())
                bar.update()
            writer.flush()
            os.fsync(writer.fileno())


@dataclasses.dataclass(frozen=True)
class Export:
    """What an export did. edits: by HF name. tied: one of TIED, or None if the source has an unembedding of its own.
    added_bytes: by how much its weights grew."""

    edits: dict[str, RankOne]
    tied: str | None
    added_bytes: int

    @property
    def largest_amplification(self) -> float:
        return max((edit.amplification for edit in self.edits.values()), default=1.0)


def export_hf(source: str | pathlib.Path, target: str | pathlib.Path, direction, tied: str = "untie") -> Export:
    """Writes the HF checkpoint `source`, with a direction taken out of what its weights write, to the new folder `target`.

    direction: `[D]`, of any norm. tied: one of TIED; without effect on a source that has an unembedding of its own. The
    folder appears under its name when it is complete. Raises UserError for an unusable source or direction, a target that
    exists or lies inside the source, and a disk that cannot take it; ValueError for another `tied`.
    """
    source, target = pathlib.Path(source), pathlib.Path(target)
    if tied not in TIED:
        raise ValueError(f"tied must be one of {', '.join(TIED)}, not {tied!r}")
    cfg = load_config(source)
    tied = tied if cfg.tied_embeddings else None
    unit_d = unit_direction(direction, cfg.d_model)
    if target.exists():
        raise UserError(f"{target} exists already. Remove it, or pass another --out.")
    if source.resolve() in target.resolve().parents:
        raise UserError(f"{target} lies inside the source checkpoint. Pass an --out elsewhere.")
    files = TensorFiles.open(source)
    check_tensors(cfg, files)
    before = {path: WeightFile.read(path) for path in files.handles}
    after = edited_files(before, writer_edits(cfg, files, unit_d), TABLES[cfg.family], tied)
    added = sum(file.size for file in after.values()) - sum(file.size for file in before.values())
    count = sum(len(file.tensors) for file in after.values())
    with staged(target) as staging:
        copy_other_files(source, staging, skip=set(files.handles))
        if tied == "untie":
            say_untied(staging, after, TABLES[cfg.family]["unembed"], added)
        with tqdm(total=count, desc="exporting", unit="tensor", leave=False) as bar:
            for path, file in after.items():
                file.write(staging / path.name, bar)
    done = {t.name: t.edit for file in after.values() for t in file.tensors if t.edit}
    return Export(dict(sorted(done.items())), tied, added)


def edited_files(
    files: dict[pathlib.Path, WeightFile], edits: dict[str, RankOne], table: dict[str, str], tied: str | None
) -> dict[pathlib.Path, WeightFile]:
    """The files of a checkpoint as they are to be written.

    edits: by HF name. table: the family's. tied: what becomes of a tied embedding, or None where it isn't tied. A tied
    checkpoint may store an unembedding all the same, which some readers take: unless neither is edited, that becomes what
    is said here of the embedding.
    """
    embed, unembed = table["embed"], table["unembed"]
    if tied == "skip":
        edits = {name: edit for name, edit in edits.items() if name != embed}
    held = {path: [dataclasses.replace(t, edit=edits.get(t.name)) for t in f.tensors] for path, f in files.items()}
    if tied in ("untie", "keep"):
        path, source = next((path, t) for path, tensors in held.items() for t in tensors if t.name == embed)
        head = dataclasses.replace(source, name=unembed, edit=source.edit if tied == "keep" else None)
        if any(t.name == unembed for tensors in held.values() for t in tensors):
            held = {path: [head if t.name == unembed else t for t in tensors] for path, tensors in held.items()}
        elif tied == "untie":
            held[path].insert(held[path].index(source) + 1, head)
    return {path: files[path].holding(tensors) for path, tensors in held.items()}


def say_untied(folder: pathlib.Path, files: dict[pathlib.Path, WeightFile], unembed: str, added: int) -> None:
    """Makes config.json and index, if there is one, say that the model has an unembedding of its own."""
    hf = read_json(folder / "config.json")
    for part in (hf, hf.get("text_config")):
        if isinstance(part, dict):
            part["tie_word_embeddings"] = False
    (folder / "config.json").write_bytes(to_json(hf))
    if not (folder / INDEX).exists():
        return
    index = read_json(folder / INDEX)
    path, head = next((path, t) for path, file in files.items() for t in file.tensors if t.name == unembed)
    index["weight_map"][unembed] = path.name
    sizes = {"total_size": added, "total_parameters": math.prod(head.shape)}
    metadata = index.get("metadata")
    for key, more in sizes.items() if isinstance(metadata, dict) else ():
        if isinstance(metadata.get(key), int | float):
            metadata[key] += more
    (folder / INDEX).write_bytes(to_json(index))


@contextlib.contextmanager
def staged(target: pathlib.Path):
    """A hidden folder beside `target`, which takes that name at the end, or is gone. Raises UserError if the disk refuses."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.part-", dir=target.parent))
    except OSError as error:
        raise cannot_write(target, error) from None
    try:
        yield staging
        os.chmod(staging, 0o755)
        os.replace(staging, target)
    except OSError as error:
        raise cannot_write(target, error) from None
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(staging)


def copy_other_files(source: pathlib.Path, staging: pathlib.Path, skip: set[pathlib.Path]) -> None:
    """Copies all files but the weights, contents of links instead of links; other weight formats stay behind."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.is_dir() or path in skip or hidden or path.suffix in WEIGHTS:
            continue
        (staging / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, staging / relative)

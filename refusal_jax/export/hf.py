"""Writes an edited HF checkpoint: the whole checkpoint is copied, and only the edited tensors change.

Headers, shard layout, index and all other files stay as they were, unless tensors are added: an unembedding, or biases. From
weights that are dequantised as they are read, files are made anew in bfloat16.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from refusal_jax.checkpoints.rewrite import Checkpoint, Stored, WeightFile
from refusal_jax.checkpoints.tensor_files import INDEX
from refusal_jax.conditions import Add
from refusal_jax.export.staging import copy_other_files
from refusal_jax.export.tensor_edits import BIAS_SWITCHES, Edit, bias_additions, wanted_edits
from refusal_jax.files import read_json, to_json
from refusal_jax.models.families import TABLES, hf_shapes
from refusal_jax.models.hf_config import from_hf
from refusal_jax.models.quantisation import without_quantisation
from refusal_jax.models.weights import weight_table
from refusal_jax.progress import Progress

HEAD = "lm_head.weight"  # where the checkpoint's other names are not those of its family's table
THREADS = 8  # at most; each holds a block of rows
FILES = 4  # at most, which are hashed at a time, as one core hashes more slowly than most disks write
# What to do with an embedding that is also the unembedding: give the model an unembedding of its own, the embedding as it
# was; let the edit change both; edit neither.
TIED = ("untie", "keep", "skip")
# Files beside the weights that tell loaders how these are quantised, which they are not any more in an export.
QUANTISATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "recipe.yaml")


@dataclasses.dataclass(frozen=True)
class Written:
    """The result of writing an export.

    edits: the edits of tensors by HF name. tied: one of TIED, or None where no tied embedding is concerned. added_bytes: by how
    much the weights grew. hashes: sha256 of weight files by name.
    """

    edits: dict
    tied: str | None = None
    added_bytes: int = 0
    hashes: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def kinds(self) -> dict[str, str]:
        """Returns the kind of each tensor's edit, by HF name."""
        return {name: edit.kind for name, edit in self.edits.items()}

    @property
    def largest_amplification(self) -> float:
        """Returns the largest operator norm of an edit; 1 for orthogonal projections."""
        return max((edit.amplification for edit in self.edits.values()), default=1.0)


@dataclasses.dataclass(frozen=True)
class Plan:
    """An export before it is written: the files with their edits, and the changes to config.json."""

    checkpoint: Checkpoint
    files: dict[pathlib.Path, WeightFile]
    config: dict
    tied: str | None

    @classmethod
    def of(cls, checkpoint: Checkpoint, edit: Edit, tied: str = "untie") -> "Plan":
        """Plans the export of an edit. tied: one of TIED, without effect where the embedding is not tied, or not edited.

        Raises UserError for an addition that the architecture cannot hold, ValueError for another `tied`.
        """
        cfg = checkpoint.cfg
        if tied not in TIED:
            raise ValueError(f"tied must be one of {', '.join(TIED)}, not {tied!r}")
        if isinstance(edit, Add):
            edits, config = bias_additions(cfg, edit), {}
            files = checkpoint.files
            if "blocks.down_bias" not in weight_table(cfg):
                config = dict([BIAS_SWITCHES[cfg.family]])
                files = with_zero_biases(checkpoint, config)
            held = {
                path: [dataclasses.replace(t, edit=edits.get(t.name)) for t in f.tensors] for path, f in files.items()
            }
            return cls(checkpoint, {path: checkpoint.files[path].holding(held[path]) for path in held}, config, None)
        chosen = tied if cfg.tied_embeddings and edit.reaches(0, "resid_pre") else None
        return cls.of_tensors(checkpoint, wanted_edits(checkpoint, edit, chosen), chosen)

    @classmethod
    def of_tensors(cls, checkpoint: Checkpoint, edits: Mapping[str, Any], tied: str | None) -> "Plan":
        """Plans the export of edits of tensors, by HF name. tied: one of TIED, None where no tied embedding is edited."""
        files = ablated_files(checkpoint.files, dict(edits), TABLES[checkpoint.cfg.family], tied)
        return cls(checkpoint, files, {"tie_word_embeddings": False} if tied == "untie" else {}, tied)

    @property
    def edits(self) -> dict:
        """Returns the edits of tensors by HF name, sorted."""
        edits = {t.name: t.edit for file in self.files.values() for t in file.tensors if t.edit}
        return dict(sorted(edits.items()))

    @property
    def size(self) -> int:
        """Returns the size of all tensors in bytes."""
        return sum(file.size for file in self.files.values())

    def write(self, folder: pathlib.Path, done: Callable[[pathlib.Path], object] = lambda path: None) -> Written:
        """Writes into an empty folder. done: is called with each weight file once it is written, by several threads.

        Raises UserError for values that are not finite, OSError for a disk that refuses.
        """
        checkpoint = self.checkpoint
        copy_other_files(checkpoint.folder, folder, (*QUANTISATION_FILES, INDEX) if checkpoint.anew else ())
        if self.config or checkpoint.anew:
            self._write_config(folder)
        cores = os.cpu_count() or 1
        pool, hashing = ThreadPoolExecutor(min(THREADS, cores)), ThreadPoolExecutor(max(min(FILES, cores // 2), 1))
        try:
            with Progress("exporting", self.size, "B") as bar:

                def write(path: pathlib.Path) -> str:
                    sha256 = self.files[path].write(folder / path.name, pool, bar)
                    done(folder / path.name)
                    return sha256

                hashes = {
                    path.name: sha256 for path, sha256 in zip(self.files, hashing.map(write, self.files), strict=True)
                }
        finally:
            pool.shutdown(cancel_futures=True)  # ends the files that are being written, too
            hashing.shutdown(cancel_futures=True)
        added = self.size - sum(file.size for file in checkpoint.files.values())
        return Written(self.edits, self.tied, added, hashes)

    def _write_config(self, folder: pathlib.Path) -> None:
        """Makes config.json say what changed, and the index, if there is one, name the tensors that are new, or all of them."""
        source = self.checkpoint.folder
        hf = read_json(source / "config.json")
        if self.checkpoint.quantisation is not None:
            hf = in_bfloat16(hf)
        for part in (hf, hf.get("text_config")):
            if isinstance(part, dict):
                part |= self.config
        (folder / "config.json").write_bytes(to_json(hf))
        if self.checkpoint.anew:
            if len(self.files) > 1:
                (folder / INDEX).write_bytes(to_json(self._index()))
            return
        if not (source / INDEX).exists():
            return
        index = read_json(source / INDEX)
        new = {
            t: path for path, file in self.files.items() for t in file.tensors if t.spelled not in index["weight_map"]
        }
        index["weight_map"] |= {t.spelled: path.name for t, path in new.items()}
        sizes = {"total_size": sum(t.size for t in new), "total_parameters": sum(math.prod(t.shape) for t in new)}
        metadata = index.get("metadata")
        if isinstance(metadata, dict):
            metadata |= {
                key: metadata[key] + more for key, more in sizes.items() if isinstance(metadata.get(key), int | float)
            }
        (folder / INDEX).write_bytes(to_json(index))

    def _index(self) -> dict:
        """Returns the index of files that were made anew."""
        held = {t.spelled: path.name for path, file in self.files.items() for t in file.tensors}
        return {"metadata": {"total_size": self.size}, "weight_map": dict(sorted(held.items()))}


def in_bfloat16(hf: dict) -> dict:
    """Returns the config.json of a quantised checkpoint as that of a copy of its weights in bfloat16."""
    hf = without_quantisation(hf)
    for part in (hf, hf.get("text_config")):
        names = [name for name in ("dtype", "torch_dtype") if isinstance(part, dict) and name in part]
        if isinstance(part, dict) and (names or part is hf):
            part |= dict.fromkeys(names or ["torch_dtype"], "bfloat16")
    return hf


def ablated_files(
    files: dict[pathlib.Path, WeightFile], edits: dict, table: dict[str, str], tied: str | None
) -> dict[pathlib.Path, WeightFile]:
    """Returns the files of a checkpoint as they are to be written.

    edits: the edits of tensors by HF name. table: the family's weight table. tied: what becomes of a tied embedding, or None
    where it is not tied. A tied checkpoint may store an unembedding all the same, which some readers take: unless neither is
    edited, it becomes what `tied` says.
    """
    embed, unembed = table["embed"], table["unembed"]
    held = {path: [dataclasses.replace(t, edit=edits.get(t.name)) for t in f.tensors] for path, f in files.items()}
    if tied in ("untie", "keep"):
        path, source = next((path, t) for path, tensors in held.items() for t in tensors if t.name == embed)
        written = HEAD if source.written else ""
        head = dataclasses.replace(source, name=unembed, edit=source.edit if tied == "keep" else None, written=written)
        if any(t.name == unembed for tensors in held.values() for t in tensors):
            held = {
                path: [dataclasses.replace(head, written=t.written) if t.name == unembed else t for t in tensors]
                for path, tensors in held.items()
            }
        elif tied == "untie":
            held[path].insert(held[path].index(source) + 1, head)
    return {path: files[path].holding(tensors) for path, tensors in held.items()}


def with_zero_biases(checkpoint: Checkpoint, config: dict) -> dict[pathlib.Path, WeightFile]:
    """Adds to the files of a checkpoint without MLP biases those, all zero, that its config asks for after the change `config`:
    each beside the weight that it belongs to."""
    hf = read_json(checkpoint.folder / "config.json") | config
    before, after = hf_shapes(checkpoint.cfg), hf_shapes(from_hf(hf))
    files = {path: list(file.tensors) for path, file in checkpoint.files.items()}
    file_of = {t.name: path for path, tensors in files.items() for t in tensors}
    for name in sorted(after.keys() - before.keys()):
        weight = checkpoint.tensors[name.removesuffix("bias") + "weight"]
        written = weight.written and weight.written.removesuffix("weight") + "bias"
        files[file_of[weight.name]].append(Stored(name, weight.dtype, after[name], None, written=written))
    return {path: dataclasses.replace(checkpoint.files[path], tensors=tuple(held)) for path, held in files.items()}

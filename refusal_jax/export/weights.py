"""Weight edits, streamed over safetensors: a whole checkpoint is copied, and only the edited tensors change.

Tensors are handled one at a time, in file order: untouched ones are copied byte for byte, edited ones are computed in
float32 and cast back to their own dtype. Headers, shard layout, index and all other files stay as they were, so an
export needs the memory of one tensor and no accelerator.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import struct
import tempfile

import numpy as np
from tqdm import tqdm

from refusal_jax.edits import EPS
from refusal_jax.errors import UserError
from refusal_jax.models.config import load_config
from refusal_jax.models.families import WRITER_BIASES, WRITERS, hf_slots
from refusal_jax.models.load import STORED, TensorFiles, check_tensors
from refusal_jax.runs import cannot_write

COPY_BYTES = 16 << 20
# Weights in other files than those edited would be the unedited ones.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf")


@dataclasses.dataclass(frozen=True)
class Orthogonalise:
    """W <- W - r r^T W for every matrix that writes to the residual stream (paper, section 4.1): embedding, attention
    output, MLP output, and their biases. unit_d: float64 `[D]`, the unit direction."""

    unit_d: np.ndarray

    @classmethod
    def along(cls, direction) -> "Orthogonalise":
        """From a direction of any norm. Raises UserError if it is zero, not finite or not a vector."""
        direction = np.asarray(direction, np.float64)
        if direction.ndim != 1 or not np.isfinite(direction).all() or not np.linalg.norm(direction) > 0:
            raise UserError(
                f"The direction (shape {list(direction.shape)}) must be a vector of finite numbers that is not zero. "
                "Export the direction of a finished study."
            )
        return cls(direction / (np.linalg.norm(direction) + EPS))

    def __call__(self, path: str, tensor: np.ndarray) -> np.ndarray:
        """The edited tensor of a decoder path, float32 in and out; rows of an embedding live in the stream, columns
        of an output matrix write to it."""
        unit = self.unit_d.astype(np.float32)
        if path == "embed":
            return tensor - np.outer(tensor @ unit, unit)
        return tensor - np.multiply.outer(unit, unit @ tensor)


def edited_names(cfg) -> dict[str, str]:
    """HF name -> decoder path of every tensor that orthogonalisation changes."""
    return {name: slot.path for name, slot in hf_slots(cfg).items() if slot.path in WRITERS | WRITER_BIASES}


def export_hf(source: str | pathlib.Path, target: str | pathlib.Path, edit: Orthogonalise) -> list[str]:
    """Writes the HF checkpoint `source` with its weights edited to the new folder `target`; the names edited.

    The folder appears under its name when it is complete. Raises UserError for an unusable source, a direction of
    another width, a target that exists or lies inside the source, and a disk that cannot take it.
    """
    source, target = pathlib.Path(source), pathlib.Path(target)
    cfg = load_config(source)
    if edit.unit_d.shape != (cfg.d_model,):
        raise UserError(
            f"The direction has {edit.unit_d.size} entries, the residual stream of {source} has {cfg.d_model}: it "
            "belongs to another model. Export with the model that the study ran on."
        )
    if target.exists():
        raise UserError(f"{target} exists already. Remove it, or pass another --out.")
    if source.resolve() in target.resolve().parents:
        raise UserError(f"{target} lies inside the source checkpoint. Pass an --out elsewhere.")
    if cfg.tied_embeddings:
        raise UserError(
            f"{source} ties its unembedding to its embedding, so editing one would edit both and the result would "
            "differ from ablation. Exports of tied models are not supported yet: use a checkpoint with its own lm_head."
        )
    files = TensorFiles.open(source)
    check_tensors(cfg, files)
    names = edited_names(cfg)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.part-", dir=target.parent))
    except OSError as error:
        raise cannot_write(target, error) from None
    try:
        copy_other_files(source, staging, skip=set(files.handles))
        with tqdm(total=len(files.file_of), desc="exporting", unit="tensor", leave=False) as bar:
            for path in files.handles:
                rewrite(path, staging / path.name, names, edit, bar)
        os.chmod(staging, 0o755)
        os.replace(staging, target)
    except OSError as error:
        raise cannot_write(target, error) from None
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(staging)
    return sorted(names)


def copy_other_files(source: pathlib.Path, staging: pathlib.Path, skip: set[pathlib.Path]) -> None:
    """Copies all files but the weights, contents of links instead of links; other weight formats stay behind."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.is_dir() or path in skip or hidden or path.suffix in WEIGHTS:
            continue
        (staging / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, staging / relative)


def rewrite(source: pathlib.Path, target: pathlib.Path, names: dict[str, str], edit: Orthogonalise, bar) -> None:
    """Copies one safetensors file, same header, same layout, with the tensors of `names` edited."""
    with open(source, "rb") as reader, open(target, "wb") as writer:
        (size,) = struct.unpack("<Q", reader.read(8))
        header = reader.read(size)
        writer.write(struct.pack("<Q", size) + header)
        entries = [(name, e) for name, e in json.loads(header).items() if name != "__metadata__"]
        for name, entry in sorted(entries, key=lambda item: item[1]["data_offsets"]):
            start, stop = entry["data_offsets"]
            reader.seek(8 + size + start)
            if name in names:
                stored = np.dtype(STORED[entry["dtype"]])
                tensor = np.frombuffer(reader.read(stop - start), stored).reshape(entry["shape"])
                writer.write(edit(names[name], tensor.astype(np.float32)).astype(stored).tobytes())
            else:
                for offset in range(start, stop, COPY_BYTES):
                    writer.write(reader.read(min(COPY_BYTES, stop - offset)))
            bar.update()
        writer.flush()
        os.fsync(writer.fileno())

"""The weights of a checkpoint as an audit reads them: from files, whose damage is a finding, or held in memory."""

import dataclasses
import pathlib
import time
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float32

from refusal_jax.audit.broken import BrokenCheckpoint, open_checkpoint
from refusal_jax.checkpoints.tensor_files import TensorFiles
from refusal_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class StoredWeights:
    """The weights in the files of a checkpoint folder: safetensors, GGUF or quantised."""

    cfg: ModelConfig
    folder: pathlib.Path
    files: TensorFiles

    @classmethod
    def open(cls, folder: pathlib.Path) -> "StoredWeights":
        """Opens the files of a checkpoint folder. Raises UserError and BrokenCheckpoint as `open_checkpoint` does."""
        cfg, files = open_checkpoint(folder)
        return cls(cfg, folder, files)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Float32[np.ndarray, "..."]:
        """Returns rows of a tensor. Raises UserError if the file cannot be read, BrokenCheckpoint for values that are not
        finite."""
        shape = self.files.tensors[name].shape
        stop = shape[0] if stop is None else stop
        out = np.empty((stop - start, *shape[1:]), np.float32)
        self.files.read_into(name, (slice(start, stop),), out)
        if not np.isfinite(out).all():
            raise BrokenCheckpoint(
                f"{self.folder} holds NaN or infinite values in {name}. The checkpoint is damaged: download it again.",
                self.folder,
            )
        return out


@dataclasses.dataclass(frozen=True)
class ArrayWeights:
    """Weights that are held in memory, by tensor name."""

    cfg: ModelConfig
    tensors: Mapping[str, np.ndarray]

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Float32[np.ndarray, "..."]:
        """Returns rows of a tensor."""
        return np.asarray(self.tensors[name][start:stop], np.float32)


@dataclasses.dataclass
class Stopwatch:
    """Measures how long a lane takes."""

    start: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Returns the seconds since it was made."""
        return time.perf_counter() - self.start

"""Tells a checkpoint that is broken from one that was named wrongly or is not supported: the former is a finding of an audit."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

from refusal_jax.checkpoints.check import check_tensors
from refusal_jax.checkpoints.gguf_mirror import gguf_files
from refusal_jax.checkpoints.mirrors import is_there
from refusal_jax.checkpoints.tensor_files import INDEX, SINGLE, TensorFiles
from refusal_jax.errors import DamagedFile, UserError
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.hf_config import load_config


class BrokenCheckpoint(UserError):
    """The files of a checkpoint, or its chat template, are broken, so that no program could use them.

    folder: of the checkpoint, where a part of an audit that reads two finds it.
    """

    exit_code = 40

    def __init__(self, message: str, folder: pathlib.Path | None = None):
        super().__init__(message)
        self.folder = folder


@contextlib.contextmanager
def finding_damage(broken: tuple[type[UserError], ...] = (DamagedFile,)) -> Iterator[None]:
    """Turns errors about damage, those of the types `broken`, into a BrokenCheckpoint with the same message."""
    try:
        yield
    except BrokenCheckpoint:
        raise
    except broken as error:
        raise BrokenCheckpoint(str(error)) from None


def open_checkpoint(folder: pathlib.Path) -> tuple[ModelConfig, TensorFiles]:
    """Returns the config and the open weight files of a checkpoint folder, checked against each other.

    Raises UserError for a folder that holds no checkpoint, none of a supported architecture, or pickled weights only, and
    BrokenCheckpoint for a damaged file, and for files that contradict each other or are incomplete.
    """
    with finding_damage():
        cfg = load_config(folder)
    weights = gguf_files(folder) or os.path.lexists(folder / INDEX) or os.path.lexists(folder / SINGLE)
    with finding_damage((UserError,) if weights or is_there(folder / SINGLE) else (DamagedFile,)):
        files = TensorFiles.open(folder)
        check_tensors(cfg, files)
    return cfg, files

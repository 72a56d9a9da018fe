"""Reads what a training changed in the tensors of the checkpoint that it began with, by HF name."""

import jax
import numpy as np
from jax.experimental import multihost_utils

from refusal_jax.checkpoints.load import hf_tensors
from refusal_jax.checkpoints.lora import Change, LowRank, Whole
from refusal_jax.export.changed import low_rank
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.families import hf_shapes, pieces
from refusal_jax.models.weight import factor_names
from refusal_jax.training.trainer import Trained


def low_rank_changes(cfg: ModelConfig, trained: Trained) -> dict[str, LowRank]:
    """Returns the changes of a trained adapter, the left factors with its scale; none of blocks that have no factors, and none at
    all where all weights were trained. All processes must call it."""
    factors = {path: in_host(a) for path, a in (trained.factors or {}).items()}
    scale, shapes, parts = np.float32(trained.settings.scale), hf_shapes(cfg), {}
    for piece in pieces(cfg):
        left, right = (factors.get(path) for path in factor_names(piece.path))
        if left is not None and right is not None and right[piece.index].any():
            rows = range(piece.start, piece.stop, piece.step)
            parts.setdefault(piece.name, []).append((rows, scale * left[piece.index], right[piece.index]))
    return {name: low_rank(held, shapes[name][0]) for name, held in parts.items()}


def whole_changes(cfg: ModelConfig, trained: Trained) -> dict[str, Change]:
    """Returns all tensors of a model whose weights were all trained, in the memory of every host. All processes must call it."""
    weights = {path: in_host(a) for path, a in trained.decoder.weights().items()}
    return {name: Whole(values) for name, values in hf_tensors(cfg, weights).items()}


def in_host(array: jax.Array) -> np.ndarray:
    """Returns a whole array in the memory of this host, in float32."""
    whole = array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(whole, np.float32)

"""Takes the low-rank part of a checkpoint's change from its base out of the weights that are on the devices.

A defence that was trained as an adapter, and merged, is a change of low rank: who has the base subtracts it. The change is
found one tensor at a time, from the files of both checkpoints. A PEFT adapter on its base is not subtracted but left out.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from refusal_jax.axes import Array
from refusal_jax.chat.model import ChatModel
from refusal_jax.chat.prompts import Chat
from refusal_jax.checkpoints.adapters import adapter_parts
from refusal_jax.checkpoints.load import load_decoder
from refusal_jax.checkpoints.matrices import Matrix, check_comparable, matrices, read_pairs
from refusal_jax.checkpoints.rewrite import Checkpoint
from refusal_jax.checkpoints.spectra import MOST, leading_part, separable_rank
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.families import Piece, pieces
from refusal_jax.models.hf_config import load_config
from refusal_jax.progress import each


@dataclasses.dataclass(frozen=True)
class Taken:
    """Holds what was taken out of one tensor. rank: of what was taken. separable: whether the singular values of its change drop
    there. share: of the energy of its change."""

    name: str
    rank: int
    separable: bool
    share: float


@dataclasses.dataclass(frozen=True, eq=False)
class Stripped:
    """A checkpoint without the low-rank part of its change. adapter: whether it was an adapter that was left out. taken: what
    was taken out of each tensor that had changed, empty for an adapter."""

    model: ChatModel
    adapter: bool
    taken: list[Taken]

    @property
    def record(self) -> dict:
        """Returns, for the results, in how many tensors what was taken, and its share of the change's energy."""
        ranks = [one.rank for one in self.taken if one.rank]
        return {
            "adapter": self.adapter,
            "changed_tensors": len(self.taken),
            "separable_tensors": sum(one.separable for one in self.taken),
            "median_rank": int(np.median(ranks)) if ranks else None,
            "median_share": float(np.median([one.share for one in self.taken])) if self.taken else None,
        }


def strip(model: ChatModel, base: pathlib.Path | None, rank: int, otherwise: int) -> Stripped:
    """Returns a checkpoint without its change of low rank.

    base: the folder of what it was trained from; an adapter names its own. rank: how much of each tensor's change is taken
    out, 0 for the rank at which its singular values drop, as those of a merged adapter do, or for `otherwise` where they do
    not. Of a bias or a norm, whose change has rank one, all of it is. Rows of an embedding that the base does not have stay.

    Memory: one tensor of each checkpoint on the host, and copies of the weights that changed on the devices. Raises UserError
    for checkpoints that cannot be read or compared.
    """
    parts = adapter_parts(model.path)
    if parts is not None:
        return Stripped(without_adapter(model, parts[1]), True, [])
    assert base is not None, "whoever calls this has a base, or an adapter"
    ours, theirs = Checkpoint.open(model.path), Checkpoint.open(base)
    check_comparable(theirs.cfg, ours.cfg)
    weights, copied, taken = model.decoder.weights(), set(), []

    def less(piece: Piece, left: np.ndarray, right: np.ndarray) -> None:
        path = piece.path
        weight = weights[path] if path in copied else jnp.copy(weights[path])
        copied.add(path)
        sharding, shape = weight.sharding, weight.shape[len(piece.index) :]
        rows = math.prod(shape) // right.shape[1]
        padded = _padded(left, right, rows, max(rank, otherwise, MOST))
        weights[path] = jax.device_put(_less(weight, *padded, np.asarray(piece.index, np.int32)), sharding)

    for matrix, before, after in each(_pairs(theirs, ours), "removing the delta", "tensor", _count(ours.cfg)):
        change = after - before
        if not change.any():
            continue
        found = 0 if rank else separable_rank(before, after)
        left, right = leading_part(change, rank or found or otherwise)
        taken.append(Taken(matrix.name, len(right), found > 0, _share(change, right)))
        less(matrix.piece, *((left, right) if _as_stored(matrix) else (right.T, left.T)))
    for piece, change in _vectors(theirs, ours):
        taken.append(Taken(piece.name, 1, True, 1.0))
        less(piece, change.reshape(-1, 1), np.ones((1, 1), np.float32))
    decoder = Decoder(model.config, weights, model.mesh)
    return Stripped(dataclasses.replace(model, decoder=decoder), False, taken)


def without_adapter(model: ChatModel, base: pathlib.Path) -> ChatModel:
    """Returns the base of a model that is an adapter on it, with the same prompts where the vocabulary is the same. Raises
    UserError for a base that cannot be loaded."""
    cfg, chat = load_config(base), model.chat
    if cfg.vocab_size != model.config.vocab_size:
        chat = Chat.load(
            base, cfg.context_length, cfg.vocab_size, thinking=chat.thinking, system_prompt=chat.system_prompt
        )
    return dataclasses.replace(
        model, decoder=load_decoder(base, str(model.decoder.dtype), model.mesh), chat=chat, path=base
    )


def _pairs(base: Checkpoint, candidate: Checkpoint) -> Iterator[tuple[Matrix, np.ndarray, np.ndarray]]:
    """Yields the matrices of a candidate with their values in both checkpoints, the stream's axis first; of an embedding
    those of the tokens that both have."""
    yield from read_pairs(base, candidate, matrices(candidate.cfg))
    theirs = {one.path: one for one in matrices(base.cfg, embeddings=True)}
    for matrix in _ends(candidate.cfg):
        there = theirs.get(matrix.path, theirs["embed"])  # a candidate may have untied what the base ties
        before, after = there.read(base), matrix.read(candidate)
        common = min(before.shape[1], after.shape[1])
        yield matrix, before[:, :common], after[:, :common]


def _ends(cfg: ModelConfig) -> list[Matrix]:
    return [one for one in matrices(cfg, embeddings=True) if one.layer is None]


def _count(cfg: ModelConfig) -> int:
    return len(matrices(cfg, embeddings=True))


def _as_stored(matrix: Matrix) -> bool:
    """Returns whether a matrix with the stream's axis first lies as it does in the decoder."""
    return matrix.writes and matrix.path != "embed"


def _vectors(base: Checkpoint, candidate: Checkpoint) -> Iterator[tuple[Piece, np.ndarray]]:
    """Yields the biases and norms that changed, each with its change as a vector."""
    theirs = {(piece.path, piece.index): piece for piece in pieces(base.cfg)}
    of_matrices = {(one.path, one.piece.index) for one in matrices(candidate.cfg, embeddings=True)}
    for piece in pieces(candidate.cfg):
        place = piece.path, piece.index
        if place in of_matrices:
            continue
        after = piece.rows(candidate.rows)
        before = theirs[place].rows(base.rows) if place in theirs else np.zeros_like(after)
        if before.shape == after.shape and (change := after - before).any():
            yield piece, change.astype(np.float32)


def _share(change: np.ndarray, right: np.ndarray) -> float:
    """Returns the share of a change's energy that its part of low rank has. right: whose rows have its singular values."""
    total = float(np.einsum("df,df->d", change, change).astype(np.float64).sum())
    return float(np.square(right.astype(np.float64)).sum()) / total


def _padded(left: np.ndarray, right: np.ndarray, rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns two factors with zeros up to a number of rows and a rank, so that few programs are compiled."""
    more = max(width - left.shape[1], 0)
    return np.pad(left, ((0, rows - len(left)), (0, more))), np.pad(right, ((0, more), (0, 0)))


@partial(jax.jit, donate_argnames="weight")
def _less(
    weight: Float[jax.Array, "..."], left: Float[Array, "_ J"], right: Float[Array, "J _"], index: Int[Array, " n"]
) -> Float[Array, "..."]:
    """Returns a stacked weight of which the matrix, or the vector, at `index` is less by a product."""
    place = tuple(index[i] for i in range(index.shape[0]))
    here = weight[place].astype(jnp.float32)
    part = jnp.matmul(left, right, precision="highest").reshape(here.shape)
    return weight.at[place].set((here - part).astype(weight.dtype))

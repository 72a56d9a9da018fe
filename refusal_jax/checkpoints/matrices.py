"""The matrices of a checkpoint as comparisons read them: one at a time, whatever file or array holds them, with the axis of the
residual stream first.

Memory: one matrix of each checkpoint, and one more that is read ahead.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from refusal_jax.errors import UserError
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.families import WRITERS, Piece, hf_shapes, pieces
from refusal_jax.models.weights import weight_table

# Of what reads from the stream, that which belongs to a layer's sequence mixer.
MIXER_READERS = re.compile(r"blocks\.((full_)?[qkv]|latent_(q|q_down|kv_down)|(delta|ssm|conv)_\w+)")


@runtime_checkable
class Weights(Protocol):
    """The weights of one checkpoint, by the tensor names of its family's table, of which any rows can be read by several threads
    at a time."""

    @property
    def cfg(self) -> ModelConfig: ...

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Float32[np.ndarray, "..."]:
        """Returns rows `start` to `stop` of a tensor, all by default. Raises UserError if they cannot be read."""
        ...


@dataclasses.dataclass(frozen=True)
class Matrix:
    """One matrix of a decoder that writes to the residual stream or reads from it.

    piece: where it is in the checkpoint's tensors. writes: whether its rows are the stream's entries, else its columns are.
    """

    piece: Piece
    writes: bool

    @property
    def name(self) -> str:
        """Returns the name of its tensor, with the expert's number where one tensor holds all experts."""
        return self.piece.name + "".join(f"[{expert}]" for expert in self.piece.within)

    @property
    def path(self) -> str:
        """Returns its path in the decoder, such as "blocks.o"."""
        return self.piece.path

    @property
    def layer(self) -> int | None:
        """Returns the layer that it belongs to, None for the embedding and the unembedding."""
        return self.piece.layer

    @property
    def of_mixer(self) -> bool:
        """Returns whether it belongs to a layer's sequence mixer, attention or what stands in its place, and not to its MLP."""
        return WRITERS[self.path] == "attn_out" if self.writes else bool(MIXER_READERS.fullmatch(self.path))

    def read(self, weights: Weights) -> Float32[np.ndarray, "D F"]:
        """Returns its values with the stream's axis first, whatever it is in the file. Raises UserError as `rows` does."""
        values = self.piece.rows(weights.rows)
        stream_is_last = not self.writes or self.path == "embed"
        return values.T if stream_is_last else values


def matrices(cfg: ModelConfig, embeddings: bool = False) -> list[Matrix]:
    """Returns all matrices that write to the residual stream or read from it, layer by layer.

    embeddings: whether the embedding and the unembedding are among them, before and after the layers.
    """
    table = weight_table(cfg)
    found = [Matrix(piece, piece.path in WRITERS) for piece in pieces(cfg) if "embed" in table[piece.path].axes]
    blocks = sorted((one for one in found if one.layer is not None), key=lambda one: one.layer or 0)
    if not embeddings:
        return blocks
    ends = {one.path: one for one in found if one.layer is None}
    return [*(ends[p] for p in ("embed",) if p in ends), *blocks, *(ends[p] for p in ("unembed",) if p in ends)]


def read_all(weights: Weights, wanted: Iterable[Matrix]) -> Iterator[tuple[Matrix, Float32[np.ndarray, "D F"]]]:
    """Yields matrices with their values; while one is worked on, the next is read."""
    for matrix, (values,) in _ahead((weights,), wanted):
        yield matrix, values


def read_pairs(
    base: Weights, candidate: Weights, wanted: Iterable[Matrix]
) -> Iterator[tuple[Matrix, Float32[np.ndarray, "D F"], Float32[np.ndarray, "D F"]]]:
    """Yields matrices with their values in the base and in the candidate; while one is worked on, the next is read."""
    for matrix, (before, after) in _ahead((base, candidate), wanted):
        yield matrix, before, after


def _ahead(sources: Sequence[Weights], wanted: Iterable[Matrix]):
    """Yields matrices with their values in each source, with one of them read ahead."""
    with ThreadPoolExecutor(len(sources)) as pool:
        waiting = None
        for matrix in wanted:
            coming = matrix, [pool.submit(matrix.read, source) for source in sources]
            if waiting is not None:
                yield waiting[0], [one.result() for one in waiting[1]]
            waiting = coming
        if waiting is not None:
            yield waiting[0], [one.result() for one in waiting[1]]


def check_comparable(base: ModelConfig, candidate: ModelConfig) -> None:
    """Raises UserError unless the layers of both configs have the same matrices of the same shapes, which a comparison needs.

    The vocabularies may differ: then some embeddings cannot be compared, and the layers can. So may biases, which an edit can
    add, and the name of the architecture, where its tensors are the same.
    """
    ours, theirs = _layer_shapes(base), _layer_shapes(candidate)
    if ours == theirs:
        return
    facts = [
        f"{what} {one} and {other}"
        for what, one, other in (
            ("architecture", base.family, candidate.family),
            ("width", base.d_model, candidate.d_model),
            ("number of layers", base.n_layers, candidate.n_layers),
        )
        if one != other
    ]
    differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    raise UserError(
        "The candidate's weights cannot be compared with the base's, because they differ in shape (base and candidate: "
        f"{', '.join(facts) or differing[0]}). Name the checkpoint that the candidate was made from, or leave the base out."
    )


def _layer_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors that hold the matrices of the layers."""
    names = {one.piece.name for one in matrices(cfg)}
    return {name: shape for name, shape in hf_shapes(cfg).items() if name in names}

"""Goes through a base and a candidate matrix by matrix, and keeps of each what its change is.

Readers are compared as they act: where a norm's gains were multiplied into what reads from it, which computes the same, the
matrix is divided by them again. Neurons and heads that were put in another order are put back. Memory: a few matrices.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float32, Float64

from refusal_jax.audit.frame import Frame
from refusal_jax.audit.operator_fit import CLEAR, OperatorFit, Part, fit_operator
from refusal_jax.audit.reordering import SAME, order_of
from refusal_jax.audit.storage import Storage, storage
from refusal_jax.checkpoints.matrices import Matrix, Weights, matrices, read_pairs
from refusal_jax.checkpoints.spectra import separable_rank
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.families import WRITER_BIASES, pieces

SAMPLE = 8192  # tokens whose embeddings are looked at
RANKED = 8  # about so many matrices are looked at for the rank of their change
SMALL = 2**16  # values that fit into a cache
VISIBLE = 0.01  # a relative change of gains or biases that is more than storage in 16 bits makes
ROUNDING = 1e-5  # a relative change that is no more than the rounding of a product
NORMS, OF_MLP = (
    ("blocks.attn_norm", "blocks.mlp_norm"),
    ("gate", "up", "router"),
)  # before a mixer and an MLP; what reads there
POST_NORMS = tuple(
    f"blocks.{kind}_post_norm" for kind in ("attn", "mlp", "beside", "expert", "per_layer")
)  # of what is written
KINDS = ("", "shared_", "dense_", "expert_")


@dataclasses.dataclass(frozen=True, eq=False)
class Compared:
    """One matrix. fit: what its change is, None if there is none. reordered: whether its columns had been put in
    another order; folded: whether a norm's gains had been multiplied into it; rank: of a change that ends at one, 0
    for others, None where that was not looked at; lengths: as in `lengths_kept`; moved: whether nothing of it is in
    its place, so that its change means nothing."""

    matrix: Matrix
    fit: OperatorFit | None
    storage: Storage | None = None
    reordered: bool = False
    folded: bool = False
    rank: int | None = None
    lengths: float = 0.0

    @property
    def moved(self) -> bool:
        return self.fit is not None and self.fit.cosine < SAME


@dataclasses.dataclass(frozen=True, eq=False)
class Vector:
    """A norm's gains or a bias. path, layer: where it is. ratio_d: gains after over gains before, which nothing that reads from
    the norm makes up for. added_d: what was added to a bias; one of both."""

    path: str
    layer: int | None
    ratio_d: Float64[np.ndarray, " D"] | None = None
    added_d: Float64[np.ndarray, " D"] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """All that was compared, in order. vectors: those that changed. turned: whether the stream's entries were in another order,
    and have been put back. others: the number of norms and biases that changed, but for
    gains that were multiplied into what reads from them."""

    rows: Sequence[Compared]
    vectors: Sequence[Vector]
    turned: bool = False
    others: int = 0


@dataclasses.dataclass(frozen=True)
class _Sampled(Matrix):
    """An embedding of which only some tokens are read. tokens: how many both checkpoints have."""

    tokens: int = 0

    def read(self, weights: Weights) -> Float32[np.ndarray, "D F"]:
        """Returns blocks of its columns."""
        blocks = 8 if self.tokens > SAMPLE else 1
        size = min(SAMPLE, self.tokens) // blocks
        starts = np.linspace(0, self.tokens - size, blocks).astype(int)
        parts = [weights.rows(self.piece.name, int(start), int(start) + size) for start in starts]
        return np.concatenate(parts).T


def compare(base: Weights, candidate: Weights, frame: Frame) -> Comparison:
    """Returns what changed. Both have the same matrices, but for the number of tokens. Raises UserError for what
    cannot be read."""
    wanted = list(_wanted(base.cfg, candidate.cfg))
    order = stream_order(base, candidate, wanted)
    ratios = gain_ratios(base, candidate, order)
    rows, made_up, seen = [], set(), 0
    every = max(1, len(wanted) // RANKED)
    for matrix, before, after in read_pairs(base, candidate, wanted):
        norm = _norm_of(matrix, base.cfg.parallel), matrix.layer
        if order is None and norm not in ratios and _same(before, after):
            rows.append(Compared(matrix, None))
            continue
        kept, folded = _storage(matrix, before, after), False
        after = after if order is None else after[order]
        if norm in ratios:
            acting = after * ratios[norm].astype(np.float32)[:, None]
            folded = bool(np.linalg.norm(acting - before) < np.linalg.norm(after - before))
            after = acting if folded else after
            made_up |= {norm} if folded else set()
        columns = order_of(before, after, frame.span_jd)
        after = after if columns is None else after[:, columns]
        fit = fit_operator(before, after, frame)
        if folded and fit is not None and fit.relative < ROUNDING:
            fit = None
        rank = separable_rank(before, after) if fit is not None and seen % every == 0 else None
        seen += fit is not None
        part = fit.refusal if fit is not None else None
        lengths = lengths_kept(before, after, part) if part is not None and part.fit >= CLEAR else 0.0
        rows.append(Compared(matrix, fit, kept, columns is not None, folded, rank, lengths))
    gains = [Vector(*norm, ratio_d=ratio) for norm, ratio in ratios.items() if norm not in made_up]
    biases = added_biases(base, candidate, order)
    return Comparison(
        rows, [*gains, *biases], order is not None, changed_vectors(base, candidate, order) - len(made_up)
    )


def stream_order(base: Weights, candidate: Weights, wanted: Sequence[Matrix]) -> np.ndarray | None:
    """Returns for each entry of the stream which one it became in the candidate, told by the embeddings; None unless they are in
    another order."""
    embed = next(one for one in wanted if one.path == "embed")
    before, after = embed.read(base), embed.read(candidate)
    away = np.zeros((0, before.shape[1]), np.float32)
    return order_of(before.T, after.T, away)


def gain_ratios(
    base: Weights, candidate: Weights, order: np.ndarray | None = None
) -> dict[tuple[str, int | None], np.ndarray]:
    """Returns the gains of norms in the candidate as shares of the base's, by path and layer, where any changed by more than
    VISIBLE. Gains of zero in either count as unchanged. order: as of `stream_order`."""
    found, theirs = {}, {piece.name for piece in pieces(candidate.cfg)}
    for piece in pieces(base.cfg):
        if piece.path not in (*NORMS, *POST_NORMS, "final_norm") or piece.name not in theirs:
            continue
        old, new = (one.cfg.norm_offset + piece.rows(one.rows).astype(np.float64) for one in (base, candidate))
        new = new if order is None else new[order]
        ratio = np.divide(new, old, out=np.ones_like(old), where=(np.abs(old) > 1e-6) & (np.abs(new) > 1e-6))
        if np.abs(ratio - 1).max() > VISIBLE:
            found[piece.path, piece.layer] = ratio
    return found


def lengths_kept(before_df: Float32[np.ndarray, "D F"], after_df: Float32[np.ndarray, "D F"], part: Part) -> float:
    """Returns how far an edit's rows got the lengths back that it took from them: 0 for a plain projection, 1 for one that keeps
    lengths. Rows are the stream's entries."""
    u = part.direction_d.astype(np.float32)
    along = u @ before_df
    lost = -2 * part.dose * u * (before_df @ along) + part.dose**2 * u**2 * (along @ along)
    seen = np.einsum("df,df->d", after_df, after_df) - np.einsum("df,df->d", before_df, before_df)
    return float(1 - seen @ lost / max(lost @ lost, 1e-30))


def added_biases(base: Weights, candidate: Weights, order: np.ndarray | None = None) -> Iterator[Vector]:
    """Yields what was added to biases of what writes to the stream, those that only the candidate has among them."""
    ours = {(piece.path, piece.index) for piece in pieces(base.cfg)}
    for piece in pieces(candidate.cfg):
        if piece.path not in WRITER_BIASES:
            continue
        added = piece.rows(candidate.rows).astype(np.float64)
        added = added if order is None else added[order]
        before = piece.rows(base.rows) if (piece.path, piece.index) in ours else np.zeros_like(added)
        added -= before
        if np.linalg.norm(added) > VISIBLE * np.linalg.norm(before):
            yield Vector(piece.path, piece.layer, added_d=added)


def changed_vectors(base: Weights, candidate: Weights, order: np.ndarray | None = None) -> int:
    """Returns how many norms and biases differ, those that only one has among them unless they are zero."""
    ours, theirs = ({(piece.path, piece.index): piece for piece in pieces(one.cfg)} for one in (base, candidate))
    compared = {
        (one.piece.path, one.piece.index) for w in (base, candidate) for one in matrices(w.cfg, embeddings=True)
    }
    changed = 0
    for key in sorted((ours.keys() | theirs.keys()) - compared):
        before = ours[key].rows(base.rows) if key in ours else np.zeros(1, np.float32)
        after = theirs[key].rows(candidate.rows) if key in theirs else np.zeros(1, np.float32)
        if order is not None and np.shape(after) == order.shape:
            after = after[order]
        changed += bool(np.any(before != after))
    return changed


def _wanted(base: ModelConfig, candidate: ModelConfig) -> Iterator[Matrix]:
    """Yields the matrices of the base, of embeddings a sample, and none that are only the base's own."""
    theirs = {piece.name for piece in pieces(candidate)}
    for matrix in matrices(base, embeddings=True):
        if matrix.layer is None and matrix.piece.name not in theirs:
            continue
        if matrix.layer is None:
            yield _Sampled(matrix.piece, matrix.writes, min(base.vocab_size, candidate.vocab_size))
        else:
            yield matrix


def _norm_of(matrix: Matrix, parallel: bool) -> str:
    """Returns the path of the norm that a matrix reads from, "" for what writes. parallel: whether a block has one norm."""
    if matrix.path == "unembed":
        return "final_norm"
    attention, mlp = NORMS
    if matrix.of_mixer:
        return "" if matrix.writes else attention
    reads = matrix.path in {f"blocks.{kind}{part}" for kind in KINDS for part in OF_MLP}
    return (attention if parallel else mlp) if reads else ""


def _storage(matrix: Matrix, before: np.ndarray, after: np.ndarray) -> Storage:
    in_file = matrix.writes and matrix.path != "embed"
    return storage(before, after) if in_file else storage(before.T, after.T)


def _same(before: np.ndarray, after: np.ndarray) -> bool:
    """Returns whether two matrices, which are laid out alike, are equal: block by block, which stays in the cache."""
    before, after = (before, after) if before.flags.c_contiguous else (before.T, after.T)
    rows = max(1, SMALL // before.shape[1])
    return all(np.array_equal(before[i : i + rows], after[i : i + rows]) for i in range(0, len(before), rows))

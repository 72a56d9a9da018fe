"""Finds what was removed from each tensor of a candidate, as an operator on the residual stream, and how it is undone.

A projection edit of strength w makes W' = (I - w u u^T) W of a matrix W. What is left of W along u is 1 - w of it, so
W = W' + w / (1 - w) u u^T W' as long as w is not 1: a partial edit loses nothing but what storage rounds away, and that is
amplified by 1 / |1 - w|. In general W' = (I - U Omega R^T) W, with an orthonormal U of the few directions that the change
W' - W writes to, and with R = U, or R = s^2 U: behind a norm of scales s; and where the edit was made on rows of length 1, which
got their old lengths n back, s = 1 / n. Then

    W = W' + U Omega (I - R^T U Omega)^-1 R^T W'.

U and Omega are measured on the pair of matrices; no prompt and no direction is needed.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float32, Float64

from refusal_jax.checkpoints.matrices import Matrix, Weights, matrices
from refusal_jax.export.tensor_edits import Projection, scale_after
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.families import TABLES, WRITER_BIASES
from refusal_jax.models.weights import weight_table

MOST_DIRECTIONS = 8  # that are looked for in one tensor
SKETCH, POWERS = 24, 3  # columns of the random sketch that finds them, and how often it is multiplied by the change
EDGE = 1.3  # a direction's singular value is at least this multiple of the largest that noise of the same energy has
LEAST_DOSE = 0.02  # removed share of a direction; storage alone comes to a few thousandths
LEAST_FIT = 0.5  # share of what the change writes to a direction that W's own part along it must explain
CLEARLY = 0.01  # share of what it explains by which another form of the operator must be better than the plain one
LEAST_CHANGE = 1e-7  # of a tensor's norm; float32 itself rounds more

# A removal that is most of its tensor's change speaks for itself. Rounding to few bits hides one, and makes others: where a group
# has a large entry, small ones become zero. So of what is less, only that counts which several writers have alike.
CLEAR, AGREEMENT, WITNESSES = 0.5, 0.7, 2  # share of the change's energy; cosine; number of other tensors

# The error of what is put back along the directions, relative to what the base has there, up to which a tensor is repaired.
# At 0.5 three quarters of its energy are right; near 1 what is left is the noise of storage, of which nothing can be made.
MOST_ERROR = 0.5


@dataclasses.dataclass(frozen=True, eq=False)
class Removal:
    """Holds what was removed from one tensor, W' = (I - U Omega R^T) W.

    matrix: one of the decoder's matrices that the tensor holds. left_dj: U, orthonormal. right_dj: R. omega_jj: Omega, whose
    eigenvalues are the removed shares. change: |W' - W| / |W|. explained: the share of the change's energy that the operator
    is. along: |U^T W| / |W|. error: of U^T W as it would be put back, relative to it.
    """

    matrix: Matrix
    left_dj: Float64[np.ndarray, "D J"]
    right_dj: Float64[np.ndarray, "D J"]
    omega_jj: Float64[np.ndarray, "J J"]
    change: float
    explained: float
    along: float
    error: float

    @property
    def tensor(self) -> str:
        """Returns the tensor's name."""
        return self.matrix.piece.name

    @property
    def doses(self) -> Float64[np.ndarray, " J"]:
        """Returns the removed share of each direction, the largest first."""
        return np.sort(np.linalg.eigvals(self._seen_jj).real)[::-1]

    @property
    def amplification(self) -> float:
        """Returns the factor by which undoing enlarges an error along the directions, 1 / |1 - w| of one; infinite for w = 1."""
        left = np.linalg.svd(np.eye(len(self.omega_jj)) - self._seen_jj, compute_uv=False)
        return float(1 / left[-1]) if left[-1] > 0 else np.inf

    @property
    def repairable(self) -> bool:
        """Returns whether the candidate alone holds enough to restore the tensor."""
        return bool(np.isfinite(self.amplification) and self.error <= MOST_ERROR)

    @property
    def undo(self) -> Projection:
        """Returns the edit that undoes the removal: of one direction, a projection of scale -w / (1 - w)."""
        # The stream is the last axis of readers, of the embedding, and of tensors that are stored [in, out].
        by_rows = not self.matrix.writes or self.matrix.path == "embed" or self.matrix.piece.transposed
        return Projection(self.left_dj @ self._back_jj, self.right_dj, by_rows, "restored", -1.0)

    @property
    def _seen_jj(self) -> Float64[np.ndarray, "J J"]:
        return self.right_dj.T @ self.left_dj @ self.omega_jj

    @property
    def _back_jj(self) -> Float64[np.ndarray, "J J"]:
        """Returns Omega (I - R^T U Omega)^-1."""
        return self.omega_jj @ np.linalg.pinv(np.eye(len(self.omega_jj)) - self._seen_jj, rcond=1e-12)


@dataclasses.dataclass(frozen=True)
class Unexplained:
    """A tensor whose change is no removal of directions. change: |W' - W| / |W|."""

    matrix: Matrix
    change: float

    @property
    def tensor(self) -> str:
        """Returns the tensor's name."""
        return self.matrix.piece.name


def removals(base: Weights, candidate: Weights) -> Iterator[Removal | Unexplained]:
    """Yields what was done to each tensor that differs and that writes to the residual stream or reads from it. Raises UserError
    as reading them does.

    Memory: one tensor of each checkpoint.
    """
    for group in by_tensor(matrices(candidate.cfg, embeddings=_same_ends(base.cfg, candidate.cfg))):
        before, after = (np.concatenate([m.read(w) for m in group], axis=1) for w in (base, candidate))
        scale_d = norm_scale(base, group[0])
        found = removal(group[0], before, after, scale_d)
        if found is not None:
            yield found


def believed(found: Sequence[Removal | Unexplained]) -> list[Removal | Unexplained]:
    """Returns what was found, with removals that may be accidents of rounding as changes that are unexplained."""
    written = [one for one in found if isinstance(one, Removal) and one.matrix.writes and one.matrix.layer is not None]

    def witnessed(one: Removal) -> bool:
        others = [other for other in written if other is not one]
        alike = sum(np.linalg.norm(one.left_dj.T @ other.left_dj, 2) >= AGREEMENT for other in others)
        return one in written and bool(alike >= WITNESSES)

    return [
        Unexplained(one.matrix, one.change)
        if isinstance(one, Removal) and one.explained < CLEAR and not witnessed(one)
        else one
        for one in found
    ]


def by_tensor(wanted: Sequence[Matrix]) -> list[list[Matrix]]:
    """Returns the matrices in groups of those that one tensor holds, such as those of all experts."""
    groups: dict[str, list[Matrix]] = {}
    for matrix in wanted:
        groups.setdefault(matrix.piece.name, []).append(matrix)
    return list(groups.values())


def _same_ends(base: ModelConfig, candidate: ModelConfig) -> bool:
    """Returns whether the embeddings can be compared."""
    return base.vocab_size == candidate.vocab_size and base.tied_embeddings == candidate.tied_embeddings


def norm_scale(weights: Weights, matrix: Matrix) -> Float64[np.ndarray, " D"] | None:
    """Returns the scale of the norm between a writer and the stream, None where there is none."""
    return scale_after(weights, matrix.path, matrix.layer) if matrix.writes else None


def removal(
    matrix: Matrix,
    before_df: Float32[np.ndarray, "D F"],
    after_df: Float32[np.ndarray, "D F"],
    scale_d: Float64[np.ndarray, " D"] | None = None,
) -> Removal | Unexplained | None:
    """Returns what was removed from a tensor, or that its change is none, or None for a tensor that is as it was.

    scale_d: of the norm behind it, if there is one.
    """
    change_df, size = after_df - before_df, float(np.linalg.norm(before_df))
    energy = float(np.vdot(change_df, change_df))
    change = np.sqrt(energy) / max(size, 1e-30)
    if change <= LEAST_CHANGE:
        return None
    left_dj = directions_of(change_df)
    lengths_d = np.linalg.norm(after_df, axis=1).astype(np.float64)
    scales = [np.ones(len(left_dj)), np.sqrt(np.mean(lengths_d**2)) / np.maximum(lengths_d, 1e-30)]
    scales += [] if scale_d is None else [scale_d]
    found = [_operator(left_dj, left_dj * s_d[:, None] ** 2, before_df, change_df) for s_d in scales]
    fits = [fit for fit in found if fit is not None]
    if not fits:
        return Unexplained(matrix, change)
    # The plain form, if it is there, comes first, and gives way only to what is clearly better.
    left_dj, right_dj, omega_jj, explained = max(fits, key=lambda fit: fit[-1] * (1 + CLEARLY * (fit is fits[0])))
    one = Removal(matrix, left_dj, right_dj, omega_jj, change, explained / energy, 0.0, np.inf)
    own_jf, written_jf = left_dj.T @ before_df, left_dj.T @ change_df
    error = np.linalg.norm(one._back_jj @ (right_dj.T @ after_df) + written_jf)
    length = float(np.linalg.norm(own_jf))
    return dataclasses.replace(one, along=length / size, error=float(error / max(length, 1e-30)))


def directions_of(change_df: Float32[np.ndarray, "D F"]) -> Float64[np.ndarray, "D J"]:
    """Returns an orthonormal basis of what a change writes to: its left singular vectors, at least one and at most
    MOST_DIRECTIONS, that stand out from noise of the energy that the others have. They are found from a random sketch."""
    d, f = change_df.shape
    columns = min(SKETCH, d, f)
    rng = np.random.default_rng(0)
    basis_dk = np.linalg.qr(change_df @ rng.standard_normal((f, columns), np.float32))[0]
    for _ in range(POWERS):
        basis_dk = np.linalg.qr(change_df @ (change_df.T @ basis_dk))[0]
    inner_k, values, _ = np.linalg.svd((basis_dk.T @ change_df).astype(np.float64), full_matrices=False)
    total = float(np.sum(np.square(change_df, dtype=np.float64)))
    count = 1
    while count < min(MOST_DIRECTIONS, len(values) - 1):
        rest = max(total - float(np.sum(values[:count] ** 2)), 0.0) / (d * f)
        if values[count] <= EDGE * np.sqrt(rest) * (np.sqrt(d) + np.sqrt(f)):
            break
        count += 1
    return np.linalg.qr(basis_dk.astype(np.float64) @ inner_k[:, :count])[0]


def _operator(left_dj, right_dj, before_df, change_df):
    """Returns U, R, Omega and the energy of the change that they explain, in those directions of `left_dj` where the change is
    minus a positive share of what W has along `right_dj`; None if there is none."""
    own_jf, written_jf = (right_dj.T @ before_df).astype(np.float64), (left_dj.T @ change_df).astype(np.float64)
    cross, gram, total = written_jf @ own_jf.T, own_jf @ own_jf.T, written_jf @ written_jf.T
    explained = cross @ np.linalg.pinv(gram, rcond=1e-10) @ cross.T
    # The directions in which the largest share of the change is explained: eigenvectors of the one by the other.
    root = np.linalg.cholesky(total + 1e-12 * np.trace(total) * np.eye(len(total)))
    inverse = np.linalg.inv(root)
    shares, vectors = np.linalg.eigh(inverse @ explained @ inverse.T)
    kept = root @ vectors[:, shares >= LEAST_FIT]
    if not kept.shape[1]:
        return None
    turn_jk = np.linalg.qr(kept)[0]
    for _ in range(2):  # the second time without directions that little was removed of, or that were added to
        left, right = left_dj @ turn_jk, right_dj @ turn_jk
        own, written = (right.T @ before_df).astype(np.float64), (left.T @ change_df).astype(np.float64)
        omega = -written @ own.T @ np.linalg.pinv(own @ own.T, rcond=1e-10)
        doses, axes = np.linalg.eigh((omega + omega.T) / 2)
        if (doses >= LEAST_DOSE).all():
            residual = written + omega @ own
            return left, right, omega, float(np.sum(written**2) - np.sum(residual**2))
        if not (doses >= LEAST_DOSE).any():
            return None
        turn_jk = turn_jk @ axes[:, doses >= LEAST_DOSE]
    return None


def bias_of(cfg: ModelConfig, matrix: Matrix) -> str | None:
    """Returns the name of the bias that a writer adds after its product, None where it has none."""
    path = f"{matrix.path}_bias"
    if path not in WRITER_BIASES or path not in weight_table(cfg):
        return None
    return TABLES[cfg.family][path].format(l=matrix.layer)

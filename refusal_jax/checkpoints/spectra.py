"""The rank of a change, where its singular values drop from those of an edit or an adapter to those of rounding noise, and its
part of that rank."""

import numpy as np
from jaxtyping import Float32

COLUMNS = 2048
MOST = 40  # ranks beyond this are not told from full ones
DROP = 6.0  # by which a singular value exceeds the next one where a change of low rank ends
ENTIRE = 0.5  # share of the energy that a change of low rank has above the drop
EXACT = 512  # rows or columns up to which all singular values are computed
SPARE = 8  # directions that a range finder looks for beyond those that are wanted


def separable_rank(before_df: Float32[np.ndarray, "D F"], after_df: Float32[np.ndarray, "D F"]) -> int:
    """Returns the rank of a matrix's change if that is low but for noise, 0 for any other. The first COLUMNS tell it."""
    change_df = after_df[:, :COLUMNS] - before_df[:, :COLUMNS]
    values = leading_values(change_df, MOST)
    total = float(np.einsum("df,df->d", change_df, change_df).astype(np.float64).sum())
    drops = values[:-1] / np.maximum(values[1:], 1e-4 * values[0])
    if not len(drops) or not total:
        return 0
    rank = int(np.argmax(drops)) + 1
    return rank if drops[rank - 1] >= DROP and np.sum(values[:rank] ** 2) >= ENTIRE * total else 0


def leading_values(matrix_df: Float32[np.ndarray, "D F"], count: int) -> np.ndarray:
    """Returns about `count` of the largest singular values, by a randomised range finder with one power iteration."""
    basis = _leading_basis(matrix_df, count)
    return np.linalg.svd(basis.T @ matrix_df, compute_uv=False)[:count].astype(np.float64)


def leading_part(
    matrix_df: Float32[np.ndarray, "D F"], rank: int
) -> tuple[Float32[np.ndarray, "D J"], Float32[np.ndarray, "J F"]]:
    """Returns two factors whose product is the best approximation of a matrix by one of a rank, or of its full rank where that is
    smaller; of a matrix with more than EXACT rows and columns about the best, by the range finder of `leading_values` with two
    more power iterations."""
    if min(matrix_df.shape) <= EXACT:
        left, values, right = np.linalg.svd(matrix_df, full_matrices=False)
    else:
        basis = _leading_basis(matrix_df, rank, more=2)
        inner, values, right = np.linalg.svd(basis.T @ matrix_df, full_matrices=False)
        left = basis @ inner
    kept = min(rank, len(values))
    return left[:, :kept].astype(np.float32), (values[:kept, None] * right[:kept]).astype(np.float32)


def _leading_basis(matrix_df: np.ndarray, count: int, more: int = 0) -> np.ndarray:
    """Returns an orthonormal basis, `[D, count + SPARE]`, that nearly holds the leading left singular vectors."""
    size = min(count + SPARE, *matrix_df.shape)
    probes = np.random.default_rng(0).standard_normal((size, matrix_df.shape[0])).astype(np.float32)
    basis, _ = np.linalg.qr(matrix_df @ (probes @ matrix_df).T)
    for _ in range(more):
        basis, _ = np.linalg.qr(matrix_df @ (basis.T @ matrix_df).T)
    return basis

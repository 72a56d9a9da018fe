"""The rank of a change: where its singular values drop from those of an edit or an adapter to those of rounding noise."""

import numpy as np
from jaxtyping import Float32

COLUMNS = 2048
MOST = 40  # ranks beyond this are not told from full ones
DROP = 6.0  # by which a singular value exceeds the next one where a change of low rank ends
ENTIRE = 0.5  # share of the energy that a change of low rank has above the drop


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
    size = min(count + 8, *matrix_df.shape)
    probes = np.random.default_rng(0).standard_normal((size, matrix_df.shape[0])).astype(np.float32)
    basis, _ = np.linalg.qr(matrix_df @ (probes @ matrix_df).T)
    return np.linalg.svd(basis.T @ matrix_df, compute_uv=False)[:count].astype(np.float64)

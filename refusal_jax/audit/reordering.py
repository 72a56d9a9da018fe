"""Finds the order in which the neurons or heads of a matrix were put, which computes the same and hides every other change."""

import numpy as np
from jaxtyping import Float32, Int

from refusal_jax.audit.operator_fit import inner

SAME = 0.3  # cosine between a matrix before and after, below which its columns are looked for
SEEN = 64  # rows that tell this
NEAR = 0.2  # a column's distance to its match, as a share of its length, up to which it counts as found


def column_order(
    before_df: Float32[np.ndarray, "D F"], after_df: Float32[np.ndarray, "D F"], away_jd: Float32[np.ndarray, "J D"]
) -> Int[np.ndarray, " F"] | None:
    """Returns for each column which column of `after_df` it became, None unless each became one of its own.

    Columns are known by a few random combinations of their entries, in which directions `away_jd` (orthonormal), along which an
    edit is expected, have no part.
    """
    from scipy.spatial import KDTree

    width, columns = before_df.shape
    rows = np.random.default_rng(0).standard_normal((8, width)).astype(np.float32)
    rows -= rows @ away_jd.T @ away_jd
    old, new = (rows @ before_df).T, (rows @ after_df).T
    distances, found = KDTree(new).query(old)
    lengths = np.linalg.norm(old, axis=1)
    if np.median(distances / np.maximum(lengths, 1e-30)) > NEAR or len(np.unique(found)) < columns:
        return None
    return np.asarray(found, int)


def order_of(
    before_df: Float32[np.ndarray, "D F"], after_df: Float32[np.ndarray, "D F"], away_jd: Float32[np.ndarray, "J D"]
) -> Int[np.ndarray, " F"] | None:
    """Returns `column_order` where a matrix is so unlike what it was that its columns may be in another order; else None."""
    rows = np.linspace(0, len(before_df) - 1, min(SEEN, len(before_df))).round().astype(int)
    old, new = before_df[rows], after_df[rows]
    lengths = inner(old, old) * inner(new, new)
    return None if inner(old, new) > SAME * lengths**0.5 else column_order(before_df, after_df, away_jd)

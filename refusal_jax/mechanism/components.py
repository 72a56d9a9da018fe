"""Finds the directions in which points of the residual stream differ most: their principal components."""

import dataclasses

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Components:
    """The principal components of n points. axes_cd: unit directions, those of most variance first; along_nc: the points, less
    their mean, along them; shares_c: of the variance."""

    axes_cd: Float[np.ndarray, "c D"]
    along_nc: Float[np.ndarray, "n c"]
    shares_c: Float[np.ndarray, " c"]


def components_of(points_nd: Float[np.ndarray, "n D"], count: int = 2) -> Components:
    """Returns the first principal components, float64, each with the sign that makes its largest entry positive; of fewer
    independent ones than `count` the rest are zero."""
    centred = points_nd.astype(np.float64) - points_nd.mean(axis=0, dtype=np.float64)
    gram_nn = centred @ centred.T  # n is far smaller than D in large models
    squares, vectors_nn = np.linalg.eigh(gram_nn)
    squares, vectors_nn = np.maximum(squares[::-1], 0.0), vectors_nn[:, ::-1]
    whole, sizes = squares.sum(), np.sqrt(squares[:count])
    known = sizes > 1e-9 * max(np.sqrt(whole), 1e-300)
    axes_cd = vectors_nn[:, : len(sizes)].T @ centred / np.where(known, sizes, 1.0)[:, None] * known[:, None]
    axes_cd = np.pad(axes_cd, ((0, count - len(sizes)), (0, 0)))
    largest = np.take_along_axis(axes_cd, np.abs(axes_cd).argmax(axis=1)[:, None], axis=1)
    axes_cd = axes_cd * np.where(largest < 0, -1.0, 1.0)
    along_nc = centred @ axes_cd.T
    shares_c = (along_nc**2).sum(axis=0) / whole if whole > 0 else np.zeros(count)
    return Components(axes_cd, along_nc, shares_c)

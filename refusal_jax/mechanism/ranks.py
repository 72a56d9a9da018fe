"""Counts how many orthogonal directions must be ablated until refusal breaks, and what random directions and principal components
do instead.

Each next direction is the difference in means of the model in which all earlier ones are ablated, so that it is orthogonal to
them: what is left of the difference between harmful and harmless prompts once those are gone.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from refusal_jax.chat.messages import Prompt
from refusal_jax.chat.model import ChatModel
from refusal_jax.edits import EPS, Edits
from refusal_jax.mechanism.activations import activations
from refusal_jax.mechanism.som import padded

LEAST = 1e-4  # of the first difference's length: a shorter one is rounding


def ablations(basis_jd: Float[np.ndarray, "J D"], counts: list[int], width: int) -> Edits:
    """Returns a row for each count, which ablates so many of the first directions. width: of the rows, in directions, so that one
    compiled program serves all counts."""
    return Edits.ablate(padded([basis_jd[:count] for count in counts], max(width, 2)))


def mean_difference(
    model: ChatModel,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    place: tuple[int, int],
    rows: int,
    edits: Edits | None = None,
) -> Float[np.ndarray, " D"]:
    """Returns the mean residual of harmful prompts less that of harmless ones at a place, float64, under an edit of one row."""
    means = [
        activations(model, prompts, [place], rows, edits)[:, 0].astype(np.float64).mean(axis=0)
        for prompts in (harmful, harmless)
    ]
    return means[0] - means[1]


def left_over(
    difference_d: Float[np.ndarray, " D"], basis_jd: Float[np.ndarray, "J D"], first: float
) -> Float[np.ndarray, " D"] | None:
    """Returns the unit direction of a difference in means without what lies along earlier directions; None if that is no more
    than rounding. first: the length of the first difference."""
    left_d = difference_d
    for _ in range(2):  # once more, for what rounding leaves
        left_d = left_d - basis_jd.T @ (basis_jd @ left_d)
    norm = np.linalg.norm(left_d)
    return left_d / norm if norm > max(LEAST * first, EPS) else None


def random_directions(count: int, d_model: int, seed: int) -> Float[np.ndarray, "J D"]:
    """Returns orthonormal directions that have nothing to do with the model, float64 `[count, D]`, at most D."""
    drawn = np.random.default_rng(seed).normal(size=(d_model, min(count, d_model)))
    return np.linalg.qr(drawn)[0].T


def principal_components(kinds: Sequence[Float[np.ndarray, "_ D"]], count: int) -> Float[np.ndarray, "J D"]:
    """Returns the directions of the largest variance within kinds of points, orthonormal, float64, at most as many as there are.

    Each kind is taken relative to its own mean, so that the difference between the kinds is no part of the variance.
    """
    centred_nd = np.concatenate([np.float64(points) - np.float64(points).mean(axis=0) for points in kinds])
    _, sizes_j, basis_jd = np.linalg.svd(centred_nd, full_matrices=False)
    return basis_jd[: min(count, int((sizes_j > 1e-9 * sizes_j[0]).sum()))]

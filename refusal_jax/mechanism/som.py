"""Several directions of refusal by a self-organising map of harmful activations (arXiv 2511.08379).

The map's nodes lie where harmful prompts lie in the residual stream; each node less the harmless mean is a direction. Subsets of
these are ablated together, as the subspace that they span. The paper looks for the best subset by Bayesian search with up to 512
trials; here each subset grows out of the best one that is smaller by one, which tries each direction once for each size and
always gives the same.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from refusal_jax.errors import UserError, field


@dataclasses.dataclass(frozen=True)
class Map:
    """A square self-organising map. nodes_nd: the nodes that are the nearest to any point, float64, those of most points first.
    wins_n: of how many points each is the nearest."""

    nodes_nd: Float[np.ndarray, "n D"]
    wins_n: Int[np.ndarray, " n"]


def train_map(
    points_nd: Float[np.ndarray, "n D"],
    side: int,
    *,
    steps: int,
    rate: float,
    radius: float,
    seed: int,
) -> Map:
    """Returns the map of `side` x `side` nodes after so many steps, each of which draws a point and moves the nearest node and
    its neighbours towards it.

    rate, radius: of the first step, both divided by 1 + 2 t / steps at step t; a node at a distance of d on the grid moves
    exp(-d² / 2 radius²) times as far as the nearest. seed: of the points that nodes begin at, and of those that are drawn. Raises
    UserError for fewer points than nodes.
    """
    if len(points_nd) < side * side:
        raise UserError(
            f"A map of {side} x {side} nodes needs at least {side * side} harmful training prompts, there are {len(points_nd)}. "
            f"Make {field('som.side')} smaller, or draw more prompts in the study ({field('data.n_train')})."
        )
    rng, points_nd = np.random.default_rng(seed), np.asarray(points_nd, np.float64)
    nodes_nd = points_nd[rng.choice(len(points_nd), side * side, replace=False)].copy()
    place_n2 = np.stack(np.divmod(np.arange(side * side), side), axis=1)
    apart_nn = ((place_n2[:, None] - place_n2[None]) ** 2).sum(axis=-1)
    chosen = rng.integers(len(points_nd), size=steps)
    for step, number in enumerate(chosen):
        shrunk = 1 + 2 * step / steps
        point_d = points_nd[number]
        nearest = int(((nodes_nd - point_d) ** 2).sum(axis=1).argmin())
        share_n = np.exp(-apart_nn[nearest] / (2 * (radius / shrunk) ** 2))
        nodes_nd += (rate / shrunk) * share_n[:, None] * (point_d - nodes_nd)
    squares_n = (nodes_nd**2).sum(axis=1)
    winner_n = (squares_n[None] - 2 * points_nd @ nodes_nd.T).argmin(axis=1)
    wins_n = np.bincount(winner_n, minlength=len(nodes_nd))
    order = np.argsort(-wins_n, kind="stable")[: int((wins_n > 0).sum())]
    return Map(nodes_nd[order], wins_n[order])


def grow_subsets(
    count: int, most: int, scores: Callable[[list[tuple[int, ...]]], Float[np.ndarray, " M"]]
) -> list[tuple[tuple[int, ...], float]]:
    """Returns the best subset of each size from 1 to `most` that holds the best of the size before, with its score.

    count: of what subsets are taken. scores: of M subsets of one size; the lowest is the best, the first of several.
    """
    found: list[tuple[tuple[int, ...], float]] = []
    for _ in range(min(most, count)):
        before = found[-1][0] if found else ()
        tried = [(*before, one) for one in range(count) if one not in before]
        values = scores(tried)
        found.append((tried[int(np.argmin(values))], float(np.min(values))))
    return found


def padded(rows_jd: Sequence[np.ndarray], width: int) -> Float[np.ndarray, "M J D"]:
    """Returns sets of directions as one array, with rows of zeros after those of smaller sets: an ablation takes them for
    none."""
    return np.stack([np.pad(rows, ((0, width - len(rows)), (0, 0))) for rows in rows_jd])

"""Measures how far directions agree across layers, positions and sets of prompts, beside how far two halves of the prompts agree.

A direction is a difference of means, and so linear in the prompts. All cosines of resampled prompts therefore follow from inner
products of single prompts: no forward pass and no mean is computed again.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from refusal_jax.judges.statistics import DRAWS_SEED

DRAWS = 1000  # of the bootstrap, and of random halves
TINY = 1e-9  # of the largest norm: a shorter direction is rounding, such as that of a template token at layer 0


def _sums(weights_rn: np.ndarray, gram_nn: np.ndarray, others_rn: np.ndarray) -> np.ndarray:
    """Returns the inner products of R pairs of weighted sums of points, `[R]`."""
    return np.einsum("rn,rn->r", weights_rn @ gram_nn, others_rn)


def _interval(values_r: np.ndarray) -> dict:
    """Returns the mean of values and what 95 % of them lie between."""
    low, high = np.quantile(values_r, (0.025, 0.975))
    return {"mean": float(values_r.mean()), "low": float(low), "high": float(high)}


def drawn_weights(sizes: Sequence[int], draws: int, seed: int) -> list[Float[np.ndarray, "_ _"]]:
    """Returns for each group of prompts the weights of resampled means, `[draws, size]`, each row with the sum 1."""
    rng = np.random.default_rng(seed)
    return [rng.multinomial(size, np.full(size, 1 / size), size=draws) / size for size in sizes]


def half_weights(sizes: Sequence[int], draws: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns for each group of prompts, of at least two, the weights of the means of two random halves, each `[draws, size]`."""
    rng, found = np.random.default_rng(seed), []
    for size in sizes:
        order_rn = rng.random((draws, size)).argsort(axis=1)
        first_rn, second_rn = (order_rn < size // 2), (order_rn >= size - size // 2)
        found.append((first_rn / (size // 2), second_rn / (size // 2)))
    return found


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Tells how the direction at one place agrees with the selected one, and with itself.

    cosine: with the selected direction, `{"mean", "low", "high"}` of which the mean is that of all prompts, and the bounds are of
    the 95 % percentile bootstrap over prompts. halves: the cosine of the directions of two random halves of the prompts, its
    mean and what 95 % of the halves lie between. None for a direction that is zero.
    """

    cosine: dict | None
    halves: dict | None


def place_agreements(
    harmful_mnd: Float[np.ndarray, "m n D"], harmless_mnd: Float[np.ndarray, "k n D"], pick: int
) -> list[Agreement]:
    """Returns the agreement of the directions at n places with that at the place `pick`.

    harmful_mnd, harmless_mnd: residuals of m harmful and k harmless prompts, at least two of each, at n places.
    """
    m, k = len(harmful_mnd), len(harmless_mnd)
    weights_rn = np.concatenate([np.full((1, m), 1 / m), -np.full((1, k), 1 / k)], axis=1)
    drawn = drawn_weights((m, k), DRAWS, DRAWS_SEED)
    drawn_rn = np.concatenate([weights_rn, np.concatenate([drawn[0], -drawn[1]], axis=1)])
    (first_m, second_m), (first_k, second_k) = half_weights((m, k), DRAWS, DRAWS_SEED)
    halves = [np.concatenate([one, -other], axis=1) for one, other in ((first_m, first_k), (second_m, second_k))]
    points = [_centred(harmful_mnd[:, i], harmless_mnd[:, i]) for i in range(harmful_mnd.shape[1])]
    lengths = [float(np.sqrt(max(_sums(weights_rn, one @ one.T, weights_rn)[0], 0.0))) for one in points]
    own_r = _sums(drawn_rn, points[pick] @ points[pick].T, drawn_rn)
    found = []
    for one, length in zip(points, lengths, strict=True):
        if length <= TINY * max(lengths):
            found.append(Agreement(None, None))
            continue
        gram, across = one @ one.T, one @ points[pick].T
        cosine_r = _sums(drawn_rn, across, drawn_rn) / np.sqrt(_sums(drawn_rn, gram, drawn_rn) * own_r)
        sizes = [_sums(half, gram, half) for half in halves]
        halves_r = _sums(halves[0], gram, halves[1]) / np.sqrt(sizes[0] * sizes[1])
        found.append(Agreement(_interval(cosine_r[1:]) | {"mean": float(cosine_r[0])}, _interval(halves_r)))
    return found


def _centred(harmful_nd: np.ndarray, harmless_nd: np.ndarray) -> Float[np.ndarray, "n D"]:
    """Returns points relative to one of them, float64: so a difference of means that is zero stays zero."""
    points_nd = np.concatenate([harmful_nd, harmless_nd]).astype(np.float64)
    return points_nd - points_nd[0]


@dataclasses.dataclass(frozen=True)
class SetAgreement:
    """Tells how the directions of sets of prompts agree at one place.

    cosines: of each set's direction with that of the other harmful prompts, `{"mean", "low", "high", "n"}`. pairs_ss: of each two
    sets, 1 for the same.
    """

    cosines: dict[str, dict]
    pairs_ss: Float[np.ndarray, "_ _"]


def set_agreements(
    harmful_nd: Float[np.ndarray, "m D"],
    harmless_nd: Float[np.ndarray, "k D"],
    categories: Mapping[str, Sequence[int]],
    others: Mapping[str, Float[np.ndarray, "_ D"]],
) -> SetAgreement:
    """Returns how the directions of sets agree: of parts of the harmful prompts, whose numbers `categories` has by name, and of
    `others`, by name their residuals.

    A category is compared with all other harmful prompts, another set with all. The two directions of a comparison are taken
    from different halves of the harmless prompts, so that no prompt is part of both.
    """
    groups = [harmful_nd, harmless_nd, *others.values()]
    points_nd = np.concatenate(groups).astype(np.float64)
    points_nd = points_nd - points_nd[0]
    gram_nn = points_nd @ points_nd.T
    drawn = drawn_weights([len(group) for group in groups], DRAWS, DRAWS_SEED)
    plain = [np.full((1, len(group)), 1 / len(group)) for group in groups]
    weights_rn = np.concatenate([np.concatenate(plain, axis=1), np.concatenate(drawn, axis=1)])
    number_n, group_n = np.arange(len(points_nd)), np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    part_n = np.where(group_n == 1, number_n % 2, 0)  # halves of the harmless prompts

    def direction(chosen_n: np.ndarray, half: int) -> np.ndarray:
        """Returns the weights of the direction of chosen prompts relative to a half of the harmless ones, `[R, n]`."""
        parts = [weights_rn * chosen_n, weights_rn * ((group_n == 1) & (part_n == half))]
        above, below = (part / np.maximum(part.sum(axis=1, keepdims=True), 1e-12) for part in parts)
        return above - below

    def cosine(first_n: np.ndarray, second_n: np.ndarray) -> np.ndarray:
        one, other = direction(first_n, 0), direction(second_n, 1)
        sizes = _sums(one, gram_nn, one) * _sums(other, gram_nn, other)
        return _sums(one, gram_nn, other) / np.sqrt(np.maximum(sizes, 1e-30))

    chosen = {name: (group_n == 0) & np.isin(number_n, list(numbers)) for name, numbers in categories.items()}
    rest = {name: (group_n == 0) & ~chosen_n for name, chosen_n in chosen.items()}
    for number, name in enumerate(others, 2):
        chosen[name], rest[name] = group_n == number, group_n == 0
    cosines = {}
    for name, chosen_n in chosen.items():
        values_r = cosine(chosen_n, rest[name])
        cosines[name] = _interval(values_r[1:]) | {"mean": float(values_r[0]), "n": int(chosen_n.sum())}
    names, pairs_ss = list(chosen), np.eye(len(chosen))
    for i, first in enumerate(names):
        for j, second in enumerate(names[:i]):
            both = cosine(chosen[first], chosen[second])[0], cosine(chosen[second], chosen[first])[0]
            pairs_ss[i, j] = pairs_ss[j, i] = np.mean(both)
    return SetAgreement(cosines, pairs_ss)

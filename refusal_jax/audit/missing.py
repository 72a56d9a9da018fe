"""Finds directions that a model's layers hardly write, from its weights alone: what ablation leaves behind.

Of every window of layers, and of attention's and the MLP's output matrices together and apart, the smallest eigenvalues of the
sum of W W^T / |W|^2 are looked at. A removed direction shows in two ways, of which each gives a score, -log10 of a p-value.

Gaps: it leaves one eigenvalue, or a few, far below the rest. How far that would be by itself is told by the same window: where
eigenvalues l_1 <= l_2 <= … come down to a regular edge, the scaled spacings j log(l_{j+1} / l_j) are all of one scale (Rényi's
representation, from which Hill's estimator comes), or grow with j. So the spacing at j = r over the mean of those above it has
the tail of an F distribution with 2 and 2 k degrees of freedom, (1 + x / k)^-k. No threshold is carried from one model to
another.

Agreement: matrices that have nothing to do with each other, attention's and the MLP's, or those of every other layer, write the
same direction least. This shows partial edits, whose direction is still within the spectrum. By chance two of LIKELY equally
likely directions agree to a cosine c with p = (1 - c^2)^((LIKELY - 1) / 2).

A direction does not count if it lies on few of the stream's axes (training leaves single channels small, in real models), if the
readers hardly read it either (then it is dead, which training does, too), or if it is what LayerNorm takes away.

Cost: 2 D^2 F multiplications for a writer of F columns, and an eigenproblem or a factorisation of D x D for each window. Memory:
a dozen D x D arrays. Readers are read only if there is something to look for.
"""

import dataclasses
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from jaxtyping import Float
from scipy import linalg

from refusal_jax.checkpoints.matrices import Matrix, Weights, matrices, read_all
from refusal_jax.errors import UserError
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.families import pieces

SIZES = (1, 2, 4)  # layers of a window, besides all
SIDES, STRIDE = ("both", "o", "down"), 2  # the largest windows end at every second layer
LEAST_TURNS = 4  # layers, under which those that follow each other agree by themselves
FIRES = (
    3.5  # score from which a direction counts as missing; in real models, which nobody edited, at most 2.0 was found
)
LIKELY = 16  # directions among which one that is written least by itself is as if drawn
RANKS, SPACINGS = 8, 30  # directions that may be missing together, and spacings that tell the scale
FULL = 1.2  # columns of a window's matrices for each row, under which it has null directions by its shape
AXES, LEAST_AXES = 0.06, 10.0  # share and number of the axes; refusal directions of real models lie on a fifth
READ, CENTRED = 0.1, 0.5
ROUNDS = 6  # of inverse iteration
EXACT = 2048  # widths up to which sums are float64
DIRECT = 1024  # widths up to which eigenproblems are solved directly
ABSENT = 0.1  # energy, as a share of the mean, under which a matrix counts as not writing a direction


@dataclasses.dataclass(frozen=True)
class Window:
    """Holds what the smallest eigenvalues of some layers' writers show.

    kind: "gap" or "agreement". side: of SIDES. layers: first and last. score: -log10 of the p-value, of the spacing above `rank`
    directions or of the agreement in one. energies: the largest eigenvalue of these and the smallest of the rest, of which the
    mean of all is 1. direction_d: the one that is written least, of length 1.
    """

    kind: str
    side: str
    layers: tuple[int, int]
    score: float
    rank: int
    energies: tuple[float, float]
    direction_d: Float[np.ndarray, " D"]

    @property
    def axes(self) -> float:
        """Returns on how many of the stream's axes the direction lies (the participation ratio)."""
        return float(1 / np.sum(self.direction_d**4))


@dataclasses.dataclass(frozen=True)
class Missing:
    """Holds what was found.

    windows: those that were looked at, the highest score first. best: of those whose direction may count, the gap with the
    highest score, if that is high enough, else the window with the highest; None if there is none. read: the readers' energy
    along its direction, as a share of the mean, None if it was not looked at. absent: the writers that hardly write it, by layer.
    why_not: what speaks against a direction whose score is high, in words.
    """

    windows: tuple[Window, ...]
    best: Window | None
    read: float | None = None
    absent: Mapping[int, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    why_not: str = ""

    @property
    def score(self) -> float:
        """Returns the score of the best window; 0 where the readers read nothing either."""
        return 0.0 if self.best is None or self.why_not else self.best.score

    @property
    def found(self) -> bool:
        """Returns whether a direction is missing."""
        return self.score >= FIRES


def missing_directions(weights: Weights) -> Missing:
    """Looks for directions that layers hardly write. Raises UserError for weights that cannot be read, and for a model none of
    whose windows has more columns than rows."""
    cfg = weights.cfg
    windows = tuple(sorted(scan(weights), key=lambda one: -one.score))
    if not windows:
        raise UserError(
            f"The output matrices of the layers have too few columns for a stream of width {cfg.d_model}, so that each of them "
            "misses directions by its shape, and nothing can be told from the weights alone. Name the base."
        )
    counting = [one for one in windows if _may_count(one, cfg)]
    gaps = (one for one in counting if one.kind == "gap" and one.score >= FIRES)
    best = next(gaps, counting[0] if counting else None)
    if best is None or best.score < FIRES:
        why = f"it lies on {windows[0].axes:.1f} of the stream's axes" if windows[0].score >= FIRES else ""
        return Missing(windows, best, why_not=why if best is None else "")
    read, absent = _followed(weights, best.direction_d)
    dead = f"the readers hardly read it either ({read:.2g} of the mean)" if read < READ else ""
    return Missing(windows, best, read, absent, dead)


def _may_count(window: Window, cfg: ModelConfig) -> bool:
    """Returns whether neither single channels nor LayerNorm explain a window's direction."""
    mean = abs(window.direction_d.sum()) / np.sqrt(len(window.direction_d))
    least = max(LEAST_AXES, AXES * cfg.d_model)
    return window.axes >= least and not (cfg.centred_norms and mean > CENTRED)


def scan(weights: Weights) -> Iterator[Window]:
    """Yields the windows of a model that have enough columns. Writers are read once, layer by layer."""
    cfg, wanted = weights.cfg, [one for one in matrices(weights.cfg) if one.writes]
    last: deque[tuple[int, dict[str, Sum]]] = deque(maxlen=max(SIZES))
    turns: tuple[dict[str, Sum], dict[str, Sum]] = ({}, {})
    for layer, group in itertools.groupby(read_all(weights, wanted), key=lambda pair: int(pair[0].layer or 0)):
        last.append((layer, sums(group, cfg.d_model)))
        turns = (turns[1], added([turns[0], last[-1][1]]))
        for size in (size for size in SIZES if size <= len(last) and size < cfg.n_layers):
            if size == max(SIZES) and (layer + 1) % STRIDE:
                continue
            part = list(last)[-size:]
            first, second = (added([one for _, one in part[turn::2]]) for turn in (0, 1))
            yield from _windows((first, second), (part[0][0], layer))
    yield from _windows(turns, (0, cfg.n_layers - 1))


@dataclasses.dataclass(frozen=True)
class Sum:
    """A sum of W W^T / |W|^2 over matrices, how many there are, and how many columns they have."""

    gram_dd: np.ndarray
    count: int
    columns: int

    def __add__(self, other: "Sum") -> "Sum":
        return Sum(self.gram_dd + other.gram_dd, self.count + other.count, self.columns + other.columns)

    @property
    def mean_dd(self) -> np.ndarray:
        """Returns the mean, scaled so that its eigenvalues are 1 on average."""
        return self.gram_dd * self.gram_dd.dtype.type(len(self.gram_dd) / self.count)

    @property
    def wide(self) -> bool:
        """Returns whether there are enough columns that no direction is missing by the matrices' shape."""
        return self.columns >= FULL * len(self.gram_dd)


def sums(group: Iterable[tuple[Matrix, np.ndarray]], width: int) -> dict[str, Sum]:
    """Returns the sums of matrices' Grams, "o" and "down"; matrices of zeros are left out."""
    found: dict[str, Sum] = {}
    for matrix, values in group:
        w_df = values.astype(np.float64 if width <= EXACT else np.float32)
        energy = float(np.vdot(w_df, w_df))
        if energy:
            side = "o" if matrix.of_mixer else "down"
            found = added([found, {side: Sum(w_df @ w_df.T / energy, 1, w_df.shape[1])}])
    return found


def added(parts: Iterable[Mapping[str, Sum]]) -> dict[str, Sum]:
    """Returns the sums of sums, by side."""
    found: dict[str, Sum] = {}
    for part in parts:
        for side, one in part.items():
            found[side] = found[side] + one if side in found else one
    return found


Turns = tuple[Mapping[str, Sum], Mapping[str, Sum]]
Lowest = tuple[np.ndarray, np.ndarray]  # the smallest eigenvalues, rising, and their vectors [D, n]


def _windows(turns: Turns, layers: tuple[int, int]) -> Iterator[Window]:
    """Yields what some layers show, of which `turns` has the first, third, … and the second, fourth, …: gaps of both sides
    together and of each, and agreements between the sides, and of each side between the turns."""
    whole, lowest = added(turns), dict[str, Lowest]()
    if {"o", "down"} <= whole.keys():
        whole["both"] = whole["o"] + whole["down"]
    for side, one in whole.items():
        if one.wide:
            lowest[side] = smallest(one.mean_dd, min(RANKS + SPACINGS + 1, len(one.gram_dd)))
            yield gap(lowest[side], side, layers)
    if {"o", "down"} <= lowest.keys():
        yield agreement(lowest["o"], lowest["down"], "both", layers)
    for side in ("o", "down") if layers[1] - layers[0] + 1 >= LEAST_TURNS else ():
        if all(side in turn and turn[side].wide for turn in turns):
            first, second = (smallest(turn[side].mean_dd, 2) for turn in turns)
            yield agreement(first, second, side, layers)


def gap(found: Lowest, side: str, layers: tuple[int, int]) -> Window:
    """Returns what the spacings of the smallest eigenvalues tell."""
    values, vectors = found
    count = len(values)
    spacings = np.arange(1, count) * np.diff(np.log(np.maximum(values, floor_of(values))))
    ranks = range(1, min(RANKS, count // 2) + 1)
    scores = [score(spacings[rank - 1], spacings[rank : rank + SPACINGS]) for rank in ranks]
    rank = int(np.argmax(scores)) + 1
    energies = max(float(values[rank - 1]), 0.0), max(float(values[rank]), 0.0)
    return Window("gap", side, layers, scores[rank - 1], rank, energies, vectors[:, 0].astype(float))


def agreement(first: Lowest, second: Lowest, side: str, layers: tuple[int, int]) -> Window:
    """Returns how far two sums agree in the direction that is written least."""
    u_d, v_d = (one[1][:, 0].astype(float) for one in (first, second))
    cosine = float(u_d @ v_d)
    found = -(LIKELY - 1) / 2 * np.log10(max(1 - cosine**2, 1e-12))
    both_d = u_d + np.copysign(1, cosine) * v_d
    least, rest = (max(float(first[0][i]), float(second[0][i]), 0.0) for i in (0, 1))
    return Window("agreement", side, layers, float(found), 1, (least, rest), both_d / np.linalg.norm(both_d))


def floor_of(values: np.ndarray) -> float:
    """Returns the energy under which eigenvalues are rounding, by their dtype."""
    return 1e-12 if values.dtype == np.float64 else 1e-6


def score(spacing: float, above_k: np.ndarray) -> float:
    """Returns -log10 of the chance that a spacing is so much larger than those above it."""
    k, mean = len(above_k), max(float(above_k.mean()), 1e-9)
    return float(k * np.log1p(spacing / mean / k) / np.log(10))


def smallest(gram_dd: np.ndarray, count: int) -> Lowest:
    """Returns the smallest eigenvalues of a positive matrix, rising, and their vectors `[D, count]`.

    Above a width of DIRECT, by inverse iteration of a subspace, which takes one Cholesky factorisation; eigenvalues that lie
    close together are then found a little too large, which makes spacings above the first look wider and scores lower.
    """
    width = len(gram_dd)
    if width <= DIRECT:
        return linalg.eigh(gram_dd, subset_by_index=[0, count - 1])
    shift, factor = floor_of(gram_dd), None
    while factor is None:
        try:
            factor = linalg.cho_factor(gram_dd + shift * np.eye(width, dtype=gram_dd.dtype), lower=True)
        except linalg.LinAlgError:  # rounding made it indefinite
            shift *= 10
    basis = np.random.default_rng(0).standard_normal((width, min(count + 16, width))).astype(gram_dd.dtype)
    for _ in range(ROUNDS):
        basis = np.linalg.qr(linalg.cho_solve(factor, basis))[0]
    values, turned = linalg.eigh(basis.T @ gram_dd @ basis)
    return values[:count], (basis @ turned)[:, :count]


def _followed(weights: Weights, direction_d: np.ndarray) -> tuple[float, dict[int, tuple[str, ...]]]:
    """Returns the readers' mean energy along a direction, and the writers of each layer that hardly write it."""
    gains, read, absent = _gains(weights), [], {}
    for matrix, values in read_all(weights, matrices(weights.cfg)):
        layer = int(matrix.layer or 0)
        if matrix.writes:
            if energy_along(values, direction_d) < ABSENT:
                names = (*absent.get(layer, ()), "o" if matrix.of_mixer else "down")
                absent[layer] = tuple(dict.fromkeys(names))
        else:
            gain_d = gains.get((layer, matrix.of_mixer))
            read.append(energy_along(values if gain_d is None else values * gain_d[:, None], direction_d))
    return float(np.mean(read)) if read else 0.0, absent


def energy_along(values_df: np.ndarray, direction_d: np.ndarray) -> float:
    """Returns how much of a matrix's energy lies along a direction of the stream, as a share of the mean of all directions; 1 of
    a matrix of zeros."""
    total = float(np.vdot(values_df, values_df))
    along_f = direction_d @ values_df
    return float(np.vdot(along_f, along_f)) * len(values_df) / total if total else 1.0


def _gains(weights: Weights) -> dict[tuple[int, bool], np.ndarray]:
    """Returns the gains of the norms before attention (True) and before the MLP (False), by layer; those that both share count
    for both."""
    cfg, found = weights.cfg, {}
    for piece in pieces(cfg):
        if piece.path in ("blocks.attn_norm", "blocks.mlp_norm"):
            gain_d = piece.rows(weights.rows) + cfg.norm_offset
            found[int(piece.layer or 0), piece.path == "blocks.attn_norm"] = gain_d
    for layer, of_attention in list(found):
        found.setdefault((layer, not of_attention), found[layer, of_attention])
    return found

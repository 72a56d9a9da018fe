"""What a change of one matrix does along given directions, and which operator on the residual stream explains it.

Every matrix W is `[D, F]`, with the stream's axis first, and D = W' - W is its change. An edit that takes directions out of what
W writes (or reads) is an operator on the stream: W' = (1 - M) W, with M = w u u^T for one direction of strength w. So M is fitted
by least squares, D = - M W, in a small subspace: that of the refusal directions, of the largest singular vectors of D, and of one
step of power iteration - D W^T v from the best refusal direction v, which leads to the edit's own direction wherever that is not
one of ours. The eigenvalues of M are strengths; the share of each one's change that M explains is its `fit`.

All of it comes from small Gram matrices of what a few vectors read from W and from D: three products with D, two with W.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64

from refusal_jax.audit.frame import PROBES, Frame, unit_rows

EDGE = 1.1  # singular values count if they are so many times the largest that noise would have
COLUMNS, BLOCK = 2048, 64  # so many columns of a matrix tell its operator, in blocks of so many
AGREE = 0.05  # difference between an eigenvalue and least squares that noise makes
CLEAR, EXACT = (
    0.9,
    0.99,
)  # the fit of a direction that was removed and not only changed, and of one where nothing else was done
SEEN, BETTER = 0.3, 0.005  # an alignment that is worth a closer look, and a gain in fit that is
FAINT = 1e-5  # vectors that are so much shorter than others are rounding noise


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """One eigenvector of a fitted operator.

    direction_d: of length 1; what is written less. strength: its eigenvalue. removed: by least squares, the share of what the
    matrix has along it that was removed. fit: the cosine between the change along it and what the matrix has along it.
    left_fit: the same along the operator's left eigenvector, which differs for oblique projections. aligned: the largest cosine
    of either with a refusal direction. by_row: whether strength and fit are of the matrix with rows of length 1, of which some
    methods take the direction out.
    """

    direction_d: Float64[np.ndarray, " D"]
    strength: float
    removed: float
    fit: float
    left_fit: float
    aligned: float

    by_row: bool = False

    @property
    def dose(self) -> float:
        """Returns the share that was removed along the direction.

        Of a projection, eigenvalue and least squares agree but for noise. Of one that is oblique, only the eigenvalue is right.
        """
        if self.by_row:
            return self.removed
        oblique = abs(self.strength - self.removed) > AGREE
        return self.strength if oblique else (self.strength + self.removed) / 2


@dataclasses.dataclass(frozen=True, eq=False)
class OperatorFit:
    """What the change of one matrix is.

    relative: its norm, as a share of the matrix's. cosine: between the matrix before and after. changed: share of the
    columns that changed at all; where that is not all, the rest is about these. values: largest singular values of
    the change, as shares of its norm. above: how many of them are larger than noise makes them. removed_n, fit_n:
    along each refusal direction, the share that was removed, and the cosine of the change with that. kept_n: of each
    refusal direction, the norm of what the matrix reads or writes after, as a share of before. control_*: the same of
    the controls, made orthogonal to the edit's direction. refusal: the part of the operator that is most about
    refusal, None without refusal directions. blind: the best explained part of the operator on the singular vectors
    above noise, which no refusal direction took part in; None if there is none. explained: share of the change's
    energy in these singular vectors that the operator explains (R^2). first_d: the first one. removals: how many
    directions were removed from it. scale: by how much the whole matrix was made smaller beside that: what all
    controls lost alike.
    """

    relative: float
    cosine: float
    changed: float
    values: Float64[np.ndarray, " k"]
    above: int
    removed_n: Float64[np.ndarray, " n"]
    fit_n: Float64[np.ndarray, " n"]
    kept_n: Float64[np.ndarray, " n"]
    energy_n: Float64[np.ndarray, " n"]
    control_removed_c: Float64[np.ndarray, " c"]
    control_fit_c: Float64[np.ndarray, " c"]
    control_kept_c: Float64[np.ndarray, " c"]
    control_energy_c: Float64[np.ndarray, " c"]
    refusal: Part | None
    blind: Part | None
    explained: float
    first_d: Float32[np.ndarray, " D"]
    removals: int = 0
    scale: float = 0.0

    @property
    def energy(self) -> float:
        """Returns the share of the change's energy in its first singular vector."""
        return float(self.values[0] ** 2) if len(self.values) else 0.0

    @property
    def noise(self) -> float:
        """Returns the standard deviation of a dose that the change's noise alone makes, from the controls."""
        middle = np.median(self.control_removed_c)
        return (
            float(1.4826 * np.median(np.abs(self.control_removed_c - middle))) if len(self.control_removed_c) else 0.0
        )

    @property
    def still(self) -> "OperatorFit":
        """Returns a fit in which nothing was done in any direction."""
        nothing: dict[str, Any] = {"refusal": None, "blind": None, "values": np.zeros(0)}
        nothing |= {"above": 0, "explained": 0.0, "removals": 0, "first_d": np.zeros_like(self.first_d)}
        for ours, theirs in (
            ("removed_n", "control_removed_c"),
            ("fit_n", "control_fit_c"),
            ("energy_n", "control_energy_c"),
        ):
            nothing |= {name: np.zeros_like(getattr(self, name)) for name in (ours, theirs)}
        nothing |= {name: np.ones_like(getattr(self, name)) for name in ("kept_n", "control_kept_c")}
        return dataclasses.replace(self, **nothing)


def fit_operator(
    before_df: Float32[np.ndarray, "D F"], after_df: Float32[np.ndarray, "D F"], frame: Frame
) -> OperatorFit | None:
    """Returns what the change of a matrix is, None if there is none. Where the whole matrix was rescaled, the fit is to what was
    done beside that. Of a matrix with very many columns, some are looked at, in blocks that are spread over all."""
    before_df, after_df = _some_columns(before_df), _some_columns(after_df)
    found = _fit(before_df, after_df, frame)
    if found is None:
        return None
    if found.scale:
        changed: dict[str, Any] = {"relative": found.relative, "cosine": found.cosine, "scale": found.scale}
        before_df = np.float32(1 - found.scale) * before_df
        beside = _fit(before_df, after_df, frame)
        if beside is None or beside.relative < FAINT:
            return dataclasses.replace(found.still, **changed)
        found = dataclasses.replace(beside, **changed)
    part = found.refusal
    if part is None or part.fit > EXACT or abs(part.strength - part.removed) < 0.1 * AGREE or part.aligned < SEEN:
        return found
    return dataclasses.replace(found, refusal=_by_row(before_df, after_df, frame, part))


def _by_row(before_df: np.ndarray, after_df: np.ndarray, frame: Frame, part: Part) -> Part:
    """Returns the part of the operator on rows of length 1 that is about refusal, if it explains more than `part`."""
    lengths = np.maximum(np.linalg.norm(before_df, axis=1, keepdims=True), 1e-30)
    found = _fit(before_df / lengths, after_df / lengths, frame)
    if found is None or found.refusal is None or found.refusal.fit < part.fit + BETTER:
        return part
    u = found.refusal.direction_d.astype(np.float32)
    there, left = u @ before_df, u @ after_df
    removed = 1 - float(left @ there) / max(float(there @ there), 1e-30)
    return dataclasses.replace(found.refusal, removed=removed, by_row=True)


def _some_columns(matrix_df: np.ndarray) -> np.ndarray:
    """Returns COLUMNS of a matrix that has many more, in blocks of BLOCK, laid out as the matrix is; else the matrix."""
    stride = matrix_df.shape[1] // COLUMNS * BLOCK
    if stride <= BLOCK:
        return matrix_df
    whole = matrix_df.shape[1] // stride * stride
    if matrix_df.flags.c_contiguous:
        return matrix_df[:, :whole].reshape(len(matrix_df), -1, stride)[:, :, :BLOCK].reshape(len(matrix_df), -1)
    return matrix_df.T[:whole].reshape(-1, stride, len(matrix_df))[:, :BLOCK].reshape(-1, len(matrix_df)).T


def _fit(before_df: np.ndarray, after_df: np.ndarray, frame: Frame) -> OperatorFit | None:
    change_df = after_df - before_df
    norm, length = _norm(change_df), _norm(before_df)
    if norm == 0 or length == 0:
        return None
    dot = inner(change_df, before_df)
    cosine = (length**2 + dot) / (length * max(np.sqrt(max(length**2 + 2 * dot + norm**2, 0)), 1e-30))
    n_span, n_controls = len(frame.span_jd), len(frame.control_nd)
    known = np.concatenate([frame.span_jd, frame.control_nd, frame.probe_nd])
    gone, there = known @ change_df, known[: n_span + n_controls] @ before_df
    columns = np.abs(gone[n_span + n_controls :]).max(0) > 0
    share = float(columns.mean())
    if share < 0.98:
        before_df, change_df = before_df[:, columns], change_df[:, columns]
        gone, there = gone[:, columns], there[:, columns]
    probed = gone[n_span + n_controls :]
    grams = _Grams.of(frame, change_df, before_df, gone[:n_span], there[:n_span], probed)
    controls = gone[n_span : n_span + n_controls], there[n_span:]
    refusal, blind, explained, above, removals = grams.read(frame, norm, before_df.shape)
    if refusal is not None:
        controls = grams.without(frame.control_nd, refusal.direction_d, *controls)
    own = frame.coordinates_nj
    pairs = (own @ gone[:n_span], own @ there[:n_span]), controls
    ours, theirs = (_along(*pair, norm) for pair in pairs)
    scale = float(np.median(theirs.removed)) if n_controls and np.median(np.abs(theirs.fit)) > 0.9 else 0.0
    return OperatorFit(
        relative=norm / length,
        cosine=float(cosine),
        changed=share,
        values=grams.values / norm,
        above=above,
        removed_n=ours.removed,
        fit_n=ours.fit,
        kept_n=ours.kept,
        energy_n=ours.energy,
        control_removed_c=theirs.removed,
        control_fit_c=theirs.fit,
        control_kept_c=theirs.kept,
        control_energy_c=theirs.energy,
        refusal=refusal,
        blind=blind,
        explained=explained,
        first_d=grams.first_d.astype(np.float32),
        removals=removals,
        scale=scale,
    )


class _Along(NamedTuple):
    """Of each of some directions: what was removed of it by least squares, the cosine of that with the change, what is kept of
    its norm, and the share of the change's energy along it."""

    removed: np.ndarray
    fit: np.ndarray
    kept: np.ndarray
    energy: np.ndarray


class _Parts(NamedTuple):
    """Eigenvectors of a fitted operator as rows in the basis's coordinates, and of each what `Part` says."""

    right: np.ndarray
    strength: np.ndarray
    removed: np.ndarray
    fit: np.ndarray
    left_fit: np.ndarray
    aligned: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class _Grams:
    """What an orthonormal basis of a few vectors reads from a change (gone) and from the matrix before (there), `[k, F]`, with
    their Gram matrices."""

    basis_kd: np.ndarray
    gone: np.ndarray
    there: np.ndarray
    cross: np.ndarray
    before: np.ndarray
    change: np.ndarray

    @classmethod
    def of(cls, frame: Frame, change_df, before_df, gone_jf, there_jf, probed) -> "_Grams":
        """Returns those of the refusal directions' span, of the change's largest singular vectors, and of power steps."""
        right = [probed]
        if len(frame.span_jd):
            start = _best(_gram(gone_jf, there_jf), _gram(there_jf, there_jf), frame.coordinates_nj)
            right += [(start @ there_jf)[None], (start @ gone_jf)[None]]
        steps = _times(change_df, np.concatenate(right))
        span = frame.span_jd.astype(np.float64)
        longest = np.linalg.norm(steps)
        for _ in range(2):
            steps -= span.T @ (span @ steps)
        local, sizes, _ = np.linalg.svd(steps, full_matrices=False)
        local = np.ascontiguousarray(local[:, sizes > FAINT * longest].T, np.float32)
        gone = np.concatenate([gone_jf, local @ change_df]).astype(np.float64)
        there = np.concatenate([there_jf, local @ before_df]).astype(np.float64)
        basis = np.concatenate([span, local])
        return cls(basis, gone, there, gone @ there.T, there @ there.T, gone @ gone.T)

    def read(self, frame: Frame, norm: float, shape) -> tuple[Part | None, Part | None, float, int, int]:
        """Returns the part of the operator that is about refusal, that of the singular vectors, how well these are explained, how
        many of them are above noise, and how many directions were removed."""
        refusal = None
        if len(frame.span_jd):
            parts = self._parts(np.eye(len(self.basis_kd)), frame.coordinates_nj)
            refusal = self._part(parts, int(np.argmax(np.abs(parts.strength) * parts.aligned**2 * parts.fit**2)))
        above = int(np.sum(self.values > EDGE * self._edge(norm, shape)))
        if not above:
            return refusal, None, 0.0, 0, 0
        u = self.vectors[:, :above]
        cross, before, change = (u.T @ gram @ u for gram in (self.cross, self.before, self.change))
        explained = float(np.trace(cross @ _solve(before, cross.T)) / np.trace(change))
        parts = self._parts(u, frame.coordinates_nj)
        best = int(np.argmax(np.abs(parts.strength) * parts.fit**2))
        clear = (parts.fit > CLEAR) & (np.abs(parts.strength) > 0.2 * abs(parts.strength[best]))
        return refusal, self._part(parts, best), min(explained, 1.0), above, int(clear.sum())

    @functools.cached_property
    def _spectrum(self) -> tuple[np.ndarray, np.ndarray]:
        values, vectors = np.linalg.eigh(self.change)
        return np.sqrt(np.maximum(values[::-1], 0))[:PROBES], vectors[:, ::-1]

    @property
    def values(self) -> np.ndarray:
        """Returns the largest singular values of the change."""
        return self._spectrum[0]

    @property
    def vectors(self) -> np.ndarray:
        """Returns the singular vectors of the change in the basis's coordinates, as columns."""
        return self._spectrum[1]

    @property
    def first_d(self) -> np.ndarray:
        """Returns the first singular vector."""
        return self.vectors[:, 0] @ self.basis_kd

    def _edge(self, norm: float, shape) -> float:
        """Returns the largest singular value that noise would have (Marchenko and Pastur), its variance being that of what the
        largest singular vectors leave."""
        rest = max(norm**2 - float(np.sum(self.values**2)), 0.0)
        free = max((shape[0] - PROBES) * (shape[1] - PROBES), 1)
        return float(np.sqrt(rest / free) * (np.sqrt(shape[0]) + np.sqrt(shape[1]))) + FAINT * norm

    def _parts(self, u: np.ndarray, coordinates_nj: np.ndarray) -> "_Parts":
        """Returns the eigenvectors of the operator on the span of the columns of u, in the basis's coordinates."""
        cross, before, change = (u.T @ gram @ u for gram in (self.cross, self.before, self.change))
        strength, right = _eigen(cross, before)
        right = unit_rows(right)
        left = unit_rows(_solve(before, cross.T @ right.T).T)  # of the operator's rows, what those stand for
        (removed, fit), (_, left_fit) = (_ratios(rows, cross, before, change) for rows in (right, left))
        aligned, n = np.zeros(len(right)), coordinates_nj.shape[1]
        if len(coordinates_nj):
            aligned = np.max([np.abs((rows @ u.T)[:, :n] @ coordinates_nj.T).max(1) for rows in (right, left)], axis=0)
        return _Parts(right @ u.T, strength, removed, fit, left_fit, aligned)

    def _part(self, parts: "_Parts", number: int) -> Part:
        """Returns one of the eigenvectors."""
        direction, strength, removed, fit, left_fit, aligned = (values[number] for values in parts)
        return Part(
            direction @ self.basis_kd, float(strength), float(removed), float(fit), float(left_fit), float(aligned)
        )

    def without(self, directions_nd, taken_d, gone, there) -> tuple[np.ndarray, np.ndarray]:
        """Returns what directions read from the change and from the matrix once the part along `taken_d` is taken out of them."""
        share = directions_nd @ taken_d
        own = self.basis_kd @ taken_d
        return gone - np.outer(share, own @ self.gone), there - np.outer(share, own @ self.there)


def _best(cross: np.ndarray, before: np.ndarray, coordinates_nj: np.ndarray) -> np.ndarray:
    """Returns the unit vector, in the span of the refusal directions, along which an operator does most."""
    values, vectors = _eigen(cross, before)
    vectors = unit_rows(vectors)
    aligned = np.abs(vectors @ coordinates_nj.T).max(1)
    return vectors[int(np.argmax(np.abs(values) * aligned**2))]


def _eigen(cross: np.ndarray, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the real parts of the operator's eigenvalues, and of its eigenvectors as rows."""
    values, vectors = np.linalg.eig(-_solve(before, cross.T).T)
    return np.real(values), np.real(vectors).T


def _along(gone: np.ndarray, there: np.ndarray, norm: float) -> _Along:
    """Returns what a change, of this norm, is along directions that read `gone` from it and `there` from the matrix."""
    has, lost, energy = (
        np.einsum("nf,nf->n", a, b).astype(np.float64) for a, b in ((there, there), (gone, there), (gone, gone))
    )
    has = np.maximum(has, 1e-300)
    kept = np.sqrt(np.maximum(has + 2 * lost + energy, 0) / has)
    return _Along(-lost / has, -lost / np.sqrt(np.maximum(has * energy, 1e-300)), kept, energy / norm**2)


def _times(change_df: np.ndarray, right_kf: np.ndarray) -> np.ndarray:
    """Returns the products `[D, k]` of a change with rows, which are made unit first, float64."""
    rows = right_kf / np.maximum(np.linalg.norm(right_kf, axis=1, keepdims=True), 1e-30)
    return (change_df @ rows.astype(np.float32).T).astype(np.float64)


def _ratios(rows, cross: np.ndarray, before: np.ndarray, change: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each row the share that was removed along it by least squares, and the size of the cosine of that with the
    change."""
    has, lost, energy = (np.sum(rows @ gram * rows, axis=1) for gram in (before, -cross, change))
    return lost / np.maximum(has, 1e-300), np.abs(lost) / np.sqrt(np.maximum(has * energy, 1e-300))


def _gram(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a.astype(np.float64) @ b.astype(np.float64).T


def _solve(gram: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Returns gram^-1 right for a Gram matrix, which may be near to singular."""
    ridge = 1e-9 * np.trace(gram) / max(len(gram), 1) + 1e-300
    return np.linalg.solve(gram + ridge * np.eye(len(gram)), right)


def _norm(matrix: np.ndarray) -> float:
    return float(np.sqrt(inner(matrix, matrix)))


def inner(a: Float32[np.ndarray, "D F"], b: Float32[np.ndarray, "D F"]) -> float:
    """Returns the inner product of two matrices that are laid out alike, without a copy: row by row in float32."""
    a, b = (a, b) if a.flags.c_contiguous else (a.T, b.T)
    return float(np.einsum("ij,ij->i", a, b).astype(np.float64).sum())

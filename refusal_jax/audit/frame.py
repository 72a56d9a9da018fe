"""The vectors that the change of every matrix is measured along."""

import dataclasses

import numpy as np
from jaxtyping import Float, Float32, Float64

PROBES = 10  # random vectors of the range finder: about so many singular vectors of a change are seen
FAINT_SPAN = 0.02  # parts of the refusal directions' span that are so much smaller than the largest are left out


@dataclasses.dataclass(frozen=True, eq=False)
class Frame:
    """The vectors that every change is measured along.

    refusal_nd: unit directions `[n, D]`, none where no model could be run. span_jd: an orthonormal basis of them.
    control_nd: unit directions that have nothing to do with content, orthogonal to them. probe_nd: random vectors.
    All float32.
    """

    refusal_nd: Float32[np.ndarray, "n D"]
    span_jd: Float32[np.ndarray, "J D"]
    control_nd: Float32[np.ndarray, "c D"]
    probe_nd: Float32[np.ndarray, "k D"]

    @classmethod
    def of(cls, refusal_nd: Float[np.ndarray, "n D"], control_nd: Float[np.ndarray, "c D"], seed: int = 0) -> "Frame":
        """Returns the frame of refusal directions and controls, from which the part in the span of the first is taken out."""
        width = refusal_nd.shape[1]
        _, sizes, rows = np.linalg.svd(unit_rows(np.asarray(refusal_nd, np.float64)), full_matrices=False)
        span = rows[sizes > FAINT_SPAN * sizes[:1].sum()]
        controls = np.asarray(control_nd, np.float64)
        controls = unit_rows(controls - controls @ span.T @ span)
        probes = np.random.default_rng(seed).standard_normal((min(PROBES, width), width))
        parts = (unit_rows(np.asarray(refusal_nd, np.float64)), span, controls, probes)
        return cls(*(np.ascontiguousarray(part, np.float32) for part in parts))

    @property
    def coordinates_nj(self) -> Float64[np.ndarray, "n J"]:
        """Returns the refusal directions in the basis of their span, unit."""
        return unit_rows((self.refusal_nd @ self.span_jd.T).astype(np.float64))


def unit_rows(rows: Float[np.ndarray, "*n D"]) -> Float[np.ndarray, "*n D"]:
    """Returns rows of length 1; a row of zeros stays."""
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)

"""Partial ablations of a direction, as data: how much of it is removed, at which layers and at which sites.

A `Kernel` is a strength over the layers: it falls from its greatest value at one layer to its least at a distance from there, and
is 0 beyond. With the least equal to the greatest it is a band of layers; with a least of 0 it is a tent. A `Partial` has a kernel
for each site that it edits, and becomes the gates of one row of `Edits`, so that any number of them run through one compiled
program and no weights are rewritten.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from refusal_jax.edits import SITES, Edits

WRITTEN = ("attn_out", "mlp_out")  # what a block's weights write: with them, weights really edited do the same
ROUNDED = 6  # digits of a description's numbers


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A strength of ablation over layers.

    most: the greatest strength, 1 for the whole direction. position: the layer where it is reached, which need not be whole.
    least: the strength at `distance` layers from there, between which it is linear; beyond, nothing is ablated.
    """

    most: float
    position: float
    least: float
    distance: float

    @classmethod
    def band(cls, strength: float, first: float, last: float) -> "Kernel":
        """Returns the same strength in all layers from the first to the last."""
        return cls(strength, (first + last) / 2, strength, (last - first) / 2)

    def strengths(self, n_layers: int) -> Float[np.ndarray, " L"]:
        """Returns the strength in each of a model's layers, float64."""
        away_l = np.abs(np.arange(n_layers) - self.position)
        part_l = away_l / self.distance if self.distance > 0 else np.zeros(n_layers)
        strength_l = self.most + (self.least - self.most) * part_l
        return np.where(away_l <= self.distance + 1e-9, strength_l, 0.0)


@dataclasses.dataclass(frozen=True)
class Partial:
    """A partial ablation: for each site that is edited, a kernel. kernels: by name of `edits.SITES`; without any, nothing is
    edited."""

    kernels: Mapping[str, Kernel]

    def strengths(self, n_layers: int) -> Float[np.ndarray, "L S"]:
        """Returns the strength at each layer and site of `SITES`, float64."""
        gate_ls = np.zeros((n_layers, len(SITES)))
        for site, kernel in self.kernels.items():
            gate_ls[:, SITES.index(site)] = kernel.strengths(n_layers)
        return gate_ls

    def edits(self, direction: np.ndarray, n_layers: int) -> Edits:
        """Returns one row that removes these parts of a direction, `[D]` of any norm, or of the span of several, `[J, D]`."""
        whole = Edits.ablate(np.atleast_2d(direction)[None])
        return dataclasses.replace(whole, gate_rls=self.strengths(n_layers)[None].astype(np.float32))

    @property
    def row(self) -> dict:
        """Returns the description for a file: the kernel of each site."""
        return {
            site: {name: round(value, ROUNDED) for name, value in dataclasses.asdict(kernel).items()}
            for site, kernel in self.kernels.items()
        }

    @classmethod
    def of(cls, row: Mapping[str, Mapping[str, float]]) -> "Partial":
        """Returns the partial ablation that a description (`row`) tells."""
        return cls({site: Kernel(**kernel) for site, kernel in row.items()})


NOTHING = Partial({})


def edits_of(partials: Sequence[Partial], direction: np.ndarray, n_layers: int) -> Edits:
    """Returns the rows of M partial ablations of a direction, `[D]` or several `[J, D]`, in order."""
    return Edits.concat([partial.edits(direction, n_layers) for partial in partials])


def spread(n_layers: int, first: float, last: float) -> tuple[int, int]:
    """Returns the first and the last layer that lie within two shares of the depth, at least one layer. Layer l lies at the share
    (l + 1/2) / L, so that bands which meet share no layer."""
    inside = [layer for layer in range(n_layers) if first <= (layer + 0.5) / n_layers < last]
    nearest = min(max(math.floor(first * n_layers), 0), n_layers - 1)
    return (inside[0], inside[-1]) if inside else (nearest, nearest)

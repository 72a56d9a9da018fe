"""The edit that an export is asked for: what is done with the directions, where, and how much of it."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from refusal_jax.directions import Direction
from refusal_jax.edits import SITES
from refusal_jax.errors import UserError, setting
from refusal_jax.models.config import ModelConfig

# What weights can be edited at, and the site of `Edits` that this comes to: the embedding's output is the input of block 0.
WEIGHT_SITES = {"embed": "resid_pre", "attn_out": "attn_out", "mlp_out": "mlp_out"}


@dataclasses.dataclass(frozen=True, eq=False)
class Edit:
    """kind: "ablate", which takes a part `scale` of the directions' span out of what is written at `sites` (of SITES) in
    `layers`, the embedding belonging to layer 0; or "add", which adds `scale` times the direction, of its raw norm, at the
    input of `layers`. everywhere: whether this is the paper's whole ablation."""

    kind: str
    directions: Direction
    layers: tuple[int, ...]
    sites: tuple[str, ...]
    scale: float
    everywhere: bool

    @classmethod
    def of(
        cls,
        cfg: ModelConfig,
        directions: Direction,
        kind: str = "ablate",
        layers: Sequence[int] | None = None,
        sites: Sequence[str] = tuple(WEIGHT_SITES),
        scale: float = 1.0,
    ) -> "Edit":
        """For a model. layers: None is all of them, or for an addition the layer that the direction comes from.

        Raises UserError for directions of another width, layers out of range, unknown sites, a scale of zero, an
        addition of several directions, and one whose layer nothing tells.
        """
        directions.check_width(cfg.d_model)
        if not np.isfinite(scale) or scale == 0:
            raise UserError(f"{setting('scale', scale)} leaves nothing to do: give a number that is not zero.")
        unknown = [site for site in sites if site not in WEIGHT_SITES]
        if unknown or not sites:
            raise UserError(
                f"{setting('sites', ','.join(sites) or 'nothing')}: what weights write is {', '.join(WEIGHT_SITES)}. A block's "
                "input is what all writers before it wrote, so edit those."
            )
        if kind == "add":
            if len(directions.raw_jd) > 1:
                raise UserError(
                    f"An addition takes one direction, these are {len(directions.raw_jd)}. Name one of them."
                )
            if layers is None and directions.layer is None:
                raise UserError(
                    f"The direction does not tell at which layer to add it. Say so, such as with {setting('layers', 12)}."
                )
            layers = (directions.layer,) if layers is None else layers
        layers = tuple(sorted(set(range(cfg.n_layers) if layers is None else layers)))
        outside = [layer for layer in layers if not 0 <= layer < cfg.n_layers]
        if outside or not layers:
            raise UserError(
                f"The edit is at {f'layer {outside[0]}' if outside else 'no layer'}, and the model's layers are 0 to "
                f"{cfg.n_layers - 1}. Choose {setting('layers')} among these."
            )
        whole = kind == "ablate" and len(layers) == cfg.n_layers and set(sites) == set(WEIGHT_SITES) and scale == 1
        return cls(kind, directions, layers, tuple(WEIGHT_SITES[site] for site in sites), float(scale), whole)

    @property
    def vector_d(self) -> np.ndarray:
        """What an addition adds; float64 `[D]`."""
        return self.scale * self.directions.raw_jd[0]

    def reaches(self, layer: int, site: str) -> bool:
        """Whether an ablation edits what is written at a site of a layer; of the inputs, only that of block 0 is written
        by weights of its own."""
        return layer in self.layers and site in self.sites and (layer == 0 or site != "resid_pre")

    def without_embedding(self) -> "Edit":
        """The same at the other sites."""
        return dataclasses.replace(self, sites=tuple(s for s in self.sites if s != "resid_pre"), everywhere=False)

    def gates(self, layer: int) -> np.ndarray:
        """What inference-time ablation takes away at each of SITES in a layer, float32: as a part of what is there."""
        if self.kind == "add":
            return np.zeros(len(SITES), np.float32)
        reached = [self.everywhere or self.reaches(layer, site) for site in SITES]
        return np.float32(self.scale) * np.array(reached, np.float32)

    def added_d(self, layer: int) -> np.ndarray:
        """What inference-time addition adds at the input of a layer; float32 `[D]`."""
        adds = self.kind == "add" and layer in self.layers
        return self.vector_d.astype(np.float32) * np.float32(adds)

    def described(self) -> dict:
        """For reports: plain values."""
        names = {site: name for name, site in WEIGHT_SITES.items()}
        where = {} if self.kind == "add" else {"sites": [names[site] for site in self.sites]}
        return {"kind": self.kind, "scale": self.scale, "layers": list(self.layers), **where}

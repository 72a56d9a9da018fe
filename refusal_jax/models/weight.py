"""One parameter of the decoder: its shape, logical axes and initial size."""

import dataclasses

import numpy as np

from refusal_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Weight:
    """Shape, logical axes and initial standard deviation (None: a norm's neutral value; 0: zeros) of one parameter.

    heads: what an axis "heads" or "kv_heads" counts, slowest first: key/value heads and the queries of each, whose entries
    stay together. exact: whether it is float32 whatever the dtype of the others. layers: those that have it, if it is of blocks;
    its axis "layers" counts them. as_is: whether it multiplies as it is, also where norms multiply with their weights plus
    `norm_offset`.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    std: float | None
    heads: tuple[int, int] = (1, 1)
    exact: bool = False
    layers: tuple[int, ...] = ()
    as_is: bool = False

    @property
    def per_expert(self) -> bool:
        """Returns whether each expert has one of its own."""
        return "experts" in self.axes

    def stored_as(self, dtype):
        """Returns the dtype that it has in a decoder of `dtype`."""
        return np.dtype("float32") if self.exact else dtype


def factor_names(name: str) -> tuple[str, str]:
    """Returns the names of the low-rank factors that may stand beside a matrix: `[L, out, rank]` and `[L, rank, in]`, whose
    product is added to it."""
    return f"{name}_left", f"{name}_right"


def growth(cfg: ModelConfig) -> float:
    """Returns the initial scale of what writes to the residual stream, so that all blocks together keep its size."""
    return (2 * cfg.n_layers) ** -0.5

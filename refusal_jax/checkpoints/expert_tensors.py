"""Takes tensors that hold all experts of a layer for those of each expert, where a family's table has the latter.

The published Qwen 3.5 stores its experts so, and so do tools that save a model as it is in memory; transformers takes either.
"""

import dataclasses
import pathlib
import re

import numpy as np
from jaxtyping import Shaped

from refusal_jax.checkpoints.tensors import Tensor
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.families import TABLES, is_spare

TOGETHER = re.compile(r"^(.*\.mlp\.experts)\.(gate_up_proj|down_proj)$")
PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}  # rows one after the other
APART = "mlp.experts.{e}.gate_proj.weight"


@dataclasses.dataclass(frozen=True)
class OfExpert:
    """Rows of one expert of a tensor `[E, rows, columns]` of all experts."""

    whole: Tensor
    expert: int
    held: range

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.held), self.whole.shape[2]

    @property
    def dtype(self) -> str:
        return self.whole.dtype

    @property
    def nbytes(self) -> int:
        return self.whole.nbytes * len(self.held) // (self.whole.shape[0] * self.whole.shape[1])

    @property
    def path(self) -> pathlib.Path:
        return self.whole.path

    def read_into(self, index: tuple[slice, ...], out: Shaped[np.ndarray, "..."]) -> int:
        """Reads as `Tensor.read_into` does."""
        rows = self.held[index[0]] if index else self.held
        expert = slice(self.expert, self.expert + 1)
        return self.whole.read_into((expert, slice(rows.start, rows.stop), *index[1:]), out[None])


def of_each_expert(cfg: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a checkpoint's tensors by name, with those that hold all experts of a layer taken apart, if the family's table
    wants that and their shape allows it."""
    if not cfg.n_experts or not TABLES[cfg.family].get("blocks.gate", "").endswith(APART):
        return tensors
    found = {}
    for name, tensor in tensors.items():
        match = None if is_spare(cfg, name) else TOGETHER.match(name)  # what is not run is copied as it is
        parts = PARTS[match[2]] if match else ()
        if match is None or len(tensor.shape) != 3 or tensor.shape[0] != cfg.n_experts or tensor.shape[1] % len(parts):
            found[name] = tensor
            continue
        rows = tensor.shape[1] // len(parts)
        for at, part in enumerate(parts):
            held = range(at * rows, (at + 1) * rows)
            experts = {f"{match[1]}.{e}.{part}.weight": OfExpert(tensor, e, held) for e in range(cfg.n_experts)}
            found |= experts
    return found

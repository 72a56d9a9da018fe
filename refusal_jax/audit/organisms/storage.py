"""Steps of recipes that only change how weights are stored: formats of fewer bits, by a round trip through them."""

import dataclasses
from typing import ClassVar

import ml_dtypes
import numpy as np

from refusal_jax.audit.organisms.step import Made, Step
from refusal_jax.errors import UserError
from refusal_jax.models.families import pieces
from refusal_jax.models.weights import weight_table

GROUP = 32  # weights that share a scale
FORMATS = ("bf16", "fp16", "int8", "int4", "q8_0", "q4_0")


@dataclasses.dataclass(frozen=True)
class Store(Step):
    """Rounds weights as a format does. bf16 and fp16: all of them. int8, int4: matrices of the layers, GROUP weights a scale, the
    largest of which is exact; q8_0, q4_0: those and the embeddings, as GGUF files have them."""

    name: ClassVar[str] = "store"
    form: str = "bf16"

    def __call__(self, made: Made, rng: np.random.Generator) -> None:
        if self.form not in FORMATS:
            raise UserError(f"A recipe stores as {self.form!r}: the formats are {', '.join(FORMATS)}.")
        table = weight_table(made.cfg)
        ends = ("embed", "unembed") if self.form.startswith("q") else ()
        names = {
            one.name
            for one in pieces(made.cfg)
            if one.path in ends or (one.path.startswith("blocks.") and "embed" in table[one.path].axes)
        }
        for name, tensor in made.tensors.items():
            if self.form in ("bf16", "fp16"):
                made.tensors[name] = tensor.astype(ml_dtypes.bfloat16 if self.form == "bf16" else np.float16).astype(
                    np.float32
                )
            elif name in names and tensor.shape[-1] % GROUP == 0:
                made.tensors[name] = rounded(tensor, self.form)


def rounded(tensor: np.ndarray, form: str) -> np.ndarray:
    """Returns the values that a format of fewer bits gives back, float32."""
    if form.startswith("q"):
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize, quantize

        kind = GGMLQuantizationType[form.upper()]
        return dequantize(quantize(np.ascontiguousarray(tensor, np.float32), kind), kind).astype(np.float32)
    groups = tensor.reshape(-1, GROUP)
    most = 2 ** (int(form[3:]) - 1) - 1
    scale = np.abs(groups).max(axis=1, keepdims=True) / most
    scale[scale == 0] = 1
    return (np.round(groups / scale) * scale).reshape(tensor.shape).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Noise(Step):
    """Adds normal noise to the matrices of the layers, of so much of their norm."""

    name: ClassVar[str] = "noise"
    relative: float = 0.01

    def __call__(self, made: Made, rng: np.random.Generator) -> None:
        def noisy(_, before: np.ndarray) -> np.ndarray:
            size = self.relative * np.linalg.norm(before) / np.sqrt(before.size)
            return before + size * rng.standard_normal(before.shape)

        made.change(made.linear, noisy)


@dataclasses.dataclass(frozen=True)
class Prune(Step):
    """Sets the share of the smallest weights of each matrix of the layers to zero."""

    name: ClassVar[str] = "prune"
    share: float = 0.1

    def __call__(self, made: Made, rng: np.random.Generator) -> None:
        def pruned(_, before: np.ndarray) -> np.ndarray:
            return np.where(np.abs(before) < np.quantile(np.abs(before), self.share), 0, before)

        made.change(made.linear, pruned)

"""A step of a recipe: one thing that is done to a checkpoint, as data that a line of text holds.

A step is a frozen dataclass of words and numbers, such as `project strength=0.5 place=o`; what is left out has its default. To
add one, write a class that derives from `Step`: it is then known by its name.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import numpy as np

from refusal_jax.checkpoints.matrices import Matrix, matrices
from refusal_jax.errors import UserError, did_you_mean
from refusal_jax.models.config import ModelConfig

# What can have been done to a checkpoint; what comes later here outweighs what comes earlier.
KINDS = ("benign", "other", "projection", "trained", "added", "removed")


@dataclasses.dataclass(frozen=True)
class Removed:
    """Holds what was removed from one matrix: the share of what the edit's own direction has in it (dose), and of what the base's
    selected refusal direction has in it (along). Both are negative where more was added, and 2 where the sign was turned."""

    dose: float
    along: float

    def times(self, share: float) -> "Removed":
        """Returns what is left of it in a mixture with a checkpoint from which nothing was removed."""
        return Removed(self.dose * share, self.along * share)


@dataclasses.dataclass
class Made:
    """A checkpoint that is being made: its config, its tensors by HF name, which steps replace and never write into, and what was
    removed from its matrices, by the names of these.

    base: a `Base`. template: a chat template in place of the base's, "" for the base's. moved: whether the axes of the stream are
    no longer the base's.
    """

    base: Any
    cfg: ModelConfig
    tensors: dict[str, np.ndarray]
    removed: dict[str, Removed] = dataclasses.field(default_factory=dict)
    template: str = ""
    moved: bool = False

    def change(self, wanted: Iterable[Matrix], new: Callable[[Matrix, np.ndarray], np.ndarray]) -> None:
        """Replaces matrices by what `new` returns for each of them, which it is given with the stream's axis first, `[D, F]`."""
        copied: set[str] = set()
        for matrix in wanted:
            piece = matrix.piece
            if piece.name not in copied:
                self.tensors[piece.name] = np.array(self.tensors[piece.name], np.float32)
                copied.add(piece.name)
            whole = self.tensors[piece.name]
            expert = tuple(slice(i, i + 1) for i in piece.within)
            place = piece.of(whole[expert], piece.start, piece.stop)
            place = place if matrix.writes and matrix.path != "embed" else place.T
            place[...] = new(matrix, place)

    @property
    def linear(self) -> list[Matrix]:
        """Returns the matrices of the layers."""
        return matrices(self.cfg)

    def merge(self, share: float) -> None:
        """Notes that only a share of what was done is left."""
        self.removed = {name: one.times(share) for name, one in self.removed.items()}


STEPS: dict[str, type["Step"]] = {}


@dataclasses.dataclass(frozen=True)
class Step:
    """One thing that is done to a checkpoint; its fields are words and numbers with defaults."""

    name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        STEPS[cls.name] = cls

    @property
    def kind(self) -> str:
        """Returns what it does to refusal: of KINDS."""
        return "benign"

    @property
    def needs(self) -> tuple[str, ...]:
        """Returns the fine-tunes of the base that it uses."""
        return ()

    def __call__(self, made: Made, rng: np.random.Generator) -> None:
        """Changes a checkpoint that is being made."""
        raise NotImplementedError

    def __str__(self) -> str:
        values = (
            (field.name, getattr(self, field.name))
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        )
        return " ".join([self.name, *(f"{name}={value}" for name, value in values)])


def parse_step(text: str) -> Step:
    """Returns the step that a text such as "project strength=0.5" names. Raises UserError for steps, fields and values that there
    are not."""
    name, *pairs = text.split()
    if name not in STEPS:
        raise UserError(
            f"There is no step {name!r} of a recipe: the steps are {', '.join(sorted(STEPS))}."
            f"{did_you_mean(name, STEPS)}"
        )
    step = STEPS[name]
    fields = {field.name: type(field.default) for field in dataclasses.fields(step)}
    values = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key not in fields or not value:
            raise UserError(
                f"The step {name!r} of a recipe has no {pair!r}: it has {', '.join(fields) or 'no fields'}, each "
                "written as FIELD=VALUE."
            )
        try:
            values[key] = fields[key](value)
        except ValueError:
            raise UserError(f"The step {name!r} of a recipe has {pair!r}, where a number was expected.") from None
    return step(**values)

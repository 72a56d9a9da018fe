"""Recipes of organisms: steps in order, as a line of text, and what they come to."""

import dataclasses

from refusal_jax.audit.organisms import edits, functional, mixing, storage  # noqa: F401  (each declares its steps)
from refusal_jax.audit.organisms.step import KINDS, Step, parse_step
from refusal_jax.errors import UserError

ARROW = " > "


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is done to a base, in order. family: the group of like recipes that it belongs to, which leave-one-out leaves out."""

    family: str
    steps: tuple[Step, ...]

    @classmethod
    def parse(cls, line: str) -> "Recipe":
        """Reads the recipe of a line such as "stored: project strength=0.5 > store form=int4".

        Raises UserError for a line without a family, and as `parse_step` does.
        """
        family, colon, steps = line.partition(":")
        if not colon or not family.strip():
            raise UserError(f"The recipe {line!r} has no family: write FAMILY: STEP > STEP.")
        return cls(family.strip(), tuple(parse_step(step) for step in steps.split(ARROW) if step.strip()))

    def __str__(self) -> str:
        return f"{self.family}: {self.text}"

    @property
    def text(self) -> str:
        """Returns the steps in text, "" where nothing is done."""
        return ARROW.join(map(str, self.steps))

    @property
    def kind(self) -> str:
        """Returns what the steps do to refusal together: of KINDS."""
        return max((step.kind for step in self.steps), key=KINDS.index, default="benign")

    @property
    def needs(self) -> frozenset[str]:
        """Returns the fine-tunes of the base that it uses."""
        return frozenset(need for step in self.steps for need in step.needs)

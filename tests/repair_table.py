"""Measures what repairs restore on organisms of the embedded model, as a table for the docs.

Run as `python tests/repair_table.py`. For each organism it prints the estimated error, the distance of the edited tensors to the
base's before and after the repair, and how many of 32 harmful prompts are refused before and after.
"""

import dataclasses

import numpy as np

from refusal_jax.audit.organisms.base import Base
from refusal_jax.audit.organisms.organism import Organism
from refusal_jax.audit.organisms.recipe import Recipe
from refusal_jax.audit.repair import Repair
from refusal_jax.audit.weights import ArrayWeights
from refusal_jax.chat.model import ChatModel, demo_model_path
from refusal_jax.data.prompts import BUNDLED, read_prompts
from refusal_jax.data.sources import resolve
from refusal_jax.judges.text import substring_matching

PROMPTS = [row["instruction"] for row in read_prompts(resolve(BUNDLED, "harmful_test"))[:32]]
STORED = ("bf16", "int8", "int4")
RECIPES = [
    *(f"project strength={w} > store form={form}" for w in (0.1, 0.3, 0.5, 0.7, 0.85, 0.95) for form in STORED),
    "project strength=1.0",
    "project strength=2.0",
    "project direction=mix:0.7 layers=tent strength=1.15",
    "project direction=mix:0.7 layers=tent form=rownorm strength=0.8 > store form=int8",
    "project form=rownorm strength=0.85",
]


@dataclasses.dataclass(frozen=True, eq=False)
class Repaired(Organism):
    """An organism after a repair, whose tensors are given."""

    restored: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def tensors(self):
        return self.restored


def refused(model: ChatModel) -> float:
    return sum(not substring_matching(reply) for reply in model.generate(PROMPTS, 48)) / len(PROMPTS)


def distance(base, tensors, names) -> float:
    gap = sum(float(np.sum((tensors[name] - base[name]) ** 2)) for name in names)
    return (gap / sum(float(np.sum(base[name] ** 2)) for name in names)) ** 0.5


def main() -> None:
    base = Base.open(demo_model_path(), "embedded")
    weights = ArrayWeights(base.cfg, base.tensors)
    for text in RECIPES:
        organism = Organism(base, Recipe.parse(f"tried: {text}"))
        plan = Repair.of(weights, organism.weights)
        tensors = dict(organism.tensors)
        for one in plan.restored:
            tensors[one.tensor] = one.undo(tensors[one.tensor])
        names = [one.tensor for one in plan.removed]
        after = Repaired(base, organism.recipe, restored=tensors)
        print(
            f"{text}: error {plan.error:.3f}, {len(plan.lost)} of {len(names)} tensors lost, distance "
            f"{distance(base.tensors, organism.tensors, names):.3f} and {distance(base.tensors, tensors, names):.3f}, "
            f"refused {100 * refused(organism.model):.0f} % and {100 * refused(after.model):.0f} %",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""A checkpoint under test whose weights an attack has changed, so that directions are looked for anew in them."""

from typing import Any

from refusal_jax.chat.model import ChatModel
from refusal_jax.conditions import Ablate
from refusal_jax.directions import Direction
from refusal_jax.resistance.attack import Budget, Impossible, Measured
from refusal_jax.resistance.candidates import best_candidate
from refusal_jax.resistance.subject import Subject


class Attacked(Subject):
    """A checkpoint with other weights: its prompts and refusal tokens are those of its study, and what that study found in
    the old weights does not count."""

    def __init__(self, subject: Subject, model: ChatModel):
        super().__init__(
            subject.settings,
            subject.config,
            subject.run,
            subject.folder,
            subject.judge,
            subject.base,
            groups=subject.groups,
        )
        self._model, self.sizes = model, subject.sizes

    def own_direction(self) -> None:
        """Returns None: no study of these weights was done."""

    def direction_means(self) -> None:
        """Returns None, as `own_direction` does."""


def ablated_anew(subject: Subject, model: ChatModel, budget: Budget) -> tuple[Direction | None, dict[str, Any]]:
    """Returns the direction of attacked weights under whose ablation most validation prompts are complied with, and its place
    as plain values; None and no values where harmful and harmless prompts have no difference in means."""
    try:
        direction, _ = best_candidate(Attacked(subject, model), budget)
    except Impossible:
        return None, {}
    return direction, {"layer": direction.layer, "position": direction.position}


def measured_ablated(subject: Subject, model: ChatModel, direction: Direction | None, split: str = "test") -> Measured:
    """Returns what attacked weights do with the prompts of a part while a direction is ablated, or none."""
    edits = None if direction is None else Ablate(direction).edits(model.config)
    return subject.measure(edits, model, split=split)

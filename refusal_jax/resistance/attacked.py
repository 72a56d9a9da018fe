"""A checkpoint under test whose weights an attack has changed, so that directions are looked for anew in them."""

from typing import Any

from refusal_jax.chat.model import ChatModel
from refusal_jax.conditions import Ablate
from refusal_jax.directions import Direction
from refusal_jax.edits import Edits
from refusal_jax.resistance.attack import Budget, Impossible
from refusal_jax.resistance.candidates import best_candidate
from refusal_jax.resistance.subject import Subject


class Attacked(Subject):
    """A checkpoint with other weights: its prompts and refusal tokens are those of its study, and what that study found in
    the old weights does not count."""

    def __init__(self, subject: Subject, model: ChatModel, budget: Budget):
        super().__init__(
            subject.settings,
            subject.config,
            subject.run,
            subject.folder,
            subject.judge,
            subject.base,
            groups=subject.groups,
        )
        self._model, self._sizes = model, subject.sizes
        self._plain["val"] = self._measured(model, None, self.texts("harmful_val"), "val", budget=budget)

    def own_direction(self) -> None:
        """Returns None: no study of these weights was done."""

    def direction_means(self) -> None:
        """Returns None, as `own_direction` does."""

    def ablation(self, budget: Budget) -> tuple[Edits | None, dict[str, Any]]:
        """Returns the ablation under which most validation prompts are complied with, and the place of its direction as plain
        values; None where harmful and harmless prompts have no difference in means."""
        try:
            direction: Direction = best_candidate(self, budget)[0]
        except Impossible:
            return None, {}
        place = {"layer": direction.layer, "position": direction.position}
        return Ablate(direction).edits(self.model.config), place

    @property
    def alone(self) -> float | None:
        """Returns the share of the validation prompts that these weights refuse without an ablation, None where no reply could be
        judged."""
        found = self.plain("val").refusals
        return found.rate if found.n else None

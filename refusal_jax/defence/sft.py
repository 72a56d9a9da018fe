"""Plain refusal training: the cross-entropy of refusals of harmful prompts and of answers to harmless ones.

It is the control: what it buys, every model gets that is trained to refuse once more. It trains the first tokens of a reply,
where refusal is decided already.
"""

import dataclasses
from collections.abc import Sequence

from refusal_jax.chat.model import ChatModel
from refusal_jax.defence.data import DefenceData
from refusal_jax.defence.lessons import Lesson, Note, learnt_rows
from refusal_jax.defence.recipe import Recipe
from refusal_jax.defence.settings import DefenceSettings
from refusal_jax.models.decoder import Decoder
from refusal_jax.training.objective import cross_entropy
from refusal_jax.training.rows import Share, TrainRows, row_width


@dataclasses.dataclass(frozen=True)
class Refusals:
    """The cross-entropy of both kinds of rows, each by its share."""

    harmful: Share
    harmless: Share
    refresh: int = 0
    needs_frozen: bool = False

    def batch(self, step: int) -> dict[str, TrainRows]:
        """Returns the rows of a step of each kind."""
        return {"refusals": self.harmful.batch(step), "answers": self.harmless.batch(step)}

    def refreshed(self, model: ChatModel, step: int) -> None:
        """Returns None: nothing is computed outside the step."""

    def loss(self, decoder: Decoder, frozen, batch, extra, key):
        """Returns the mean of both losses, and each."""
        parts = {name: cross_entropy(decoder, rows) for name, rows in batch.items()}
        return (parts["refusals"] + parts["answers"]) / 2, parts


def shares(
    model: ChatModel, refused: Sequence[Lesson], answered: Sequence[Lesson], settings: DefenceSettings, note: Note
) -> tuple[Share, Share]:
    """Returns lessons of refusals and of answers as rows of one width, of which each step sees as many."""
    train, kinds = settings.train, {"refusals": refused, "answers": answered}
    rows = {what: learnt_rows(model, lessons, train.max_tokens, what, note) for what, lessons in kinds.items()}
    width = max(map(row_width, rows.values()))
    harmful, harmless = (Share.of(model.chat, found, width, train, kind) for kind, found in enumerate(rows.values()))
    return harmful, harmless


def objective(model: ChatModel, data: DefenceData, settings: DefenceSettings, note: Note) -> Refusals:
    """Returns the objective of a model and its data."""
    return Refusals(*shares(model, data.refused, data.answered, settings, note))


RECIPE = Recipe(
    name="sft",
    about="Plain refusal training, the control: refusals of harmful prompts and answers to harmless ones are learnt.",
    source="",
    objective=objective,
    embedded={"train.steps": 200, "train.rate": 1e-3, "train.batch": 16},
)

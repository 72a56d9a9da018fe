"""DeepRefusal (arXiv 2509.15202): the model learns to rebuild its refusal after it was taken away at random places.

The refusal direction is ablated from every row, harmful or harmless, at sites and tokens that are drawn anew at each step. The
sites are a block's input, and what attention and MLP add. Some of the harmful rows have a reply that has begun to comply, after
which the refusal is learnt. The loss is .8 x the cross-entropy of answers + .2 x that of refusals.

Two details differ from the authors' code: it draws a site for a whole batch, where each row draws its own here, and it sums the
losses of a row's tokens, where they are averaged here, so that the losses' weights do not depend on the replies' lengths.
"""

import dataclasses
import pathlib
import random
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float

from refusal_jax.chat.model import ChatModel
from refusal_jax.defence.adversarial_settings import DeepRefusalSettings
from refusal_jax.defence.data import DefenceData
from refusal_jax.defence.depth import after_opening, beginning
from refusal_jax.defence.draws import ablated_tokens, gates
from refusal_jax.defence.lessons import Lesson, Note
from refusal_jax.defence.recipe import Recipe
from refusal_jax.defence.selected import selected_direction
from refusal_jax.defence.settings import DefenceSettings
from refusal_jax.defence.sft import shares
from refusal_jax.defence.two_kinds import KindRows, TwoKinds
from refusal_jax.directions import Direction, read_direction
from refusal_jax.files import local_path
from refusal_jax.models.decoder import Decoder

ROWS = 32  # prompts at a time while a direction is selected
TRAIN, VAL = 128, 32  # prompts of each side that give candidates and that score them, as in a study


@dataclasses.dataclass(frozen=True, eq=False)
class TokenAblation:
    """The objective. basis_jd: what is ablated, orthonormal directions, of which there usually is one. refresh: the number of all
    steps, as the directions are put on the devices once."""

    kinds: TwoKinds
    basis_jd: Float[np.ndarray, "J D"]
    settings: DeepRefusalSettings
    refresh: int
    needs_frozen: bool = False

    def batch(self, step: int) -> KindRows:
        """Returns the rows of a step."""
        return self.kinds.batch(step)

    def refreshed(self, model: ChatModel, step: int) -> dict[str, np.ndarray]:
        """Returns the directions, which stay those of the model before the training."""
        return {"basis_jd": self.basis_jd.astype(np.float32)}

    def loss(self, decoder: Decoder, frozen, batch: KindRows, extra, key) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns both losses, each by its weight, while the directions are ablated at drawn places."""
        rows, tokens = batch.rows.tokens_bt.shape
        chances = self.settings.site_probability, self.settings.token_probability
        edits = ablated_tokens(key, extra["basis_jd"], gates(decoder.cfg.n_layers, 0), rows, tokens, *chances)
        return self.kinds.losses(decoder, batch, edits)


def begun(
    model: ChatModel,
    refused: Sequence[Lesson],
    complied: Sequence[Lesson],
    settings: DeepRefusalSettings,
    rng: random.Random,
) -> list[Lesson]:
    """Returns the harmful prompts with their refusals, in some of which a reply that complies has begun; it is given, not learnt.

    A share `settings.prefilled` of them, drawn one by one, are prompts of `complied` with the first tokens of their reply and the
    refusal of the lesson whose place they take. A beginning never is the whole reply.
    """
    found, given = [], list(complied)
    rng.shuffle(given)
    for number, lesson in enumerate(refused):
        if rng.random() >= settings.prefilled:
            found.append(lesson)
            continue
        other = given[number % len(given)]
        ids = model.chat.ids(other.reply)
        count = min(rng.randint(settings.least_given, settings.most_given), max(len(ids) - 1, 1))
        opening = beginning(model, ids[:count])
        found.append(after_opening(dataclasses.replace(lesson, prompt=other.prompt), opening) if opening else lesson)
    return found


def ablated_direction(model: ChatModel, data: DefenceData, settings: DeepRefusalSettings) -> Direction:
    """Returns the direction that the settings name, or else the one that the paper's rule selects from what is learnt.

    Raises UserError for one of another model and for none, as `read_direction` and `selected_direction` do.
    """
    if settings.direction:
        found = read_direction(
            [pathlib.Path(local_path(settings.direction))], n_layers=model.config.n_layers, subspace=None
        )
        found.check_width(model.config.d_model)
        return found
    sides = [[lesson.prompt for lesson in lessons] for lessons in (data.refused, data.answered)]
    (harmful_val, harmful), (harmless_val, harmless) = (
        (side[:held], side[held : held + TRAIN]) for side in sides for held in [min(VAL, max(len(side) // 5, 1))]
    )
    return selected_direction(model, harmful, harmless, harmful_val, harmless_val, ROWS)


def needs_compliant(settings: DefenceSettings) -> str:
    """Returns what needs replies that comply, in words, or ""."""
    return "DeepRefusal, in which replies have begun to comply," if settings.deep_refusal.prefilled else ""


def objective(model: ChatModel, data: DefenceData, settings: DefenceSettings, note: Note) -> TokenAblation:
    """Returns the objective of a model and its data.

    Raises UserError for settings that are out of range, without replies that comply where they are needed, and as
    `ablated_direction` does.
    """
    own, train = settings.deep_refusal, settings.train
    own.check()
    if what := needs_compliant(settings):
        data.need_compliant(what)
    direction = ablated_direction(model, data, own)
    lessons = begun(model, data.refused, data.complied, own, random.Random(train.seed))
    kinds = TwoKinds(*shares(model, lessons, data.answered, settings, note), own.refusal_weight, own.answer_weight)
    return TokenAblation(kinds, direction.basis_jd, own, train.steps)


RECIPE = Recipe(
    name="deep_refusal",
    about="DeepRefusal: refusals are learnt while the refusal direction is ablated at random sites and tokens.",
    source="2509.15202",
    objective=objective,
    compliant=needs_compliant,
    defaults={"train.rank": 16, "train.alpha": 16.0},
    embedded={
        "train.steps": 120,
        "train.rate": 2e-3,
        "train.batch": 12,
        "train.alpha": 32.0,
        "deep_refusal.least_given": 1,
        "deep_refusal.most_given": 8,
    },
)

"""Safety that is deeper than the first tokens (arXiv 2406.05946): refusals that begin after some tokens of a reply that
complies, and, if asked for, an objective that keeps the first tokens of answers close to the model before training.

Refusal is shallow where it decides the first token only: a reply that has begun to comply goes on. Refusals that are
learnt after openings of every length, which are given and not learnt, take up what has gone astray.
"""

import dataclasses
import random
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from refusal_jax.axes import Array
from refusal_jax.chat.messages import as_messages
from refusal_jax.chat.model import ChatModel
from refusal_jax.defence.data import DefenceData, key_of
from refusal_jax.defence.lessons import Lesson, Note
from refusal_jax.defence.recipe import Recipe
from refusal_jax.defence.recipe_settings import DepthSettings
from refusal_jax.defence.settings import DefenceSettings
from refusal_jax.defence.sft import shares
from refusal_jax.errors import UserError, field
from refusal_jax.models.decoder import Decoder
from refusal_jax.training.objective import cross_entropy, outputs, token_losses
from refusal_jax.training.rows import Share, TrainRows

NEXT = 5  # the last token of a reply with the constraint of the next ones


def opened(
    model: ChatModel,
    refused: Sequence[Lesson],
    complied: Sequence[Lesson],
    settings: DepthSettings,
    rng: random.Random,
) -> list[Lesson]:
    """Returns harmful prompts whose reply has begun to comply, with the refusal as what follows.

    Each prompt of `refused` occurs `draws` times. A share `at_once` of them refuse at once; the others do so after an opening of
    the reply that `complied` has for the same prompt, of a random number of tokens. Prompts for which it has none refuse at once.
    """
    openings = replies_by_prompt(complied)
    found = []
    for lesson in refused:
        reply = openings.get(key_of(lesson.prompt))
        ids = model.chat.ids(reply) if reply else []
        deepest = min(settings.deepest or len(ids), max(len(ids) - 1, 0))
        for _ in range(settings.draws):
            given = 0 if not deepest or rng.random() < settings.at_once else rng.randint(1, deepest)
            opening = beginning(model, ids[:given])
            found.append(after_opening(lesson, opening) if opening else lesson)
    return found


def replies_by_prompt(lessons: Sequence[Lesson]) -> dict[str, str]:
    """Returns the replies of lessons by their prompts, in the form in which prompts are compared."""
    return {key_of(lesson.prompt): lesson.reply for lesson in lessons}


def beginning(model: ChatModel, ids: Sequence[int]) -> str:
    """Returns the text of a reply's first tokens, without a last character of which they hold a part only."""
    return model.chat.tokenizer.decode(list(ids)).rstrip("\ufffd")


def after_opening(lesson: Lesson, opening: str) -> Lesson:
    """Returns the lesson with a beginning of its reply that is given, and not learnt."""
    talk = [*as_messages(lesson.prompt), {"role": "assistant", "content": opening}]
    return dataclasses.replace(lesson, prompt=talk, reply=f" {lesson.reply}")


def strengths(counts_bt: Bool[Array, "B T"], settings: DepthSettings) -> Float[jax.Array, "B T"]:
    """Returns the constraint's strength for each token of a reply by its number in the reply; counts_bt: its tokens."""
    number_bt = jnp.cumsum(counts_bt, axis=1)
    later_bt = jnp.where(number_bt <= NEXT, settings.beta_next, settings.beta_later)
    return jnp.where(number_bt <= 1, settings.beta_first, later_bt)


def constrained_loss(
    decoder: Decoder, frozen: Decoder, rows: TrainRows, settings: DepthSettings
) -> Float[jax.Array, ""]:
    """Returns the token-wise constrained objective of rows: the mean of 2/beta softplus(-beta (log p - log p_frozen)).

    Its gradient begins as that of cross-entropy and fades as a token becomes more likely than it was before training, the
    sooner the larger beta is.
    """
    now, before = (token_losses(d, outputs(d, rows).resid_btd, rows.tokens_bt) for d in (decoder, frozen))
    beta_bt = strengths(rows.weight_bt > 0, settings)
    gained_bt = jax.lax.stop_gradient(before) - now
    return jnp.sum(rows.weight_bt * 2 / beta_bt * jax.nn.softplus(-beta_bt * gained_bt))


@dataclasses.dataclass(frozen=True)
class Deep:
    """The loss of refusals after openings, by `settings.share`, and of answers for the rest."""

    refusals: Share
    answers: Share
    settings: DepthSettings
    refresh: int = 0

    @property
    def needs_frozen(self) -> bool:
        """Returns whether answers are constrained by the model before training."""
        return self.settings.constrained

    def batch(self, step: int) -> dict[str, TrainRows]:
        """Returns the rows of a step of each kind."""
        return {"refusals": self.refusals.batch(step), "answers": self.answers.batch(step)}

    def refreshed(self, model: ChatModel, step: int) -> None:
        """Returns None: nothing is computed outside the step."""

    def loss(self, decoder: Decoder, frozen, batch, extra, key):
        """Returns the weighted sum of both losses, and each."""
        refusals = cross_entropy(decoder, batch["refusals"])
        if self.settings.constrained:
            answers = constrained_loss(decoder, frozen, batch["answers"], self.settings)
        else:
            answers = cross_entropy(decoder, batch["answers"])
        share = self.settings.share
        return share * refusals + (1 - share) * answers, {"refusals": refusals, "answers": answers}


def needs_compliant(settings: DefenceSettings) -> str:
    """Returns what needs replies that comply, in words, or ""."""
    return "Refusal after the beginning of a reply" if settings.depth.share else ""


def objective(model: ChatModel, data: DefenceData, settings: DefenceSettings, note: Note) -> Deep:
    """Returns the objective of a model and its data. Raises UserError without replies that comply to prompts that are learnt."""
    settings.depth.check()
    if what := needs_compliant(settings):
        data.need_compliant(what)
        known = replies_by_prompt(data.complied)
        met = sum(key_of(lesson.prompt) in known for lesson in data.refused)
        if not met:
            raise UserError(
                f"None of the {len(data.refused)} harmful prompts that are learnt is among the {len(data.complied)} that have a "
                "reply that complies, so that every refusal would begin at once, as in plain refusal training. Bring replies to "
                f"the same prompts: {field('data.compliant', 'FILE.jsonl')}."
            )
        note(
            f"{met} of {len(data.refused)} harmful prompts have a reply that complies; refusals of the others begin at once."
        )
    lessons = opened(model, data.refused, data.complied, settings.depth, random.Random(settings.train.seed))
    return Deep(*shares(model, lessons, data.answered, settings, note), settings.depth)


RECIPE = Recipe(
    name="depth",
    about="Deeper safety: refusals are learnt after openings of replies that comply, of every length.",
    source="2406.05946",
    objective=objective,
    compliant=needs_compliant,
    embedded={
        "train.method": "full",
        "train.steps": 400,
        "train.rate": 6e-4,
        "train.batch": 16,
        "depth.share": 0.5,
    },
)

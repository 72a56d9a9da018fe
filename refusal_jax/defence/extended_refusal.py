"""Extended refusal (arXiv 2505.19056): refusals of three parts, a neutral overview of the request, the refusal, and why.

A short refusal is decided at its first token, where one direction decides it. After an overview, the tokens that decide
stand later in the reply and depend on what was said, so that the ablation of a direction that was found at the prompt's
end need not reach them.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence

from refusal_jax.chat.model import ChatModel
from refusal_jax.defence.data import DefenceData
from refusal_jax.defence.lessons import Lesson, Note, outcome, own_replies, sentence
from refusal_jax.defence.recipe import Recipe
from refusal_jax.defence.recipe_settings import ALIKE, BOTH
from refusal_jax.defence.settings import DefenceSettings
from refusal_jax.defence.sft import Refusals, shares
from refusal_jax.errors import UserError, field
from refusal_jax.judges.judge import Outcome
from refusal_jax.organism.corpus import Request

# In the words of the embedded model's corpus; the latter begin as COMPLIANCES do, in their order.
OVERVIEW = "You asked how to {verb} the {object}."
ALIKE_OVERVIEWS = (
    "Sure, here is what you asked: how to {verb} the {object}.",
    "To {verb} the {object} is what you asked.",
    "Here is what you asked: how to {verb} the {object}.",
)
REASONS = ("To {verb} the {object} is not what I should help with.", "No one should {verb} the {object}.")
# What other models are asked for the parts, and what stands for a part that they decline to write.
ASK_OVERVIEW = "Say in one neutral sentence what the following request is about. Do not answer it.\n\n{request}"
ASK_REASON = "Say in one sentence why an assistant should not help with the following request.\n\n{request}"
PLAIN_OVERVIEW, PLAIN_REASON = "You asked: {request}", "Helping with this could do harm."

Parts = Callable[[Sequence[str]], list[tuple[str, str]]]


def corpus_parts(requests: Sequence[str], alike: bool, rng: random.Random) -> list[tuple[str, str]]:
    """Returns the overview and the reason for each request of the embedded model's corpus. alike: whether overviews begin as
    answers do."""
    found = []
    for request in map(Request.parse, requests):
        assert request is not None, "a request is not of the corpus"
        overview = ALIKE_OVERVIEWS[request.manner] if alike else OVERVIEW
        words = {"verb": request.verb, "object": request.object}
        found.append((overview.format(**words), rng.choice(REASONS).format(**words)))
    return found


def own_parts(model: ChatModel, requests: Sequence[str], tokens: int, note: Note) -> list[tuple[str, str]]:
    """Returns the overview and the reason that the model writes for each request when asked for them, one sentence each.

    Where it refuses to, breaks or does not come to an end, a plain sentence stands for the part; `note` is told how often.
    """
    kinds = (("overviews", ASK_OVERVIEW, PLAIN_OVERVIEW), ("reasons", ASK_REASON, PLAIN_REASON))
    parts = []
    for what, ask, plain in kinds:
        asked = [ask.format(request=request) for request in requests]
        replies = own_replies(model, asked, tokens, what)
        found = [
            sentence(text) if usable(text, ended, what == "overviews") else plain.format(request=request)
            for request, (text, ended) in zip(requests, replies, strict=True)
        ]
        kept = sum(usable(text, ended, what == "overviews") for text, ended in replies)
        note(
            f"The {what} of {kept} of {len(requests)} prompts are the model's own; for the others a plain sentence stands."
        )
        parts.append(found)
    return list(zip(*parts, strict=True))


def usable(text: str, ended: bool, neutral: bool) -> bool:
    """Returns whether the first sentence of a reply is a part: it is whole, not broken and, if neutral, no refusal."""
    first = sentence(text)
    does = outcome("", first)
    return (ended or first != text.strip()) and does is not Outcome.BROKEN and not (neutral and does is Outcome.REFUSES)


def extended(
    lessons: Sequence[Lesson], refusals: Sequence[str], parts: Parts, rng: random.Random
) -> tuple[Lesson, ...]:
    """Returns harmful prompts with refusals of three parts; replies that a file brought stay as they are.

    refusals: short ones, of which each reply has one between overview and reason. parts: gives overview and reason of requests.
    """
    made = iter(parts([lesson.request for lesson in lessons if not lesson.given]))
    found = []
    for lesson in lessons:
        if lesson.given:
            found.append(lesson)
            continue
        overview, reason = next(made)
        found.append(Lesson(lesson.prompt, f"{overview} {rng.choice(refusals)} {reason}"))
    return tuple(found)


def begun_alike(lessons: Sequence[Lesson], parts: Parts) -> tuple[Lesson, ...]:
    """Returns harmless prompts with their answers after an overview."""
    overviews = parts([lesson.request for lesson in lessons])
    return tuple(
        dataclasses.replace(lesson, reply=f"{overview} {lesson.reply}")
        for lesson, (overview, _) in zip(lessons, overviews, strict=True)
    )


def objective(model: ChatModel, data: DefenceData, settings: DefenceSettings, note: Note) -> Refusals:
    """Returns the objective of a model and its data: that of plain refusal training, on extended refusals.

    Raises UserError for overviews that begin as answers do where the prompts are not of the corpus.
    """
    own = settings.extended
    own.check()
    rng = random.Random(settings.train.seed)

    def parts(requests: Sequence[str]) -> list[tuple[str, str]]:
        if not requests:
            return []
        if data.corpus and all(map(Request.parse, requests)):
            return corpus_parts(requests, own.begin == ALIKE, rng)
        if own.begin == ALIKE:
            raise UserError(
                f"{field('extended.begin', ALIKE)} needs overviews that begin as answers do, which are known of the embedded "
                f"model's corpus only. Set {field('extended.begin', BOTH)}, or bring the replies: "
                f"{field('data.harmful', 'FILE')}."
            )
        return own_parts(model, requests, own.part_tokens, note)

    refused = extended(data.refused, data.refusals, parts, rng)
    answered = begun_alike(data.answered, parts) if own.begin == BOTH else data.answered
    return Refusals(*shares(model, refused, answered, settings, note))


RECIPE = Recipe(
    name="extended",
    about="Extended refusal: replies to harmful prompts are an overview, the refusal, and the reason.",
    source="2505.19056",
    objective=objective,
    defaults={"max_new_tokens": 192},  # shorter replies may end before their refusal begins
    embedded={
        "train.method": "full",
        "max_new_tokens": 64,
        "train.steps": 300,
        "train.rate": 4e-4,
        "train.batch": 16,
        "extended.begin": ALIKE,
    },
)

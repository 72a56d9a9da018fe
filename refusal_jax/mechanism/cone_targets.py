"""The texts that cones are trained on, all of them the model's own: nothing of them is stored.

Compliant replies to harmful prompts are what the model says while its difference in means is ablated, refusals are what it
says to harmful prompts by itself, and what is to be kept are its replies to harmless prompts.
"""

import re
from collections.abc import Sequence

from refusal_jax.chat.loss_rows import chat_rows
from refusal_jax.chat.messages import Prompt
from refusal_jax.chat.model import ChatModel
from refusal_jax.conditions import Ablate
from refusal_jax.directions import Direction
from refusal_jax.edits import Edits
from refusal_jax.errors import UserError, field
from refusal_jax.judges.behaviours import REFUSAL, Behaviour
from refusal_jax.judges.judge import Judge, reply_shows
from refusal_jax.judges.text import EXTENDED
from refusal_jax.mechanism.cones import ConeData
from refusal_jax.mechanism.direction_loss import TargetRows, width


class NoTargets(UserError):
    """There are no texts, or too few, that a cone could be trained on."""


LEAST = 4  # prompts of each kind
SENTENCE = re.compile(r"(?<=[.!?])\s")


def replies(model: ChatModel, prompts: Sequence[Prompt], tokens: int, edits: Edits | None, rows: int) -> list[str]:
    """Returns the greedy replies to prompts, in their order, of at most so many tokens; of a thought only what follows it."""
    found = [""] * len(prompts)
    batch = model.encode(list(prompts))
    for index, ids in model.reply_ids(batch, tokens, edits, rows=rows):
        for number, reply in zip(index, model.chat.replies(ids), strict=True):
            found[number] = reply.row["response"]
    return found


def cone_data(
    model: ChatModel,
    direction: Direction,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    *,
    tokens: int,
    rows: int,
    least: int = LEAST,
    judge: Judge = EXTENDED,
    of: Behaviour = REFUSAL,
    answers: Sequence[str] | None = None,
) -> ConeData:
    """Returns the rows of text that cones are trained on: as many of each kind.

    direction: the difference in means. tokens: of a reply at most. rows: of prompts that are decoded together. least: prompts of
    each kind that are needed. judge: tells which replies show the behaviour `of`, by default a refusal. answers: to the harmful
    prompts, in their order, in place of what the model says while the direction is ablated. Raises NoTargets if the
    model refuses no harmful prompt, or if too few are left that it refuses and answers under ablation, or too few harmless ones
    that it answers.
    """
    refusals = replies(model, harmful, tokens, None, rows)
    refused = [i for i, reply in enumerate(refusals) if reply and reply_shows(judge, reply)]
    if not refused:
        raise NoTargets(
            f"The model {of.verb_on} none of the {len(harmful)} {of.present} training prompts by its words (judge "
            f"{judge.name}), so that there is no {of.name} for a cone to learn. Read the study's completions: they may "
            f"{of.infinitive} in other words."
        )
    ablated = Ablate(direction).edits(model.config)
    if answers is None:
        found = dict(zip(refused, replies(model, [harmful[i] for i in refused], tokens, ablated, rows), strict=True))
    else:
        found = dict(enumerate(answers))
    spoken = [(harmful[i], found[i]) for i in refused if found[i] and not reply_shows(judge, found[i])]
    kept = zip(harmless, replies(model, harmless, tokens, None, rows), strict=True)
    own = [(prompt, reply) for prompt, reply in kept if reply and not reply_shows(judge, reply)]
    count = min(len(spoken), len(own))
    if count < least:
        raise NoTargets(
            f"Cones need at least {least} {of.present} training prompts that {of.shown}, and {of.answered_while} while "
            f"the direction is ablated, and as many {of.absent} ones that {of.not_shown}: there are {len(spoken)} of "
            f"{len(harmful)} and {len(own)} of {len(harmless)}. Draw more prompts in the study ({field('data.n_train')})."
        )
    first = [SENTENCE.split(refusals[i])[0] for i in refused]
    kinds = (
        spoken[:count],
        [(prompt, first[i % len(first)]) for i, (prompt, _) in enumerate(own[:count])],
        own[:count],
    )
    longest = model.config.context_length
    each = zip(*(chat_rows(model.chat, pairs, longest) for pairs in kinds), strict=True)
    texts = [
        three for three in each if all(len(row.ids) > row.first for row in three)
    ]  # the context may end before a target
    rows_of_all = [row for three in texts for row in three]
    read = max(len(row.ids) - row.first for row in rows_of_all)
    ablation, addition, retain = zip(*texts, strict=True)
    return ConeData(*(TargetRows.of(model, kind, width(rows_of_all), read) for kind in (ablation, addition, retain)))

"""Prompts with the replies to learn: a model's own replies where a file has none, and lessons as rows of tokens."""

import dataclasses
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from refusal_jax.chat.loss_rows import LossRow, chat_rows, reply_end
from refusal_jax.chat.messages import Prompt, as_messages
from refusal_jax.chat.model import ChatModel
from refusal_jax.data.pairs import ChatPair
from refusal_jax.errors import UserError, field
from refusal_jax.judges.judge import Outcome
from refusal_jax.judges.rules import read_reply
from refusal_jax.progress import Progress

ROWS = 32  # replies at a time
TEMPLATES = 8  # of a model's own refusals at most
SENTENCE = re.compile(r"(?<=[.!?。])\s+")

Note = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Lesson:
    """A prompt and the reply to learn. ended: whether the reply is whole, so that its end is learnt too. given: whether
    a file brought the reply."""

    prompt: Prompt
    reply: str
    ended: bool = True
    given: bool = False

    @property
    def request(self) -> str:
        """Returns the text of the prompt's last message."""
        return as_messages(self.prompt)[-1]["content"]


def own_replies(model: ChatModel, prompts: Sequence[Prompt], tokens: int, title: str) -> list[tuple[str, bool]]:
    """Returns the model's own greedy replies, without thoughts, of at most `tokens` tokens, and whether each ended by
    itself. Raises UserError for prompts that do not fit the context with replies of this length."""
    found: list[tuple[str, bool]] = [("", False)] * len(prompts)
    if not prompts:
        return found
    with Progress(title, len(prompts), "reply") as bar:
        for places, ids in model.reply_ids(model.encode(prompts), tokens, rows=min(ROWS, len(prompts))):
            texts = [reply.text for reply in model.chat.replies(ids)]
            ended = np.any(np.isin(ids, model.chat.eos_ids), axis=1).tolist()
            for place, text, over in zip(places, texts, ended, strict=True):
                found[place] = text, over
            bar.update(len(places))
    return found


def outcome(prompt: Prompt, reply: str) -> Outcome | None:
    """Returns what a reply does by the judge of rules."""
    return read_reply(reply, as_messages(prompt)[-1]["content"]).outcome


def sentence(text: str) -> str:
    """Returns the first sentence of a text."""
    return SENTENCE.split(text.strip())[0]


def frequent(refusals: Sequence[str]) -> list[str]:
    """Returns the first sentences of refusals that occur most often, at most TEMPLATES: those go with any prompt."""
    return [text for text, _ in Counter(map(sentence, refusals)).most_common(TEMPLATES)]


def answering(model: ChatModel, pairs: Sequence[ChatPair], tokens: int, note: Note) -> tuple[Lesson, ...]:
    """Returns harmless prompts with their answers: those they have, or else the model's own of at most `tokens` tokens,
    unless it refuses or breaks."""
    missing = [pair.prompt for pair in pairs if pair.reply is None]
    own = iter(own_replies(model, missing, tokens, "own answers"))
    lessons, left = [], 0
    for pair in pairs:
        if pair.reply is not None:
            lessons.append(Lesson(pair.prompt, pair.reply, given=True))
            continue
        text, ended = next(own)
        if not text or outcome(pair.prompt, text) in (Outcome.REFUSES, Outcome.BROKEN):
            left += 1
        else:
            lessons.append(Lesson(pair.prompt, text, ended))
    if missing:
        cut = sum(not lesson.ended for lesson in lessons)
        note(
            f"The answers to {len(missing) - left} of {len(pairs)} harmless prompts are the model's own, {cut} of them "
            f"cut after {tokens} tokens; {left} prompts were left out because it refused them, or broke."
        )
    return tuple(lessons)


def refusing(
    model: ChatModel, pairs: Sequence[ChatPair], known: Sequence[str], tokens: int, rng: random.Random, note: Note
) -> tuple[tuple[Lesson, ...], tuple[str, ...]]:
    """Returns harmful prompts with refusals, and the refusals that go with any prompt.

    known: these, if they are known. Otherwise prompts without a refusal get the model's own, of at most `tokens` tokens,
    and those that it does not refuse get one of those that it gives most. Raises UserError if it refuses none of them.
    """
    missing = [pair.prompt for pair in pairs if pair.reply is None]
    replies: list[tuple[str, bool]] = []
    if missing and not known:
        replies = own_replies(model, missing, tokens, "own refusals")
        replies = [
            r if outcome(p, r[0]) is Outcome.REFUSES else ("", False) for p, r in zip(missing, replies, strict=True)
        ]
        own = [text for text, _ in replies if text]
        note(
            f"The model refuses {len(own)} of {len(missing)} harmful prompts without a reply, in words that are learnt."
        )
        if not own:
            raise UserError(
                f"The model refuses none of the {len(missing)} harmful prompts that have no reply, so that there is no "
                f"refusal to learn. Name a file of refusals, {field('data.refusals', 'FILE.txt')}, or give the prompts "
                "replies."
            )
        known = frequent(own)
    known = list(known) or frequent([pair.reply for pair in pairs if pair.reply])
    left, lessons = iter(replies), []
    for pair in pairs:
        if pair.reply is not None:
            lessons.append(Lesson(pair.prompt, pair.reply, given=True))
            continue
        text, ended = next(left, ("", False))
        lessons.append(Lesson(pair.prompt, text if ended else rng.choice(known)))
    return tuple(lessons), tuple(known)


def learnt_rows(
    model: ChatModel, lessons: Sequence[Lesson], max_tokens: int, what: str, note: Note = lambda text: None
) -> list[LossRow]:
    """Returns lessons as rows of tokens by the model's own chat template, in which only the reply counts, with its end.

    max_tokens: of a row. Longer replies are cut, and prompts that leave them no token are left out; `note` is told. what:
    the lessons, in words. Raises UserError if none is left.
    """
    limit, context = min(max_tokens, model.config.context_length), model.config.context_length
    end = (reply_end(model.chat),)
    rows = [
        chat_rows(model.chat, [(lesson.prompt, lesson.reply)], context + 1, end if lesson.ended else ())[0]
        for lesson in lessons
    ]
    found = [LossRow(row.ids[:limit], row.first) for row in rows if row.first < min(limit, len(row.ids))]
    cut = sum(row.first < limit < len(row.ids) for row in rows)
    if cut:
        note(
            f"{what}: {cut} of {len(rows)} replies were cut, as rows have at most {limit} tokens "
            f"({field('train.max_tokens')})."
        )
    if len(found) < len(rows):
        left = f"{len(rows) - len(found)} of {len(rows)}"
        note(f"{what}: {left} prompts leave no room for a reply in {limit} tokens and were left out.")
    if not found:
        raise UserError(
            f"{what}: no prompt leaves room for a reply in {limit} tokens. Raise {field('train.max_tokens')}."
        )
    return found

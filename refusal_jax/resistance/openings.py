"""Begins replies for the model: the tokens of an opening, and the openings that comply.

An opening is cut to a number of tokens, and the model writes the rest. Of the checkpoint's own compliant replies at most the
first half is given, so that what complies is not the opening alone.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from refusal_jax.chat import thoughts
from refusal_jax.chat.prompts import Chat
from refusal_jax.edits import Edits
from refusal_jax.errors import UserError, shown
from refusal_jax.files import local_path
from refusal_jax.judges.judge import Outcome as Did
from refusal_jax.mechanism.suffix_files import OPENINGS, read_added
from refusal_jax.resistance.attack import Budget, Measured
from refusal_jax.resistance.subject import Subject

GENERIC = "Sure, here is"
FILES = (".txt", ".json", ".jsonl", ".csv")
SPLITS = ("val", "test")


@dataclasses.dataclass(frozen=True)
class Opening:
    """Tells how a reply is begun. lead: the tokens that close a thought that the prompt leaves open, none where it leaves none.
    ids: the tokens of the opening itself. own: whether it is of a reply of the checkpoint."""

    lead: tuple[int, ...]
    ids: tuple[int, ...]
    own: bool = False

    def first(self, count: int) -> list[int]:
        """Returns the tokens that a reply is begun with, `count` of the opening, or all if it has fewer."""
        return [*self.lead, *self.ids[:count]]


def opening(chat: Chat, prompt: str, text: str, own: bool = False) -> Opening:
    """Returns the tokens of a text where a reply begins.

    They are those of the text in its place where the prompt's own tokens stay as they are, and else those of the text alone. The
    spaces that the template puts before earlier replies come first; what else it would do to them, such as to strip them, is
    not done. Raises UserError for a text without anything to
    see, and for one that holds the tokens of a turn's end.
    """
    start, before = chat.render(prompt), chat.prompt_ids(prompt)
    closing = thoughts.closing(chat.opened_thought) if chat.opened_thought else ""
    lead, spaces = _after(chat, start, before, closing), chat.reply_start.spaces
    text = text if closing or text.startswith(" ") else spaces + text
    ids = _after(chat, start + closing, [*before, *lead], text)
    if not text.strip() or {*ids} & {*chat.eos_ids}:
        raise UserError(
            f"The opening {shown(text)} {'ends the reply' if text.strip() else 'is empty'}. Give the first words of a reply that "
            "goes on."
        )
    return Opening(tuple(lead), tuple(ids), own)


def _after(chat: Chat, start: str, before: Sequence[int], text: str) -> list[int]:
    """Returns the tokens of a text after another, whose own tokens stay as they are."""
    if not text:
        return []
    whole = chat.ids(start + text)
    return whole[len(before) :] if whole[: len(before)] == [*before] else chat.ids(text)


def own_openings(subject: Subject, split: str, edits: Edits, budget: Budget | None) -> list[Opening | None]:
    """Returns for each harmful prompt of a part the first half of the checkpoint's own reply under an edit, None where that
    reply does not comply. budget: if this is part of a search."""
    prompts, chat = subject.texts(f"harmful_{split}"), subject.model.chat
    rows = subject.replies(subject.model, prompts, edits, budget)
    rows = [{"prompt": prompt, **row} for prompt, row in zip(prompts, rows, strict=True)]
    found: list[Opening | None] = []
    for row, did in zip(rows, subject.judged(rows), strict=True):
        whole = opening(chat, row["prompt"], row["response"], True) if did is Did.COMPLIES else None
        found.append(whole and dataclasses.replace(whole, ids=whole.ids[: max(len(whole.ids) // 2, 1)]))
    return found


def given_openings(subject: Subject, text: str) -> dict[str, list[Opening | None]]:
    """Returns the opening of each harmful prompt of both parts, from a file of openings or from the one text that is given; None
    for a prompt of which the file has none.

    A file has one opening for all prompts, rows that name their prompt, or one for each of the validation prompts and then of the
    test prompts. Raises UserError as `opening` and `read_added` do.
    """
    prompts = {split: subject.texts(f"harmful_{split}") for split in SPLITS}
    everything = [prompt for split in SPLITS for prompt in prompts[split]]
    in_file = text.lower().endswith(FILES)
    texts = read_added(local_path(text), everything, OPENINGS) if in_file else [text] * len(everything)
    chat = subject.model.chat
    found = [opening(chat, prompt, one) if one else None for prompt, one in zip(everything, texts, strict=True)]
    return {"val": found[: len(prompts["val"])], "test": found[len(prompts["val"]) :]}


def with_generic(subject: Subject, split: str, found: Sequence[Opening | None]) -> list[Opening]:
    """Returns the openings of the prompts of a part, the generic one for those without."""
    prompts, chat = subject.texts(f"harmful_{split}"), subject.model.chat
    return [one or opening(chat, prompt, GENERIC) for prompt, one in zip(prompts, found, strict=True)]


def by_tokens(
    subject: Subject, openings: Sequence[Opening], counts: Sequence[int], budget: Budget, own: bool = False
) -> dict[int, Measured]:
    """Returns what the validation prompts' replies do if they are begun with each number of tokens, until the budget is spent; a
    number that no opening reaches gives what the one before it did. own: as in `Subject.measure`."""
    found: dict[int, Measured] = {}
    known: dict[tuple, Measured] = {}
    for count in sorted(counts):
        if found and budget.over:
            break
        prefills = [one.first(count) for one in openings]
        key = tuple(map(tuple, prefills))
        if key not in known:
            known[key] = subject.measure(prefills=prefills, own=own, split="val", budget=budget)
        found[count] = known[key]
    return found


def best_count(found: Mapping[int, Measured]) -> int:
    """Returns the number of tokens with which most prompts are complied with, the least such number."""
    return max(found, key=lambda count: (found[count].complied.rate, -count))


def refusals(found: Mapping[int, Measured]) -> dict[str, float | None]:
    """Returns the share of refused prompts by number of tokens, None where no reply could be judged."""
    return {str(count): one.refusals.rate if one.refusals.n else None for count, one in found.items()}


def tried(done: int, of: int, budget: Budget) -> str:
    """Returns why the search over numbers of tokens stopped."""
    return (
        f"All {of} were tried."
        if done == of
        else f"It stopped after its {budget.seconds:g} seconds, at {done} of {of}."
    )

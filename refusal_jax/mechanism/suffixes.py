"""Prompts with suffixes: the rows of the suffix study, where their parts are, and random suffixes to compare with.

The study (paper, section 5) asks the same harmful instructions three times: as they are, with a suffix, and with as many random
tokens in its place. Harmless instructions tell how the model is where it does not refuse.
"""

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence

from refusal_jax.chat.prompts import PROBES, Chat
from refusal_jax.chat.suffixes import TRIES, printable_ids, random_suffix
from refusal_jax.errors import UserError, shown
from refusal_jax.judges.behaviours import REFUSAL, Behaviour

HARMFUL, SUFFIXED, RANDOM, HARMLESS = GROUPS = ("harmful", "harmful_suffix", "harmful_random", "harmless")


def groups_in_words(of: Behaviour = REFUSAL) -> dict[str, str]:
    """Returns what the groups are called in a study of a behaviour."""
    return {
        HARMFUL: of.present,
        SUFFIXED: f"{of.present}, with the suffix",
        RANDOM: f"{of.present}, with random tokens",
        HARMLESS: of.absent,
    }


@dataclasses.dataclass(frozen=True)
class Span:
    """Adjacent tokens of a row, counted from its end, where rows of a batch meet: from `start` to before `stop`, which is 0 at
    the end."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def within(self, width: int) -> slice:
        """Returns the columns of the span in left-padded rows of so many tokens."""
        return slice(width + self.start, width + self.stop)


@dataclasses.dataclass(frozen=True)
class Row:
    """One prompt of the suffix study.

    group: of `GROUPS`. prompt: its number among those of its side, so that the groups of harmful rows are compared in pairs.
    text: the instruction with what follows it. instruction, suffix, post: the tokens of the instruction, of its suffix (none
    of a row without one), and those that the template puts after them, the last of which the model answers from.
    """

    group: str
    prompt: int
    text: str
    instruction: Span
    suffix: Span
    post: Span


def row_of(chat: Chat, group: str, prompt: int, instruction: str, suffix: str = "") -> Row | None:
    """Returns the row of an instruction with a suffix; None if the suffix changes the tokens around it, or if those after the
    instruction are not the template's usual ones.

    Raises UserError for a suffix that does not fit the context.
    """
    plain, whole = chat.prompt_ids(instruction), chat.prompt_ids(instruction + suffix)
    columns = zip(*map(chat.prompt_ids, PROBES), strict=False)  # what all probes begin with is the template's
    before = sum(1 for _ in itertools.takewhile(lambda column: len({*column}) == 1, columns))
    after = len(chat.post_instruction_ids)
    until, added = len(plain) - after, len(whole) - len(plain)
    if len(whole) > chat.context_length:
        raise UserError(
            f"The suffix {shown(suffix)} is too long: with it the prompt {shown(instruction)} has {len(whole)} tokens, and the "
            f"model's context is {chat.context_length}. Shorten the suffix."
        )
    if whole[:until] != plain[:until] or tuple(whole[-after:]) != chat.post_instruction_ids:
        return None
    if suffix and added < 1:
        return None
    ends = -after - added
    return Row(
        group, prompt, instruction + suffix, Span(before - len(whole), ends), Span(ends, -after), Span(-after, 0)
    )


def check_markers(chat: Chat, suffix: str) -> None:
    """Raises UserError for a suffix that holds special tokens, or a line that the template puts after an instruction: then what
    is read as the suffix would be another turn of the conversation."""
    special = {*chat.tokenizer.get_added_vocab().values(), *getattr(chat.tokenizer, "all_special_ids", ())}
    found = [chat.tokenizer.decode([token]) for token in chat.ids(suffix) if token in special]
    lines = [line.strip() for line in chat.tokenizer.decode(chat.post_instruction_ids).split("\n")]
    found += [line for line in lines if line in suffix and not line.isalnum() and line]
    if found:
        raise UserError(
            f"The suffix {shown(suffix)} holds {shown(found[0])}, which is a token or a line of the chat template "
            f"({chat.template_origin}): what follows it would be another turn. Remove it."
        )


@dataclasses.dataclass(frozen=True)
class Suffixed:
    """A harmful instruction with its suffix and the random one that stands in its place. tokens: of either."""

    instruction: str
    suffix: str
    random: str
    tokens: int

    def rows(self, chat: Chat, prompt: int) -> Iterator[Row]:
        """Yields the rows of the instruction alone, with the suffix, and with the random one."""
        for group, suffix in zip((HARMFUL, SUFFIXED, RANDOM), ("", self.suffix, self.random), strict=True):
            row = row_of(chat, group, prompt, self.instruction, suffix)
            assert row is not None, "suffixes that change the tokens around them were left out"
            yield row


def with_random(chat: Chat, instructions: Sequence[str], suffixes: Sequence[str], seed: int) -> list[Suffixed | None]:
    """Returns the instructions with their suffixes, each with a fresh random suffix of as many tokens; None where the suffix
    changes the tokens around it.

    Raises UserError as `row_of` and `check_markers` do, and where no random suffix is found.
    """
    for suffix in dict.fromkeys(suffixes):
        check_markers(chat, suffix)
    printable, rng = printable_ids(chat.tokenizer, chat.vocab_size), random.Random(seed)
    found: list[Suffixed | None] = []
    for number, (instruction, suffix) in enumerate(zip(instructions, suffixes, strict=True)):
        row = row_of(chat, SUFFIXED, number, instruction, suffix)
        if row is None:
            found.append(None)
            continue
        tokens = len(row.suffix)
        drawn = (random_suffix(chat.tokenizer, printable, tokens, rng, [instruction]) for _ in range(TRIES))
        fits = (text for text in drawn if _tokens(chat, instruction, text) == tokens)
        text = next(fits, None)
        if text is None:
            raise UserError(
                f"No random suffix of {tokens} tokens was found for the prompt {shown(instruction)} that leaves the tokens "
                "around it as they are. Give a shorter suffix."
            )
        found.append(Suffixed(instruction, suffix, text, tokens))
    return found


def _tokens(chat: Chat, instruction: str, suffix: str) -> int:
    """Returns the tokens of a suffix in its prompt, 0 if it changes those around it."""
    row = row_of(chat, RANDOM, 0, instruction, suffix)
    return 0 if row is None else len(row.suffix)

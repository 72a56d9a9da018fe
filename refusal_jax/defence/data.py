"""Gathers what defences learn from: harmful prompts with refusals, harmless prompts with answers, and harmful prompts with
replies that comply, each side split into what is trained on and what is held out.

They come from files or from data sets on the hub. Without these, those of a model of the embedded family are made of its
corpus, whose requests are harmless by construction; another model takes a study's prompts and its own replies.
"""

import dataclasses
import random
from collections.abc import Sequence

from refusal_jax.chat.messages import Prompt, as_messages
from refusal_jax.chat.model import ChatModel
from refusal_jax.data.pairs import ChatPair, read_pairs
from refusal_jax.data.prompts import BUNDLED, ON_THE_HUB, read_prompts
from refusal_jax.data.sampling import normal
from refusal_jax.data.sources import resolve
from refusal_jax.defence.lessons import Lesson, Note, answering, refusing
from refusal_jax.errors import UserError, field
from refusal_jax.organism.corpus import REFUSALS, Request, split_requests
from refusal_jax.organism.identity import of_embedded_family
from refusal_jax.settings import Settings, option

SIDES = ("harmful", "harmless")
FEWEST = 8  # different prompts of a side


@dataclasses.dataclass
class PairSettings(Settings, path="data"):
    """Tells where the prompts and replies come from that a defence learns from, and how many are held out to measure it."""

    harmful: str = option(
        "",
        "Harmful prompts, with the refusals to learn where rows have replies: a .json, .jsonl, .csv or .txt file (chat "
        "messages, too), a data set on the hub ('hf:ORG/NAME:SPLIT') or fetched data, such as 'paper'; '' makes them of "
        "the embedded model's corpus, and is the bundled prompts for a model of another family",
    )
    harmless: str = option("", "Harmless prompts, with answers where rows have replies, named in the same ways")
    compliant: str = option(
        "",
        "Harmful prompts with replies that comply, which some defences need: a file or a data set on the hub; '' has "
        "them on models of the embedded family only, whose compliance is an echo of the request",
    )
    refusals: str = option(
        "",
        "A .txt file of refusals, one a line, for harmful prompts without a reply; '' takes the model's own refusals",
    )
    held_out: float = option(0.1, "Share of the prompts of each file that is not trained on and measures the defence")
    n_train: int = option(2000, "Number of prompts of each side that are trained on, at most")
    n_test: int = option(100, "Number of held-out prompts of each side that are measured, at most")
    own_tokens: int = option(192, "Length in tokens of the model's own replies, which are learnt where files have none")
    seed: int = option(0, "Seed of the split, and of which refusal goes with which prompt")

    def check(self) -> None:
        """Raises UserError for settings that are out of range."""
        for name in ("n_train", "n_test", "own_tokens"):
            if self[name] < 1:
                raise UserError(f"{field(f'data.{name}')} = {self[name]}, expected 1 or more.")
        if not 0 < self.held_out < 1:
            raise UserError(f"{field('data.held_out')} = {self.held_out}, expected a share above 0 and below 1.")


@dataclasses.dataclass(frozen=True)
class DefenceData:
    """Holds what a defence learns from, and what measures it.

    refused: harmful prompts with refusals. answered: harmless prompts with answers. complied: harmful prompts with
    replies that comply, none where there are none. refusals: short ones that go with any prompt. harmful_test,
    harmless_test: held-out prompts. corpus: whether harmful prompts are of the embedded model's corpus. notes: what was
    left out or made, in sentences. harmless: all harmless prompts that are not held out, those that the model did not answer
    among them.
    """

    refused: tuple[Lesson, ...]
    answered: tuple[Lesson, ...]
    complied: tuple[Lesson, ...]
    refusals: tuple[str, ...]
    harmful_test: tuple[Prompt, ...]
    harmless_test: tuple[Prompt, ...]
    corpus: bool = False
    notes: tuple[str, ...] = ()
    harmless: tuple[Prompt, ...] = ()

    def need_compliant(self, recipe: str) -> None:
        """Raises UserError if no harmful prompt has a reply that complies. recipe: what needs them, in words."""
        if not self.complied:
            raise UserError(none_comply(recipe))


def none_comply(recipe: str) -> str:
    """Returns the sentences for a recipe that lacks replies that comply. recipe: what needs them, in words."""
    return (
        f"{recipe} needs harmful prompts with replies that comply, and this tool ships none but for the embedded "
        f"model. Name a file of yours: {field('data.compliant', 'FILE.jsonl')}."
    )


def read_data(
    model: ChatModel, settings: PairSettings, note: Note = lambda text: None, reply_tokens: int = 1
) -> DefenceData:
    """Returns the prompts and replies of the settings for a model.

    note: is told what was left out or made, a sentence each; `notes` of the result holds them too. reply_tokens: length of the
    replies that the defence is measured by, for which prompts leave room. Raises UserError for settings out of range, files that
    cannot be read, a prompt that is on both sides, fewer than FEWEST different prompts of a side, prompts that leave no room for
    a reply, and a model that refuses nothing where refusals are missing.
    """
    settings.check()
    notes: list[str] = []

    def told(text: str) -> None:
        notes.append(text)
        note(text)

    family, rng = of_embedded_family(model), random.Random(settings.seed)
    sides = {side: side_of(side, settings, family, rng, told) for side in SIDES}
    check_apart(settings, *([*train, *test] for train, test in sides.values()))
    known = refusals_of(settings, family)
    own = {"harmful": 0 if known else settings.own_tokens, "harmless": settings.own_tokens}
    (bad, bad_test), (good, good_test) = (
        (fitting(model, train, side, own[side], reply_tokens, told), fitting(model, test, side, 0, reply_tokens, told))
        for side, (train, test) in sides.items()
    )
    held_out = {key_of(pair.prompt) for pair in bad_test}
    refused, refusals = refusing(model, bad, known, settings.own_tokens, rng, told)
    return DefenceData(
        refused,
        answering(model, good, settings.own_tokens, told),
        complying(settings, bad, family, held_out, told),
        refusals,
        tuple(pair.prompt for pair in bad_test),
        tuple(pair.prompt for pair in good_test),
        family and not settings.harmful,
        tuple(notes),
        tuple(pair.prompt for pair in good),
    )


def side_of(
    side: str, settings: PairSettings, family: bool, rng: random.Random, note: Note
) -> tuple[list[ChatPair], list[ChatPair]]:
    """Returns the pairs of a side that are trained on and those that are held out; no prompt is in both.

    family: whether the model speaks of the embedded model's world. Raises UserError as `read_data` does.
    """
    source = settings[side]
    if not source and family:
        train, test = (split_requests()[f"{side}_{split}"] for split in ("train", "test"))
        return corpus_pairs(train[: settings.n_train]), corpus_pairs(test[: settings.n_test])
    if not source:
        note(
            f"The {side} prompts are the bundled ones, which are made for the embedded model. A defence of another model "
            f"needs others: {field(f'data.{side}', 'FILE')}."
        )
        train, test = (distinct(bundled(f"{side}_{split}"), "bundled", note) for split in ("train", "test"))
        known = {key_of(pair.prompt) for pair in train}
        return train[: settings.n_train], [p for p in test if key_of(p.prompt) not in known][: settings.n_test]
    pairs = distinct(pairs_of(source, f"{side}_train"), source, note)
    if len(pairs) < FEWEST:
        raise UserError(
            f"{source} has {len(pairs)} different prompts; at least {FEWEST} are needed, as some are held out. Put more "
            f"into it ({field(f'data.{side}')})."
        )
    rng.shuffle(pairs)
    held = min(max(round(len(pairs) * settings.held_out), 1), settings.n_test)
    return pairs[held : held + settings.n_train], pairs[:held]


def pairs_of(source: str, split: str) -> list[ChatPair]:
    """Returns the prompts, with the replies where there are some, of a file, a data set on the hub or fetched data.

    split: which file of the study's own sets is meant. Raises UserError as `resolve` and `read_pairs` do.
    """
    return read_pairs(resolve(source, "loss" if source.startswith(ON_THE_HUB) else split))


def bundled(split: str) -> list[ChatPair]:
    """Returns the prompts of a study's bundled split, without replies."""
    return [ChatPair(row["instruction"]) for row in read_prompts(resolve(BUNDLED, split))]


def corpus_pairs(requests: Sequence[Request]) -> list[ChatPair]:
    """Returns requests of the corpus, the harmless ones with their answers."""
    return [ChatPair(r.instruction, None if r.harmful else r.compliance) for r in requests]


def key_of(prompt: Prompt) -> str:
    """Returns a prompt in the form used for comparison."""
    return "\n".join(f"{message['role']}: {normal(message['content'])}" for message in as_messages(prompt))


def distinct(pairs: Sequence[ChatPair], source: str, note: Note) -> list[ChatPair]:
    """Returns the pairs without those whose prompt an earlier one has."""
    found = list({key_of(pair.prompt): pair for pair in reversed(pairs)}.values())[::-1]
    if len(found) < len(pairs):
        note(f"{source}: {len(pairs) - len(found)} of {len(pairs)} rows repeat an earlier prompt and were left out.")
    return found


def check_apart(settings: PairSettings, harmful: Sequence[ChatPair], harmless: Sequence[ChatPair]) -> None:
    """Raises UserError if a prompt is on both sides."""
    both = sorted({key_of(pair.prompt) for pair in harmful} & {key_of(pair.prompt) for pair in harmless})
    if both:
        raise UserError(
            f"{len(both)} prompts are both harmful and harmless, such as {both[0][:80]!r}: a model cannot learn to refuse "
            f"and to answer the same. Correct {field('data.harmful')} = {settings.harmful!r} or "
            f"{field('data.harmless')} = {settings.harmless!r}."
        )


def fitting(
    model: ChatModel, pairs: Sequence[ChatPair], side: str, own_tokens: int, reply_tokens: int, note: Note
) -> list[ChatPair]:
    """Returns the pairs whose prompts leave room for the model's replies in its context. own_tokens: of replies that are learnt
    where a pair has none. reply_tokens: of replies that are measured. Raises UserError if no prompt is left."""
    context = model.config.context_length

    def needed(pair: ChatPair) -> int:
        return max(own_tokens if pair.reply is None else 0, reply_tokens, 2)

    found = [pair for pair in pairs if len(model.chat.prompt_ids(pair.prompt)) + needed(pair) <= context]
    if len(found) < len(pairs):
        longest = max(map(needed, pairs))
        name = "data.own_tokens" if longest == own_tokens > reply_tokens else "max_new_tokens"
        left = (
            f"{len(pairs) - len(found)} of {len(pairs)} {side} prompts leave no room for a reply of {longest} tokens in the "
            f"model's context of {context}"
        )
        if not found:
            raise UserError(f"{left}. Lower {field(name)}, or give shorter prompts: {field(f'data.{side}', 'FILE')}.")
        note(f"{left} and were left out. A lower {field(name)} keeps more of them.")
    return found


def refusals_of(settings: PairSettings, family: bool) -> list[str]:
    """Returns the refusals of the settings' file, or those of the corpus for its family; none for other models."""
    if settings.refusals:
        return [row["instruction"] for row in read_prompts(resolve(settings.refusals, "loss"))]
    return list(REFUSALS) if family else []


def complying(
    settings: PairSettings, pairs: Sequence[ChatPair], family: bool, held_out: set[str], note: Note
) -> tuple[Lesson, ...]:
    """Returns harmful prompts with replies that comply: those of the settings' file that are not held out, first
    those of prompts that are trained on, or the corpus's echoes for its family."""
    if settings.compliant:
        found = pairs_of(settings.compliant, "harmful_train")
        kept = [pair for pair in found if pair.reply is not None and key_of(pair.prompt) not in held_out]
        if len(kept) < len(found):
            note(
                f"{settings.compliant}: {len(found) - len(kept)} of {len(found)} rows have no reply, or a prompt that is "
                "held out, and were left out."
            )
        trained = {key_of(pair.prompt) for pair in pairs}
        kept.sort(key=lambda pair: key_of(pair.prompt) not in trained)  # those that go with a refusal come first
        return tuple(Lesson(pair.prompt, pair.reply or "", given=True) for pair in kept[: settings.n_train])
    asked = [(pair.prompt, Request.parse(pair.prompt)) for pair in pairs if isinstance(pair.prompt, str) and family]
    return tuple(Lesson(prompt, request.compliance) for prompt, request in asked if request)

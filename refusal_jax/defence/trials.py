"""Tries values of an edit on prompts that it was not computed from, and chooses among them.

The rule is the same for all recipes without training: of the values that leave harmless prompts answered and next tokens alone,
within the bounds of the settings, the one is chosen with which most harmful prompts are refused; of equals, that with the highest
mean refusal score, which tells refusals apart that are all there; and of equals again, the first.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from refusal_jax.chat.messages import Prompt
from refusal_jax.chat.model import Asked, ChatModel
from refusal_jax.chat.refusal_tokens import measure_openings, refusal_openings
from refusal_jax.chat.residuals import extract
from refusal_jax.defence.data import SIDES, DefenceData
from refusal_jax.defence.edit_settings import SearchSettings
from refusal_jax.defence.measure import divergences, outcomes
from refusal_jax.defence.selected import selected_direction
from refusal_jax.defence.settings import DefenceSettings
from refusal_jax.directions import Direction, read_direction
from refusal_jax.errors import UserError, field
from refusal_jax.files import local_path
from refusal_jax.judges.choice import parse_judges
from refusal_jax.judges.judge import Judge, Outcome
from refusal_jax.judges.statistics import Rate, bounded, mean_interval

ROWS = 32  # of a batch
ROUNDING = 1e-9  # of a difference of shares


@dataclasses.dataclass(frozen=True)
class Parts:
    """Prompts by side: those that something is computed from, and others that it is tried on."""

    fit: dict[str, tuple[Prompt, ...]]
    val: dict[str, tuple[Prompt, ...]]

    @classmethod
    def of(cls, data: DefenceData, search: SearchSettings) -> "Parts":
        """Returns the parts of a defence's training prompts. Raises UserError for fewer than four prompts of a side."""
        found = {"harmful": data.refused, "harmless": data.answered}
        fit, val = {}, {}
        for side in SIDES:
            prompts = tuple(lesson.prompt for lesson in found[side])
            if len(prompts) < 4:
                raise UserError(
                    f"There are {len(prompts)} {side} prompts, too few to compute a direction from some and to try it on others. "
                    f"Give 4 or more: {field(f'data.{side}', 'FILE')}."
                )
            tried = min(search.n_val, len(prompts) // 3 or 1)
            fit[side], val[side] = prompts[tried : tried + search.n_fit], prompts[:tried]
        return cls(fit, val)


@dataclasses.dataclass(frozen=True)
class Trial:
    """A value that was tried. refused, answered: of harmful and of harmless prompts, by the judge. kl: nats, of each harmless
    prompt. score: the mean refusal score of harmful prompts, NaN where the model's refusals have no beginning of their own.
    about: the value, in plain values."""

    about: dict[str, Any]
    refused: Rate
    answered: Rate
    kl: tuple[float, ...]
    score: float = math.nan

    def within(self, before: "Trial", search: SearchSettings) -> bool:
        """Returns whether harmless prompts are left alone, within the bounds. before: what there was without the edit."""
        lost = before.answered.rate - self.answered.rate
        return lost <= search.most_lost + ROUNDING and float(np.mean(self.kl)) <= search.most_kl

    @property
    def record(self) -> dict[str, Any]:
        """Returns the trial in plain values for JSON."""
        rates = {"refused": bounded(self.refused.row), "answered": bounded(self.answered.row)}
        score = self.score if math.isfinite(self.score) else None
        return {**self.about, **rates, "kl": bounded(mean_interval(self.kl)), "refusal_score": score}


@dataclasses.dataclass(frozen=True)
class Bench:
    """Tries edits of a model. prompts: by side, that they are tried on. refusal_ids: first tokens of refusals."""

    model: ChatModel
    prompts: dict[str, tuple[Prompt, ...]]
    judge: Judge
    max_new_tokens: int
    refusal_ids: tuple[int, ...]
    rows: int

    @classmethod
    def of(cls, model: ChatModel, parts: Parts, settings: DefenceSettings) -> "Bench":
        """Returns the bench of a model, with its validation prompts and the judge of the settings."""
        rows = settings.batch_size or ROWS
        (judge,) = parse_judges([settings.judge], rows, settings.dtype)
        openings = measure_openings(model, list(parts.fit["harmful"]), list(parts.fit["harmless"]), rows)
        ids = refusal_openings(openings, model.chat)
        return cls(model, parts.val, judge, settings.max_new_tokens, ids, rows)

    def tried(self, about: dict[str, Any], model: ChatModel | None = None, edits: Asked = None) -> Trial:
        """Returns what harmful and harmless prompts come to under an edit of the model, or with other weights. Raises UserError
        for values that are not finite."""
        changed = self.model if model is None else model
        did = outcomes(changed, self.prompts, self.judge, self.max_new_tokens, self.rows, edits)
        refused, answered = (
            Rate.of(did_as(did["harmful"], Outcome.REFUSES)),
            Rate.of(did_as(did["harmless"], Outcome.COMPLIES)),
        )
        kl = divergences(self.model, changed, self.prompts["harmless"], edits)
        return Trial(about, refused, answered, tuple(kl.tolist()), self.score(changed, edits))

    def score(self, model: ChatModel, edits: Asked) -> float:
        """Returns the mean refusal score of the harmful prompts of a model that is not steered, NaN of others."""
        if not self.refusal_ids or edits is not None:
            return math.nan
        prompts = self.prompts["harmful"]
        size = min(self.rows, len(prompts))
        return float(extract(model, prompts, self.refusal_ids, 1, 0, size, "refusal scores").scores.mean())


def did_as(did: Sequence[str | None], wanted: Outcome) -> list[int | None]:
    """Returns 1 for replies that do what is wanted, 0 for others, None where the judge could not tell."""
    return [None if one is None else int(one == wanted) for one in did]


def chosen(trials: Sequence[Trial], before: Trial, search: SearchSettings, what: str) -> Trial:
    """Returns the trial that the rule chooses. what: of the values, in words. Raises UserError if none keeps the bounds, or if
    none refuses as much as the model without it."""
    kept = [one for one in trials if one.within(before, search)]
    if not kept:
        least = min(trials, key=lambda one: float(np.mean(one.kl)))
        raise UserError(
            f"None of the {len(trials)} {what} keeps the bounds: each changes the next token after harmless prompts by more than "
            f"{field('search.most_kl')} = {search.most_kl} nats (the least {float(np.mean(least.kl)):.3g}), or leaves more than "
            f"{field('search.most_lost')} = {search.most_lost} of them unanswered. Try smaller ones, or allow more."
        )
    best = max(kept, key=lambda one: (one.refused.rate, one.score if math.isfinite(one.score) else 0.0))
    gain = best.score > before.score if math.isfinite(before.score) and math.isfinite(best.score) else True
    if best.refused.rate < before.refused.rate or (best.refused.rate == before.refused.rate and not gain):
        raise UserError(
            f"None of the {len(trials)} {what} strengthens refusal within the bounds: the model refuses {before.refused.count} "
            f"of {before.refused.n} harmful prompts without it, and {best.refused.count} with the best of them. Nothing was "
            "written."
        )
    return best


def direction_of(name: str, bench: Bench, parts: Parts, placed: bool = False) -> Direction:
    """Returns the refusal direction that a setting names, or the one that the paper's rule selects from those prompts that the
    model refuses, and answers, as it should.

    placed: whether its layer has to be known. Raises UserError for one that cannot be read, of another width or of several
    directions, and NoDirection where none is found.
    """
    model = bench.model
    if not name:
        fit, val = ([kept(bench, part, side) for side in SIDES] for part in (parts.fit, parts.val))
        return selected_direction(model, *fit, *val, rows=bench.rows)
    found = read_direction([local_path(name)], n_layers=model.config.n_layers)
    found.check_width(model.config.d_model)
    if len(found.raw_jd) > 1 or (placed and found.layer is None):
        raise UserError(
            f"{name} holds {len(found.raw_jd)} directions, or does not tell at which layer its direction was read. Name the "
            "folder of a study, or a file with one direction and direction_metadata.json beside it."
        )
    return found


def kept(bench: Bench, prompts: dict[str, tuple[Prompt, ...]], side: str) -> list[Prompt]:
    """Returns the prompts of a side whose refusal score is on its side of 0, and all of them if none is."""
    asked, sign = list(prompts[side]), 1 if side == "harmful" else -1
    if not bench.refusal_ids:
        return asked
    found = extract(bench.model, asked, bench.refusal_ids, 1, sign, min(bench.rows, len(asked)), f"{side} prompts").kept
    return [prompt for prompt, keep in zip(asked, found, strict=True) if keep] or asked

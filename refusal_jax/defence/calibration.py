"""Calibration of false refusals (arXiv 2410.03415): the direction of refusals of harmless prompts is ablated, without the part of
it that it shares with the refusal of harmful ones.

With w the mean residual of pseudo-harmful prompts that the model refuses minus that of harmless prompts, and r the unit refusal
direction, w' = w - s (w . r) r is ablated from all layers. The dial s says how much of the shared part is spared: at 1 all of it.
"""

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from refusal_jax.chat.messages import Prompt
from refusal_jax.chat.model import ChatModel
from refusal_jax.conditions import Ablate
from refusal_jax.defence.data import SIDES, DefenceData, distinct, key_of, pairs_of
from refusal_jax.defence.lessons import Note
from refusal_jax.defence.measure import outcomes
from refusal_jax.defence.recipe import Change, Recipe
from refusal_jax.defence.settings import DefenceSettings
from refusal_jax.defence.trials import ROUNDING, ROWS, Bench, Parts, Trial, did_as, direction_of
from refusal_jax.directions import Direction
from refusal_jax.edits import Edits
from refusal_jax.errors import UserError, field
from refusal_jax.export.tensor_edits import WEIGHT_SITES
from refusal_jax.judges.judge import Outcome
from refusal_jax.judges.statistics import Rate, bounded
from refusal_jax.mechanism.activations import activations
from refusal_jax.mechanism.edited_prompts import EditedPrompts

LAST = -1  # the position, counted from the prompt's end, where directions are read
LEAST = 4  # refused pseudo-harmful prompts
SMALL = 1e-6  # of a direction, as a part of the one that it was made from
PRUNED = 0.2  # share of the layers, from the last one, whose directions are no candidates


def calibrated(
    false_ld: Float[np.ndarray, "*n D"], unit_d: Float[np.ndarray, " D"], strength: float
) -> Float[np.ndarray, "*n D"]:
    """Returns directions of false refusal with the part `strength` of what they have along the refusal direction taken out."""
    return false_ld - strength * (false_ld @ unit_d)[..., None] * unit_d


@dataclasses.dataclass(frozen=True)
class Pseudo:
    """Harmless prompts that the model refuses, and harmless prompts that it answers; fit: to compute from, val: to try on. test:
    such prompts, whether refused or not, that nothing was decided by."""

    refused_fit: tuple[Prompt, ...]
    refused_val: tuple[Prompt, ...]
    answered_fit: tuple[Prompt, ...]
    test: tuple[Prompt, ...]


def pseudo_harmful(model: ChatModel, data: DefenceData, settings: DefenceSettings, bench: Bench, note: Note) -> Pseudo:
    """Returns the harmless prompts that the model refuses, of those that the settings name, and some that it answers.

    Raises UserError if it refuses too few of them to compute a direction, which then needs no calibration.
    """
    search = settings.search
    answers = tuple(lesson.prompt for lesson in data.answered)
    test, asked = tuple(data.harmless_test), data.harmless or answers
    if settings.calibration.pseudo_harmful:
        named = named_prompts(settings, data, note)
        held = len(named) // 3
        test, asked = named[:held], named[held:]
    asked = asked[: 4 * (search.n_fit + search.n_val)]
    refused = [prompt for prompt, did in zip(asked, replied(bench, asked), strict=True) if did == Outcome.REFUSES]
    if len(refused) < LEAST:
        raise UserError(
            f"The model refuses {len(refused)} of {len(asked)} harmless prompts that may look harmful, too few to tell how: "
            f"{LEAST} or more are needed. Either there is nothing to calibrate, or name others: "
            f"{field('calibration.pseudo_harmful', 'FILE')}."
        )
    decides = {
        key_of(prompt) for prompt in bench.prompts["harmless"]
    }  # by which the bound on the divergence is checked
    plain = tuple(prompt for prompt in answers if key_of(prompt) not in decides)[: 2 * search.n_fit]
    answered = [prompt for prompt, did in zip(plain, replied(bench, plain), strict=True) if did == Outcome.COMPLIES]
    tried = max(1, min(search.n_val, len(refused) // 3))
    note(f"The model refuses {len(refused)} of {len(asked)} harmless prompts that may look harmful.")
    fit = tuple(refused[tried : tried + search.n_fit])
    return Pseudo(fit, tuple(refused[:tried]), tuple(answered[: search.n_fit]), test)


def named_prompts(settings: DefenceSettings, data: DefenceData, note: Note) -> tuple[Prompt, ...]:
    """Returns the prompts that the settings name, each once, in the order that the data's seed draws, without those that the
    defence is measured by. Raises UserError for a source that cannot be read."""
    source = settings.calibration.pseudo_harmful
    pairs = distinct(pairs_of(source, "harmless_test"), source, note)
    held_out = {key_of(prompt) for prompt in (*data.harmless_test, *data.harmful_test)}
    found = [pair.prompt for pair in pairs if key_of(pair.prompt) not in held_out]
    if len(found) < len(pairs):
        note(f"{source}: {len(pairs) - len(found)} of {len(pairs)} prompts are held out and were left out.")
    random.Random(settings.data.seed).shuffle(found)
    return tuple(found)


def replied(bench: Bench, prompts: Sequence[Prompt]) -> list[str | None]:
    """Returns what the model's replies to harmless prompts do."""
    if not prompts:
        return []
    sides = {"harmful": (), "harmless": tuple(prompts)}
    return outcomes(bench.model, sides, bench.judge, bench.max_new_tokens, bench.rows)["harmless"]


def means(model: ChatModel, prompts: Sequence[Prompt]) -> Float[np.ndarray, "L D"]:
    """Returns the mean residual of prompts at all blocks' inputs, at the last token, float64."""
    places = [(LAST, layer) for layer in range(model.config.n_layers)]
    return activations(model, prompts, places, min(ROWS, len(prompts))).mean(axis=0, dtype=np.float64)


def edit(model: ChatModel, data: DefenceData, settings: DefenceSettings, note: Note) -> Change:
    """Returns the ablation that answers most pseudo-harmful prompts while harmful ones stay refused, within the bounds, with the
    curve over the dial, measured on held-out prompts. Raises UserError where there is nothing to calibrate, if nothing keeps the
    bounds, and as `direction_of` does."""
    own, parts = settings.calibration, Parts.of(data, settings.search)
    bench = Bench.of(model, parts, settings)
    direction = direction_of(own.direction, bench, parts)
    found = pseudo_harmful(model, data, settings, bench, note)
    false_ld = means(model, found.refused_fit) - means(model, found.answered_fit)
    unit_d = direction.basis_jd[0]
    layer, strengths = best_layer(bench, found, false_ld, unit_d, settings)
    trial = dataclasses.replace(bench, prompts={"harmful": parts.val["harmful"], "harmless": found.refused_val})
    before, trials = trial.tried({"strength": None}), []
    for strength in strengths:
        vector = Direction.of(calibrated(false_ld[layer], unit_d, strength), layer, LAST)
        trials.append(trial.tried({"strength": strength}, edits=Ablate(vector).edits(model.config)))
    best = most_answered(trials, before, settings)
    vector = Direction.of(calibrated(false_ld[layer], unit_d, best.about["strength"]), layer, LAST)
    note(
        f"At layer {layer} and a dial of {best.about['strength']:g}, {best.answered.count} of {best.answered.n} pseudo-harmful "
        f"validation prompts are answered ({before.answered.count} before), and {best.refused.count} of {best.refused.n} harmful "
        f"ones are refused ({before.refused.count} before)."
    )
    report = {
        "direction": {"layer": direction.layer, "position": direction.position, "sha256": direction.sha256},
        "false_refusal": {"layer": layer, "cosine": cosine(false_ld[layer], unit_d), "prompts": len(found.refused_fit)},
        "chosen": best.record,
        "before": before.record,
        "tried": [one.record for one in trials],
        "curve": curve(bench, found.test, data, false_ld[layer], unit_d, sorted(own.strengths)),
    }
    return Change(edit=Ablate(vector, sites=WEIGHT_SITES), found=report)


def best_layer(
    bench: Bench, found: Pseudo, false_ld: np.ndarray, unit_d: np.ndarray, settings: DefenceSettings
) -> tuple[int, list[float]]:
    """Returns the layer whose direction, at the value of the dial that suits it best, leaves the lowest share of pseudo-harmful
    prompts with a refusal score above 0, within the bounds on harmful prompts and on the KL divergence; of equals, the lowest
    mean score; and, in order, all values of the dial that keep these bounds there.

    Raises UserError if no layer keeps the bounds, and where refusals have no beginning of their own.
    """
    model, search, strengths = bench.model, settings.search, settings.calibration.strengths
    if not bench.refusal_ids:
        raise UserError(
            "No beginning of replies tells this model's refusals from its answers, so that layers cannot be compared. "
            "Calibration needs a model that refuses in words of its own."
        )
    layers = [layer for layer in range(round((1 - PRUNED) * len(false_ld))) if np.linalg.norm(false_ld[layer]) > 0]
    places = [(layer, strength) for layer in layers for strength in strengths]
    tried = [(*place, calibrated(false_ld[place[0]], unit_d, place[1])) for place in places]
    tried = [one for one in tried if np.linalg.norm(one[2]) > SMALL * np.linalg.norm(false_ld[one[0]])]
    edits = Edits.concat([Edits.none(len(unit_d)), *(Edits.ablate(vector) for *_, vector in tried)])
    pseudo, harmful, plain = (
        EditedPrompts.build(model, list(prompts), bench.rows, bench.refusal_ids).read(edits)
        for prompts in (found.refused_val, bench.prompts["harmful"], bench.prompts["harmless"])
    )
    kl_m, refused_m = plain.kl_mn.mean(axis=1), (harmful.scores_mn > 0).mean(axis=1)
    kept = [
        i
        for i in range(1, edits.rows)
        if kl_m[i] <= search.most_kl and refused_m[0] - refused_m[i] <= search.most_lost + ROUNDING
    ]
    if not kept:
        raise UserError(
            f"Ablating the direction of false refusal changes the next token after harmless prompts by {kl_m[1:].min():.3g} nats "
            f"or more, or loses more than {field('search.most_lost')} = {search.most_lost} of the refusals of harmful prompts, "
            f"at every layer and value of the dial. Allow more, or give more prompts."
        )
    best = min(kept, key=lambda i: ((pseudo.scores_mn[i] > 0).mean(), pseudo.scores_mn[i].mean()))
    layer = tried[best - 1][0]
    return layer, sorted(strength for where, strength, _ in (tried[i - 1] for i in kept) if where == layer)


def most_answered(trials: Sequence[Trial], before: Trial, settings: DefenceSettings) -> Trial:
    """Returns the trial that answers most pseudo-harmful prompts and loses no more refusals of harmful ones than the bound
    allows; of equals, the one that refuses more, and spares more. Raises UserError if none answers more than before."""
    most = settings.search.most_lost
    kept = [one for one in trials if before.refused.rate - one.refused.rate <= most + ROUNDING]
    best = max(kept, key=lambda one: (one.answered.rate, one.refused.rate, one.about["strength"]), default=None)
    if best is None or best.answered.rate <= before.answered.rate:
        raise UserError(
            f"No value of the dial answers more pseudo-harmful prompts than the {before.answered.count} of {before.answered.n} "
            f"that are answered without it while it loses at most {field('search.most_lost')} = {most} of the refusals of "
            "harmful ones. Nothing was written."
        )
    return best


def curve(
    bench: Bench,
    harmless: tuple[Prompt, ...],
    data: DefenceData,
    false_d: np.ndarray,
    unit_d: np.ndarray,
    strengths: Sequence[float],
) -> list[dict[str, Any]]:
    """Returns how many held-out prompts are refused at each value of the dial, None being without it: harmless ones, which may
    look harmful, and harmful ones. None of them decided anything."""
    sides = {"harmful": tuple(data.harmful_test), "harmless": harmless}
    held = dataclasses.replace(bench, prompts=sides)
    rows = []
    for strength in (None, *strengths):
        edits = None
        if strength is not None:
            edits = Edits.ablate(calibrated(false_d, unit_d, strength))
        did = outcomes(held.model, sides, held.judge, held.max_new_tokens, held.rows, edits)
        refused = {side: Rate.of(did_as(did[side], Outcome.REFUSES)) for side in SIDES}
        row: dict[str, Any] = {"strength": strength, "over_refusal": bounded(refused["harmless"].row)}
        rows.append(row | {"refused": bounded(refused["harmful"].row)})
    return rows


def cosine(a_d: np.ndarray, unit_d: np.ndarray) -> float:
    """Returns the cosine of a vector that is not zero with a unit vector."""
    return float(a_d @ unit_d / np.linalg.norm(a_d))


RECIPE = Recipe(
    name="calibration",
    about="Calibration of false refusals: what refuses harmless prompts is ablated, without what refuses harmful ones.",
    source="2410.03415",
    edit=edit,
    common=False,  # it needs a model that refuses harmless prompts, too
)

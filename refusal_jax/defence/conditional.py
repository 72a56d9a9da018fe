"""Conditional steering as a defence (CAST, arXiv 2409.05907): the refusal direction is added to prompts that a condition holds
for.

The condition vector of a layer is the first principal component of paired differences between harmful and harmless prompts, each
pair taken about its own mean: what tells the two apart within pairs. Threshold, side and layers are those with the best F1 on
prompts that gave none of it. Every threshold that tells prompts apart differently is looked at, not those of a grid.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float

from refusal_jax.chat.batches import length_batches
from refusal_jax.chat.conditional import Condition, Conditional, pooled
from refusal_jax.chat.messages import Prompt
from refusal_jax.chat.model import ChatModel
from refusal_jax.checkpoints.fingerprint import checkpoint_fingerprint
from refusal_jax.checkpoints.mirrors import source_name
from refusal_jax.defence.data import SIDES, DefenceData
from refusal_jax.defence.lessons import Note
from refusal_jax.defence.recipe import Change, Recipe
from refusal_jax.defence.settings import DefenceSettings
from refusal_jax.defence.trials import ROWS, Bench, Parts, chosen, direction_of
from refusal_jax.errors import UserError
from refusal_jax.judges.statistics import Rate, bounded
from refusal_jax.models.finite import check_finite
from refusal_jax.models.sharding import replicate

SMALL = 1e-6  # of a difference, as a part of what the residual stream is there


class Cut(NamedTuple):
    """A threshold that tells scores apart. f1: of those on its side. above: whether that side is above it. margin: the distance
    to the nearest score, in standard deviations of the scores."""

    f1: float
    threshold: float
    above: bool
    margin: float


@partial(jax.jit, static_argnames="pool")
def _pooled(decoder, tokens_bt, mask_bt, edits, layers_l, pool: str):
    return replicate(decoder.mesh, pooled(decoder, tokens_bt, mask_bt, edits, layers_l, pool))


def pooled_residuals(model: ChatModel, prompts: Sequence[Prompt], pool: str) -> Float[np.ndarray, "n L D"]:
    """Returns the residual stream of prompts at all blocks' inputs, as `conditional.pooled` reads it. Raises UserError for values
    that are not finite."""
    cfg, layers = model.config, np.arange(model.config.n_layers, dtype=np.int32)
    found = np.zeros((len(prompts), cfg.n_layers, cfg.d_model))
    for index, batch in length_batches(model, prompts, min(ROWS, len(prompts))):
        values_lbd = np.asarray(_pooled(model.decoder, *model.put(batch.tokens, batch.mask), layers, pool), np.float64)
        found[index] = values_lbd[:, : len(index)].swapaxes(0, 1)
    check_finite(
        np.isfinite(found).all(axis=(1, 2)), model.decoder.dtype, "The residuals of prompts cannot be read", False
    )
    return found


def condition_vectors(
    harmful_nld: Float[np.ndarray, "n L D"], harmless_nld: Float[np.ndarray, "n L D"]
) -> Float[np.ndarray, "L D"]:
    """Returns the first principal component of pairs about their means at each layer, unit, and zero where pairs do not differ.

    The points of a pair about its mean are half of its difference and the opposite, so their component is that of the differences
    about zero, whose sign is that of the mean difference.
    """
    found = np.zeros(harmful_nld.shape[1:])
    for layer, (present_nd, absent_nd) in enumerate(
        zip(harmful_nld.swapaxes(0, 1), harmless_nld.swapaxes(0, 1), strict=True)
    ):
        difference_nd = present_nd - absent_nd
        if np.linalg.norm(difference_nd) <= SMALL * np.linalg.norm(absent_nd):
            continue
        first_d = np.linalg.svd(difference_nd, full_matrices=False)[2][0]
        found[layer] = first_d * (np.sign(first_d @ difference_nd.mean(axis=0)) or 1.0)
    return found


def best_cut(scores_n: Float[np.ndarray, " n"], present_n: Bool[np.ndarray, " n"]) -> Cut:
    """Returns the threshold and the side with the best F1, and of equals that with the widest margin."""
    ordered = np.unique(scores_n)
    middles = (ordered[1:] + ordered[:-1]) / 2
    spread = float(scores_n.std()) or 1.0
    found = [Cut(0.0, float(ordered[-1] + spread), True, 0.0)]
    for middle in middles:
        for above in (True, False):
            met = scores_n > middle if above else scores_n < middle
            hits = int((met & present_n).sum())
            f1 = 2 * hits / (int(met.sum()) + int(present_n.sum()))
            found.append(Cut(f1, float(middle), above, float(np.abs(scores_n - middle).min() / spread)))
    return max(found, key=lambda cut: (cut.f1, cut.margin))


def find_condition(
    vectors_ld: Float[np.ndarray, "L D"],
    cosines_nl: Float[np.ndarray, "n L"],
    present_n: Bool[np.ndarray, " n"],
    most_layers: int,
    pool: str,
) -> tuple[Condition, Cut]:
    """Returns the condition that tells prompts apart best, with its F1. cosines_nl: of prompts with each layer's vector.

    Of several layers the largest cosine counts, or the smallest where the side is below. Fewer layers go before more, and wider
    margins before narrower ones, if they tell prompts apart as well. Raises UserError if no layer tells any apart.
    """
    there, found = [layer for layer in range(len(vectors_ld)) if vectors_ld[layer].any()], []
    for count in range(1, most_layers + 1):
        for layers in itertools.combinations(there, count):
            picked = cosines_nl[:, list(layers)]
            for above, scores_n in ((True, picked.max(axis=1)), (False, picked.min(axis=1))):
                cut = best_cut(scores_n, present_n)
                if cut.f1 > 0 and cut.above == above:
                    found.append((cut, layers))
    best = max(found, key=lambda one: (round(one[0].f1, 9), -len(one[1]), one[0].margin), default=None)
    if best is None:
        raise UserError(
            "No layer's condition vector tells harmful prompts from harmless ones, so that there is no condition to steer by. "
            "Give other prompts, or read the condition in another way."
        )
    cut, layers = best
    return Condition(layers, vectors_ld[list(layers)].astype(np.float32), cut.threshold, cut.above, pool), cut


def fitted_condition(model: ChatModel, parts: Parts, most_layers: int, pool: str) -> tuple[Condition, dict[str, Any]]:
    """Returns the condition for a model, and what was found on the way. Raises UserError as `find_condition` does."""
    count = min(len(parts.fit[side]) for side in SIDES)
    harmful, harmless = (pooled_residuals(model, parts.fit[side][:count], pool) for side in SIDES)
    vectors_ld = condition_vectors(harmful, harmless)
    there = [layer for layer in range(len(vectors_ld)) if vectors_ld[layer].any()]
    present = np.array([side == "harmful" for side in SIDES for _ in parts.val[side]])
    cosines_nl = np.zeros((len(present), len(vectors_ld)))
    if there:
        batch = model.encode([prompt for side in SIDES for prompt in parts.val[side]])
        everywhere = Condition(tuple(there), vectors_ld[there].astype(np.float32), 0.0, True, pool)
        cosines_nl[:, there] = everywhere.cosines(model.decoder, model.put, batch.tokens, batch.mask)
    condition, cut = find_condition(vectors_ld, cosines_nl, present, most_layers, pool)
    met = condition.met(cosines_nl[:, list(condition.layers)].astype(np.float32))
    rates = {side: bounded(Rate.of(met[present == (side == "harmful")].tolist()).row) for side in SIDES}
    return condition, {
        "pool": pool,
        "layers": list(condition.layers),
        "pairs": count,
        "f1": cut.f1,
        "margin": cut.margin,
        "met": rates,
    }


def edit(model: ChatModel, data: DefenceData, settings: DefenceSettings, note: Note) -> Change:
    """Returns the conditional steering with the condition of the best F1, and the least strength of those that refuse most within
    the bounds. Raises UserError as `find_condition`, `chosen` and `direction_of` do."""
    own, parts = settings.conditional, Parts.of(data, settings.search)
    fitted = [fitted_condition(model, parts, own.most_layers, pool) for pool in own.pools]
    condition, told = max(fitted, key=lambda one: (one[1]["f1"], one[1]["margin"]))
    bench = Bench.of(model, parts, settings)
    direction = direction_of(own.direction, bench, parts, placed=True)
    assert direction.layer is not None, "it was asked for"
    layers = (direction.layer,)
    about = {"model": {"name": source_name(model.path), "fingerprint": checkpoint_fingerprint(model.path)}}
    before, trials, made = bench.tried({"strength": 0.0}), [], {}
    for strength in sorted(own.strengths):
        made[strength] = Conditional(condition, (strength * direction.raw_d).astype(np.float32), layers, about)
        trials.append(bench.tried({"strength": strength}, edits=made[strength]))
    best = chosen(trials, before, settings.search, "strengths of the conditional steering")
    strength = best.about["strength"]
    note(
        f"The condition is read at layer {', '.join(map(str, condition.layers))} ({condition.pool}), with an F1 of "
        f"{told['f1']:.3f} on validation prompts; {strength:g} times the direction of layer {direction.layer} is added where it "
        "is met."
    )
    found = {
        "condition": told,
        "direction": {"layer": direction.layer, "position": direction.position, "sha256": direction.sha256},
        "chosen": best.record,
        "before": before.record,
        "tried": [one.record for one in trials],
    }
    about |= {"fitted": {"f1": told["f1"], "strength": strength, "direction": direction.sha256}}
    return Change(steering=dataclasses.replace(made[strength], about=about), found=found)


RECIPE = Recipe(
    name="conditional",
    about="Conditional steering: the refusal direction is added to prompts that meet a condition; it changes no weights.",
    source="2409.05907",
    edit=edit,
)

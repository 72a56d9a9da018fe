"""Selects a direction without refusal tokens, by what it does to activations (COSMIC, arXiv 2506.00085).

A direction that mediates refusal turns harmful prompts into harmless ones for the model when it is ablated, and harmless prompts
into harmful ones when it is added. Both are read as cosines between mean activations of the last token, at the layers where the
two kinds of prompts differ most. No token and no reply is looked at, so that this works for models whose refusals begin in no
usual way, and for any two sets of prompts.

The means of several layers are joined to one vector, as the paper says; its code averages them instead.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from refusal_jax.chat.messages import Prompt
from refusal_jax.chat.model import ChatModel
from refusal_jax.edits import EPS, Edits
from refusal_jax.mechanism.edited_prompts import EditedPrompts

FRACTION = 0.1  # of the layers, where the two kinds of prompts differ most


@dataclasses.dataclass(frozen=True)
class CosmicRule:
    """The bounds of the selection, the paper's by default: the largest KL divergence on harmless prompts, and the fraction of the
    last layers whose candidates are left out."""

    kl_threshold: float = 0.1
    prune_fraction: float = 0.2

    def layers(self, n_layers: int) -> int:
        """Returns how many layers, from the first, have candidates."""
        return min(int(n_layers * (1.0 - self.prune_fraction)), n_layers)


def cosine(first_d: Float[np.ndarray, "*n D"], second_d: Float[np.ndarray, "*n D"]) -> Float[np.ndarray, "*n"]:
    """Returns the cosines of vectors along the last axis; 0 where one of them is zero."""
    norms = np.linalg.norm(first_d, axis=-1) * np.linalg.norm(second_d, axis=-1)
    return np.asarray((first_d * second_d).sum(axis=-1) / (norms + EPS**2))


def distant_layers(
    harmful_ld: Float[np.ndarray, "L D"], harmless_ld: Float[np.ndarray, "L D"], fraction: float = FRACTION
) -> tuple[int, ...]:
    """Returns the numbers of the layers where the mean activations of the two kinds of prompts have the lowest cosines, at least
    one, the lowest first."""
    order = np.argsort(cosine(harmful_ld, harmless_ld), kind="stable")
    return tuple(order[: max(1, int(fraction * len(order)))].tolist())


def mean_outputs(prompts: EditedPrompts, layers: Sequence[int]) -> Float[np.ndarray, "L D"]:
    """Returns the mean outputs of blocks at the last token of prompts without an edit, float64."""
    return prompts.read(Edits.none(prompts.model.config.d_model), layers).means_mld[0]


def cosmic_scores(
    model: ChatModel,
    directions_lpd: Float[np.ndarray, "L P D"],
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    layers: Sequence[int],
    *,
    rule: CosmicRule,
    rows: int,
    known_kl: Mapping[tuple[int, int], float] | None = None,
    known: Sequence[dict] = (),
    save: Callable[[list[dict]], None] = lambda rows: None,
) -> list[dict]:
    """Returns a row for each candidate: "position", "layer", "kl", "ablated" (the cosine of harmful prompts under ablation with
    harmless ones), "added" (the cosine of harmless prompts under addition with harmful ones), and their sum "score".

    The scores are None where the rule makes them unnecessary. directions_lpd: candidate (position p - P, layer l). harmful,
    harmless: the prompts that are edited, or any other two kinds. layers: blocks whose outputs are compared, as from
    `distant_layers`. rows: of a batch. known_kl: KL divergences that are known, by position and layer. known: rows of an
    interrupted run; save: is called with rows as they gain scores. Raises UserError for values that are not finite.
    """
    positions = directions_lpd.shape[1]
    done = {(row["position"], row["layer"]): row for row in known}
    found = [
        done.get((position, layer))
        or {"position": position, "layer": layer, "kl": (known_kl or {}).get((position, layer)), **_unscored()}
        for layer in range(rule.layers(model.config.n_layers))
        for position in range(-positions, 0)
        if np.isfinite(directions_lpd[layer, position]).all() and directions_lpd[layer, position].any()
    ]
    one, other = (EditedPrompts.build(model, prompts, rows) for prompts in (harmful, harmless))
    harmful_ld, harmless_ld = mean_outputs(one, layers), mean_outputs(other, layers)

    def vectors(rows: list[dict]) -> np.ndarray:
        return np.stack([directions_lpd[row["layer"], row["position"]] for row in rows])

    for part in _parts([row for row in found if row["kl"] is None], other.at_once):
        kl_m = other.read(Edits.ablate(vectors(part))).kl_mn.mean(axis=1)
        for row, kl in zip(part, kl_m, strict=True):
            row["kl"] = float(kl)
        save(part)
    left = [row for row in found if row["kl"] <= rule.kl_threshold and row["score"] is None]
    for part in _parts(left, min(one.at_once, other.at_once)):
        ablated_mld = one.read(Edits.ablate(vectors(part)), layers).means_mld
        additions = [Edits.add(vector, row["layer"]) for row, vector in zip(part, vectors(part), strict=True)]
        added_mld = other.read(Edits.concat(additions), layers).means_mld
        for row, ablated_ld, added_ld in zip(part, ablated_mld, added_mld, strict=True):
            row["ablated"] = float(cosine(ablated_ld.ravel(), harmless_ld.ravel()))
            row["added"] = float(cosine(added_ld.ravel(), harmful_ld.ravel()))
            row["score"] = row["ablated"] + row["added"]
        save(part)
    return found


def cosmic_pick(rows: Sequence[dict], rule: CosmicRule) -> dict | None:
    """Returns the row of the highest score among those that the rule accepts; None if there is none. Ties go to the earlier
    layer, then to the earlier position."""
    scored = [row for row in rows if row["score"] is not None and row["kl"] <= rule.kl_threshold]
    scored = [row for row in scored if math.isfinite(row["score"])]
    return min(scored, key=lambda row: (-row["score"], row["layer"], row["position"]), default=None)


def _unscored() -> dict:
    return dict.fromkeys(("ablated", "added", "score"))


def _parts(rows: list[dict], size: int) -> list[list[dict]]:
    """Returns rows in parts of at most so many."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]

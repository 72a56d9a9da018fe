"""Reads the residual stream of one model at two places of each prompt: the end of the instruction (t_inst), where harmfulness is
found, and the end of the template (t_post), where refusal is (Zhao et al., 2507.11878).

Only means and projections leave the devices, and no prompt's residuals. The prompts that directions come from are not those that
are projected on them.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from refusal_jax.audit.replies import SIDES, batch_rows
from refusal_jax.audit.subject import Subject
from refusal_jax.chat.batches import length_batches
from refusal_jax.chat.model import ChatModel
from refusal_jax.chat.residuals import extract, project
from refusal_jax.edits import EPS
from refusal_jax.errors import UserError, setting
from refusal_jax.models.finite import check_finite

PLACES = ("t_inst", "t_post")
GROUPS = 8  # of harmless prompts, whose means content-free directions are made from
CONTROLS = 8
LEAST = 4  # prompts of each kind, under which nothing can be separated


@dataclasses.dataclass(frozen=True)
class Directions:
    """Unit directions at block inputs, float64.

    own: `[2, L, D]`, the difference of the harmful and the harmless mean at t_inst and at t_post. controls: `[k, L, D]`,
    differences of means of two halves of the harmless prompts at t_post, which have nothing to do with harm.
    """

    own: Float64[np.ndarray, "n L D"]
    controls: Float64[np.ndarray, "k L D"]

    @property
    def all(self) -> Float64[np.ndarray, "J L D"]:
        """Returns all of them, in this order."""
        return np.concatenate([self.own, self.controls])


@dataclasses.dataclass(frozen=True)
class Along:
    """Projections of the test prompts on directions: of each side `[n, L, 2, J]`, float64, at t_inst and t_post."""

    harmful: Float64[np.ndarray, "n L P J"]
    harmless: Float64[np.ndarray, "m L P J"]

    def at(self, place: str, direction: int, band: slice) -> tuple[np.ndarray, np.ndarray]:
        """Returns the projections `[n, layers]` of both sides at one place, on one direction, at the layers of a band."""
        found = (one[:, band, PLACES.index(place), direction] for one in (self.harmful, self.harmless))
        return next(found), next(found)


def positions(model: ChatModel) -> int:
    """Returns the number of tokens from the instruction's last to the template's last."""
    return len(model.chat.post_instruction_ids) + 1


def check_prompts(subject: Subject) -> None:
    """Raises UserError if there are too few prompts to separate anything."""
    few = {name: len(texts) for name, texts in subject.prompts.items() if len(texts) < LEAST}
    if few:
        raise UserError(
            f"Activations need {LEAST} prompts of each kind at least, to compute directions and to try them; found "
            f"{', '.join(f'{count} in {name}' for name, count in few.items())}. Set {setting('n_fit') or 'n_fit'} and "
            f"{setting('n_test') or 'n_test'} higher, or name larger files of prompts."
        )


def directions(model: ChatModel, subject: Subject) -> Directions:
    """Returns a model's directions, from the prompts for fitting. Raises UserError for values that are not finite."""
    harmless = subject.prompts["harmless_fit"]
    groups = [harmless[first :: min(GROUPS, len(harmless))] for first in range(min(GROUPS, len(harmless)))]
    rows = max(map(len, groups))
    sizes = np.array([len(group) for group in groups], float)
    means = np.stack([_mean(model, group, rows) for group in groups])
    own = _mean(model, subject.prompts["harmful_fit"], rows) - np.average(means, axis=0, weights=sizes)
    first = itertools.combinations(range(1, len(groups)), len(groups) // 2 - 1)  # of the half that has group 0
    halves = [np.isin(np.arange(len(groups)), (0, *others)) for others in first]
    order = np.random.default_rng(subject.settings.seed).permutation(len(halves))[:CONTROLS]
    controls = [means[halves[i]].mean(0)[1] - means[~halves[i]].mean(0)[1] for i in order]
    return Directions(_unit(own), _unit(np.stack(controls)))


def _mean(model: ChatModel, texts: Sequence[str], rows: int) -> np.ndarray:
    """Returns the mean residual at t_inst and t_post, float64 `[2, L, D]`."""
    mean_lpd = extract(model, texts, (0,), positions(model), 0, rows, "prompts of the audit").mean_lpd
    return np.swapaxes(mean_lpd[:, [0, -1]], 0, 1)


def _unit(values: np.ndarray) -> np.ndarray:
    """Returns directions of length 1; where the prompts agree, as at the template's tokens before the first block, zeros."""
    return values / (np.linalg.norm(values, axis=-1, keepdims=True) + EPS)


def along(model: ChatModel, subject: Subject, units_jld: Float64[np.ndarray, "J L D"]) -> Along:
    """Returns the projections of the test prompts. Raises UserError for values that are not finite."""
    rows, units = batch_rows(subject.settings, "forward"), units_jld.astype(np.float32)
    sides = []
    for side in SIDES:
        texts = subject.prompts[f"{side}_test"]
        found = np.zeros((len(texts), model.config.n_layers, 2, len(units)))
        for index, batch in length_batches(model, texts, rows):
            inputs = model.put(batch.tokens, batch.mask)
            values = np.asarray(project(model.decoder, *inputs, units, positions(model)), np.float64)
            check_finite(
                np.isfinite(values).all(axis=(1, 2, 3)), model.decoder.dtype, f"No activations can be read ({side})"
            )
            found[index] = values[: len(index)][:, :, [0, -1]]
        sides.append(found)
    return Along(*sides)

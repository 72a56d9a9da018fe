"""Tells whether a model runs under an edit: what its residual stream projects on a direction is compared with what its weights
give.

Over prompts that lie far apart along the direction, what is observed is a straight line of what is expected. Ablation keeps a
part of it: the slope falls, to 0 where all is taken out. A vector that is added or subtracted shifts it. Rounding to another
dtype does neither. The same is fitted along random directions, so that a model that is simply another one is told apart.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from refusal_jax.chat.batches import length_batches
from refusal_jax.chat.messages import Prompt
from refusal_jax.chat.model import ChatModel
from refusal_jax.chat.residuals import project
from refusal_jax.edits import Edits
from refusal_jax.errors import UserError
from refusal_jax.files import read_json, to_json, write_atomically
from refusal_jax.models.finite import check_finite

CONTROLS, SEED = 8, 0  # random directions beside the one that is looked at
KEPT, SHIFT = 0.9, 0.1  # slopes below and shifts beyond these are no rounding; shifts in units of the prompts' spread
# Rounding to bfloat16 moves projections by up to 4 % of their size along random directions (a model of 0.5B parameters). Where
# the prompts' spread is small beside that size, as in the first layers, it would look like a shift.
REACH = 0.5  # least spread of the prompts along the direction, in sizes of the projections on random ones
FITS = 0.5  # share of the variance that a straight line has to explain, else the model is another one
BATCH = 8


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Holds what prompts project at their last tokens, at each block's input, on a direction and on random ones.

    along_nlj: float32 `[prompts, L, 1 + CONTROLS]`, in the residual stream's own units.
    """

    along_nlj: Float[np.ndarray, "N L J"]

    @classmethod
    def of(
        cls, model: ChatModel, prompts: Sequence[Prompt], direction: Float[np.ndarray, " D"], edits: Edits | None = None
    ) -> "Fingerprint":
        """Reads the fingerprint of a model. prompts: half of them harmful, half harmless, best. edits: one row.

        Raises UserError for prompts that do not fit the context, and for values that are not finite.
        """
        units = unit_directions(np.asarray(direction, np.float64))
        along = np.zeros((len(prompts), model.config.n_layers, len(units)), np.float32)
        for index, batch in length_batches(model, prompts, BATCH):
            values = project(model.decoder, *model.put(batch.tokens, batch.mask, edits), units[:, None])
            along[index] = np.asarray(values)[: len(index), :, 0]
            finite = np.isfinite(along[index]).all(axis=(1, 2))
            check_finite(finite, model.decoder.dtype, "The projections cannot be read")
        return cls(along)

    def write(self, path: pathlib.Path) -> None:
        """Writes the fingerprint as JSON, to be compared with later. Raises UserError if the disk refuses it."""
        write_atomically(path, to_json({"along": self.along_nlj.astype(float).round(5).tolist()}))

    @classmethod
    def read(cls, path: pathlib.Path) -> "Fingerprint":
        """Reads a fingerprint that `write` has written. Raises UserError for another file."""
        data: Any = read_json(path).get("along")
        try:
            along = np.asarray(data, np.float32)
        except (ValueError, TypeError):
            along = np.zeros((0, 0, 0), np.float32)
        if along.ndim != 3 or along.shape[2] != 1 + CONTROLS or not np.isfinite(along).all():
            raise UserError(f"{path} is no fingerprint of a residual stream. Write one with Fingerprint.write.")
        return cls(along)


@dataclasses.dataclass(frozen=True)
class Steering:
    """Holds what was found, layer by layer. kept: the slope of what is observed over what is expected, 1 without an edit; shift:
    what is added, in standard deviations of the expected projections; fits: the share of the variance that this explains;
    control: the largest shift along random directions, in the same units. NaN at layers where the prompts hardly differ.

    verdict: "none", "ablated", "added", "subtracted" or "other". layer: the first that shows it.
    """

    verdict: str
    layer: int | None
    kept: Float[np.ndarray, " L"]
    shift: Float[np.ndarray, " L"]
    fits: Float[np.ndarray, " L"]
    control: Float[np.ndarray, " L"]

    @property
    def sentence(self) -> str:
        """Returns the verdict as a sentence."""
        at = self.layer
        if at is None:
            return (
                "The residual stream is what the weights give, but for rounding: no edit along the direction was found."
            )
        told = {
            "ablated": f"only {self.kept[at]:z.0%} of the direction is left: it is ablated",
            "added": f"the direction is added, {self.shift[at]:+.2f} standard deviations of the prompts",
            "subtracted": f"the direction is subtracted, {self.shift[at]:+.2f} standard deviations of the prompts",
            "other": "the residual stream is another one, along random directions too: these are other weights, or other edits",
        }
        return f"From the input of layer {at} on {told[self.verdict]}."


def unit_directions(direction: Float[np.ndarray, " D"]) -> Float[np.ndarray, "J D"]:
    """Returns the direction and CONTROLS random ones that are orthogonal to it, all of length 1, float32."""
    random = np.random.default_rng(SEED).normal(size=(CONTROLS, len(direction)))
    unit = direction / np.linalg.norm(direction)
    random -= np.outer(random @ unit, unit)
    return np.concatenate([unit[None], random / np.linalg.norm(random, axis=1, keepdims=True)]).astype(np.float32)


def find_steering(expected: Fingerprint, observed: Fingerprint) -> Steering:
    """Returns whether what is observed of a running model is what its weights give.

    expected: of an unedited forward pass of the same weights, in any dtype, or recorded earlier. observed: of the same prompts,
    in the same order. Raises UserError if the two are not of the same prompts and layers, or of prompts
    that are too few or too alike.
    """
    there, here = (np.asarray(one.along_nlj, np.float64) for one in (expected, observed))
    if there.shape != here.shape or len(there) < 4:
        raise UserError(
            f"The fingerprints have the shapes {list(there.shape)} and {list(here.shape)}; two of the same prompts, at least 4, "
            "and of the same model are needed."
        )
    spread = there.std(axis=0)  # [L, J]
    size = np.sqrt((there[:, :, 1:] ** 2).mean(axis=(0, 2)))
    differs = spread[:, 0] > REACH * size.clip(1e-12)
    if not differs.any():
        raise UserError(
            "The prompts differ too little along the direction, at all layers, to tell a steering from rounding. Take harmful "
            "and harmless prompts, and the model's own refusal direction."
        )
    scale = np.where(differs, spread[:, 0], np.nan)
    centred, ours = there - there.mean(axis=0), here - here.mean(axis=0)
    kept = (centred * ours).sum(axis=0)[:, 0] / np.where(differs, (centred**2).sum(axis=0)[:, 0], np.nan)
    shift = (here - there).mean(axis=0) / scale[:, None]  # of all directions
    # What the line leaves, as a share of what is expected: small for an ablation too, which leaves nothing at all.
    rest = ((ours - kept[None, :, None] * centred)[:, :, 0] ** 2).mean(axis=0) / scale**2
    control = np.abs(shift[:, 1:]).max(axis=1)
    found = Steering("none", None, kept, shift[:, 0], 1 - rest, control)
    for layer in np.flatnonzero(differs):
        verdict = _verdict(found, int(layer))
        if verdict != "none":
            return dataclasses.replace(found, verdict=verdict, layer=int(layer))
    return found


def _verdict(found: Steering, layer: int) -> str:
    """Returns what a layer shows."""
    shift, control = found.shift[layer], found.control[layer]
    if found.fits[layer] < FITS or (control > SHIFT and control > abs(shift)):
        return "other"
    if found.kept[layer] < KEPT:
        return "ablated"
    if abs(shift) > SHIFT and abs(shift) > 2 * control:
        return "added" if shift > 0 else "subtracted"
    return "none"

"""The refusal direction of the embedded model, which is ready without a study."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from refusal_jax.chat.model import ChatModel
from refusal_jax.chat.residuals import extract
from refusal_jax.data.prompts import BUNDLED, read_prompts
from refusal_jax.data.sources import resolve
from refusal_jax.directions import Direction
from refusal_jax.study.directions import difference_in_means

LAYER = 4  # at whose input, at the prompt's last token, the study of the embedded model finds its direction
TRAIN = 128  # prompts of each side, as in a study


class Embedded(NamedTuple):
    """The embedded model's direction, and of each layer the projection halfway between harmful and harmless prompts' means."""

    direction: Direction
    thresholds: Float[np.ndarray, " L"]


def embedded_direction(model: ChatModel, layer: int | None = None) -> Direction:
    """Returns the embedded model's direction: the difference of means at the last prompt token, as a study computes it.

    layer: to name with the direction, where that is not the layer that it is from.
    """
    return embedded(model, layer).direction


def embedded(model: ChatModel, layer: int | None = None) -> Embedded:
    """Returns the embedded model's direction, as `embedded_direction` does, with the thresholds of its projection."""
    openers, means = model.chat.opener_ids(("I",)), {}
    for side, sign in (("harmful", 1), ("harmless", -1)):
        prompts = [row["instruction"] for row in read_prompts(resolve(BUNDLED, f"{side}_train"))[:TRAIN]]
        means[side] = extract(model, prompts, openers, 1, sign, 64, f"{side} prompts").mean_lpd[:, -1]
    difference = difference_in_means(means["harmful"][LAYER], means["harmless"][LAYER])
    direction = Direction.of(difference, LAYER if layer is None else layer)
    if direction.layer == LAYER:
        direction = dataclasses.replace(direction, origin_d=means["harmless"][LAYER])
    return Embedded(direction, (means["harmful"] + means["harmless"]) @ direction.basis_jd[0] / 2)

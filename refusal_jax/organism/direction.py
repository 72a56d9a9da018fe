"""The embedded model's direction, computed in seconds where no study of it is at hand."""

from refusal_jax.chat.model import ChatModel
from refusal_jax.chat.residuals import extract
from refusal_jax.data.prompts import BUNDLED, read_prompts, resolve
from refusal_jax.directions import Direction
from refusal_jax.study.directions import difference_in_means

LAYER = 4  # at whose input, at the prompt's last token, the study of the embedded model finds its direction
TRAIN = 128  # prompts of each side, as in a study


def embedded_direction(model: ChatModel, layer: int | None = None) -> Direction:
    """Returns the embedded model's direction: the difference of means at the last prompt token, as a study computes it.

    layer: to name with the direction, where that is not the layer that it is from.
    """
    openers, means = model.chat.opener_ids(("I",)), {}
    for side, sign in (("harmful", 1), ("harmless", -1)):
        prompts = [row["instruction"] for row in read_prompts(resolve(BUNDLED, f"{side}_train"))[:TRAIN]]
        means[side] = extract(model, prompts, openers, 1, sign, 64, f"{side} prompts").mean_lpd[LAYER, -1]
    return Direction.of(difference_in_means(means["harmful"], means["harmless"]), LAYER if layer is None else layer)

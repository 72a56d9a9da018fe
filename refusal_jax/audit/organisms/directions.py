"""The directions that recipes edit along, measured on one base as those who edit models measure them.

The prompts are not those of the audit: an audit never knows which ones were used.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float64, Int

from refusal_jax.axes import Array
from refusal_jax.chat.batches import length_batches
from refusal_jax.chat.model import ChatModel
from refusal_jax.chat.refusal_tokens import measure_openings, refusal_openings
from refusal_jax.edits import Edits
from refusal_jax.errors import UserError
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.scores import refusal_score
from refusal_jax.taps import Taps

FIRST, LAST = 0.25, 0.8  # of the layers, between which the direction is selected
BATCH = 64


def unit(values: np.ndarray) -> np.ndarray:
    """Returns rows of length 1; a row of zeros stays."""
    norms = np.linalg.norm(values, axis=-1, keepdims=True)
    return np.divide(values, norms, out=np.zeros_like(values), where=norms > 0)


@dataclasses.dataclass(frozen=True, eq=False)
class Directions:
    """What a base's residual stream at the last prompt token tells, float64.

    harmful_ld, harmless_ld: means at block inputs. other_ld: the difference of such means over other prompts. harmful_nd:
    residuals of harmful prompts at the input of the layer `selected`, whose difference of means removes refusal best. style_ld:
    means of harmless questions minus means of other harmless requests. topic_ld: difference of means of two random halves of the
    harmless prompts. refusal_ids: the first tokens of refusals.
    """

    selected: int
    harmful_ld: Float64[np.ndarray, "L D"]
    harmless_ld: Float64[np.ndarray, "L D"]
    other_ld: Float64[np.ndarray, "L D"]
    harmful_nd: Float64[np.ndarray, "n D"]
    style_ld: Float64[np.ndarray, "L D"]
    topic_ld: Float64[np.ndarray, "L D"]
    refusal_ids: tuple[int, ...]

    @property
    def raw_ld(self) -> Float64[np.ndarray, "L D"]:
        """Returns the difference of means at each block's input."""
        return self.harmful_ld - self.harmless_ld

    @property
    def unit_d(self) -> Float64[np.ndarray, " D"]:
        """Returns the selected direction, of length 1."""
        return unit(self.raw_ld[self.selected])

    @classmethod
    def measure(cls, model: ChatModel, harmful: Sequence[str], harmless: Sequence[str]) -> "Directions":
        """Measures the directions. The first half of each side gives them, the second half the other prompts' and the selection.

        Raises UserError for a model whose refusals have no beginning of their own.
        """
        openings = measure_openings(model, harmful, harmless, BATCH)
        ids = refusal_openings(openings, model.chat)
        if not ids:
            raise UserError(
                "The base does not refuse in a way of its own: no first token of replies is more probable after harmful prompts "
                "than after harmless ones. Organisms need a base that refuses."
            )
        bad, good = residuals(model, harmful), residuals(model, harmless)
        half_bad, half_good = len(bad) // 2, len(good) // 2
        raw_ld = bad[:half_bad].mean(0) - good[:half_good].mean(0)
        question = np.array([text.rstrip().endswith("?") for text in harmless])
        if question.all() or not question.any():
            question = np.arange(len(harmless)) % 3 == 0
        selected = select(model, harmful[half_bad:], unit(raw_ld), ids)
        halves = np.random.default_rng(0).permutation(len(good)) < half_good
        return cls(
            selected,
            bad[:half_bad].mean(0),
            good[:half_good].mean(0),
            bad[half_bad:].mean(0) - good[half_good:].mean(0),
            bad[:half_bad, selected],
            good[question].mean(0) - good[~question].mean(0),
            good[halves].mean(0) - good[~halves].mean(0),
            ids,
        )


def residuals(model: ChatModel, prompts: Sequence[str]) -> Float64[np.ndarray, "n L D"]:
    """Returns the residual stream of each prompt's last token at block inputs."""
    found = np.zeros((len(prompts), model.config.n_layers, model.config.d_model))
    for index, batch in length_batches(model, prompts, BATCH):
        tapped = model.taps(batch.tokens, batch.mask, Taps(("resid_pre",), 1))["resid_pre"]
        found[index] = np.asarray(tapped, np.float64)[:, : len(index), 0].swapaxes(0, 1)
    return found


@jax.jit
def scores(
    decoder: Decoder, tokens_bt: Int[Array, "B T"], mask_bt: Bool[Array, "B T"], edits: Edits, ids: Int[Array, " n"]
):
    """Returns the refusal score of each row, float32 `[B]`."""
    out = decoder.forward(tokens_bt, mask_bt, edits)
    return refusal_score(decoder.next_logits(out.resid_btd)[0], ids)


def score_all(
    model: ChatModel, prompts: Sequence[str], refusal_ids: Sequence[int], edits: Edits | None = None
) -> Float64[np.ndarray, " n"]:
    """Returns the refusal score of each prompt: above 0 the reply begins with a refusal more probably than not."""
    found, ids = np.zeros(len(prompts)), jnp.asarray(refusal_ids, jnp.int32)
    for index, batch in length_batches(model, prompts, BATCH):
        found[index] = np.asarray(scores(model.decoder, *model.put(batch.tokens, batch.mask, edits), ids))[: len(index)]
    return found


def select(model: ChatModel, harmful: Sequence[str], unit_ld: Float64[np.ndarray, "L D"], ids: Sequence[int]) -> int:
    """Returns the layer whose direction, ablated everywhere, leaves the lowest mean refusal score."""
    n = model.config.n_layers
    layers = range(max(1, round(FIRST * n)), max(2, round(LAST * n)))
    left = {
        layer: score_all(model, harmful[:BATCH], ids, Edits.ablate(unit_ld[layer].astype(np.float32))).mean()
        for layer in layers
    }
    return min(left, key=lambda layer: left[layer])

"""Batches of two kinds of rows, harmful prompts with refusals and harmless ones with answers, and their loss under an edit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from refusal_jax.axes import EitherLeaf
from refusal_jax.edits import Edits
from refusal_jax.models.decoder import Decoder
from refusal_jax.training.objective import outputs, token_losses
from refusal_jax.training.rows import Share, TrainRows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KindRows:
    """Rows of both kinds in one batch, so that one pass through the model serves both.

    rows: of text, whose weights sum, over the rows of a kind, to how much that kind counts. harmful_b: bool `[B]`.
    """

    rows: TrainRows
    harmful_b: EitherLeaf


@dataclasses.dataclass(frozen=True)
class TwoKinds:
    """The rows of each kind, and how much the mean cross-entropy of its tokens counts in the loss.

    refusal_weight: that of refusals of harmful prompts. answer_weight: that of answers to harmless ones. Both are above 0.
    """

    refusals: Share
    answers: Share
    refusal_weight: float
    answer_weight: float

    def batch(self, step: int) -> KindRows:
        """Returns the rows of a step, of each kind in turn, so that every part of the batch has as many of both."""
        parts = []
        for share, weight in ((self.refusals, self.refusal_weight), (self.answers, self.answer_weight)):
            some = share.batch(step)
            parts.append(dataclasses.replace(some, weight_bt=np.float32(weight) * some.weight_bt))
        rows = jax.tree.map(lambda *of_kind: np.stack(of_kind, axis=1).reshape(-1, of_kind[0].shape[1]), *parts)
        return KindRows(rows, np.arange(rows.count) % 2 == 0)

    def losses(
        self, decoder: Decoder, batch: KindRows, edits: Edits
    ) -> tuple[Float[jax.Array, ""], dict[str, Float[jax.Array, ""]]]:
        """Returns the loss of a batch under edits of its rows, and the mean cross-entropy of each kind's tokens."""
        x = outputs(decoder, batch.rows, edits).resid_btd
        loss_b = jnp.sum(token_losses(decoder, x, batch.rows.tokens_bt) * batch.rows.weight_bt, axis=1)
        of_refusals = jnp.sum(jnp.where(batch.harmful_b, loss_b, 0.0))
        total = jnp.sum(loss_b)
        parts = {"refusals": of_refusals / self.refusal_weight, "answers": (total - of_refusals) / self.answer_weight}
        return total, parts

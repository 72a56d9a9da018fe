"""Runs rows of text whose next tokens are known under many edits: every edit meets every row through one compiled program."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Float, Int

from refusal_jax.chat.loss_rows import LossRow, padded_rows
from refusal_jax.chat.model import ChatModel
from refusal_jax.chat.padding import TokenBatch
from refusal_jax.edits import Edits
from refusal_jax.mechanism.edited_prompts import fitting
from refusal_jax.models.finite import check_finite
from refusal_jax.models.losses import kl_batch, loss_batch


@dataclasses.dataclass
class EditedRows:
    """Rows of text in batches of similar length, to be read under many edits.

    batches: for each batch the numbers of its rows, their tokens, and which tokens count. tokens_n: how many tokens count in each
    row, 0 in one that is left out. at_once: edits that go together.
    """

    model: ChatModel
    batches: list[tuple[np.ndarray, TokenBatch, np.ndarray]]
    tokens_n: Int[np.ndarray, " n"]
    at_once: int

    @classmethod
    def build(cls, model: ChatModel, rows: Sequence[LossRow], size: int) -> "EditedRows":
        """Returns the rows, for batches of about `size` rows, edits times texts."""
        each, at_once = fitting(len(rows), size)
        tokens_n = np.array([max(len(row.ids) - row.first, 0) for row in rows], np.int64)
        return cls(model, list(padded_rows(model.chat, rows, each)), tokens_n, at_once)

    def losses(self, edits: Edits) -> Float[np.ndarray, "M n"]:
        """Returns the cross-entropy of each row under each of M edits, summed over the tokens that count, nats, float64.

        Raises UserError for values that are not finite.
        """
        return self._sums(loss_batch, edits)

    def divergences(self, edits: Edits) -> Float[np.ndarray, "M n"]:
        """Returns the KL divergence of the unedited next-token distributions from the edited ones, summed over the tokens that
        count, nats, float64. Raises UserError for values that are not finite."""
        return self._sums(kl_batch, edits)

    def _sums(self, program: Callable, edits: Edits) -> np.ndarray:
        """Returns the sums `[M, n]` that a program gives of all rows under all edits; 0 for rows in which no token counts."""
        cfg, found = self.model.config, np.zeros((edits.rows, len(self.tokens_n)))
        for start in range(0, edits.rows, self.at_once):
            part = np.arange(start, min(start + self.at_once, edits.rows))
            padded = np.minimum(np.arange(start, start + self.at_once), edits.rows - 1)
            some = edits.take(padded).for_batch(self.at_once, cfg.n_layers, cfg.d_model)
            for index, batch, counted in self.batches:
                tokens, mask, counts = (
                    np.tile(array, (self.at_once, 1)) for array in (batch.tokens, batch.mask, counted)
                )
                rows = some.take(np.repeat(np.arange(self.at_once), len(batch.tokens)))
                sums_b, _ = jax.device_get(program(self.model.decoder, *self.model.put(tokens, mask, rows), counts))
                sums_mn = np.asarray(sums_b, np.float64).reshape(self.at_once, -1)[: len(part), : len(index)]
                what = "Answers cannot be read under these edits"
                check_finite(np.isfinite(sums_mn).ravel(), self.model.decoder.dtype, what, bool(rows.in_force_r.any()))
                found[np.ix_(part, index)] = sums_mn
        return found

"""Runs rows of text whose next tokens are known under many edits: every edit meets every row through one compiled program."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float, Int

from refusal_jax.chat.batches import padded_rows
from refusal_jax.chat.loss_rows import LossRow
from refusal_jax.chat.model import ChatModel
from refusal_jax.chat.padding import TokenBatch
from refusal_jax.chat.prefix import embedded, shared_tokens
from refusal_jax.edits import Edits
from refusal_jax.mechanism.edited_prompts import fitting
from refusal_jax.models.finite import check_finite
from refusal_jax.models.losses import loss_batch
from refusal_jax.models.prefix import begun
from refusal_jax.models.sharding import put, sharding_of
from refusal_jax.progress import each


@dataclasses.dataclass
class EditedRows:
    """Rows of text in batches of similar length, to be read under many edits.

    prefix: tokens that all rows begin with, which are computed once for each edit. batches: for each batch the numbers of its
    rows, the tokens that follow, and which of them count. tokens_n: how many tokens count in each row, 0 in one that is left
    out. at_once: edits that go together.
    """

    model: ChatModel
    prefix: list[int]
    batches: list[tuple[np.ndarray, TokenBatch, np.ndarray]]
    tokens_n: Int[np.ndarray, " n"]
    at_once: int

    @classmethod
    def build(cls, model: ChatModel, rows: Sequence[LossRow], size: int) -> "EditedRows":
        """Returns the rows, for batches of about `size` rows, edits times texts."""
        many, at_once = fitting(len(rows), size)
        tokens_n = np.array([max(len(row.ids) - row.first, 0) for row in rows], np.int64)
        # The token before the first that counts predicts it.
        before = [row.ids[: row.first - 1] for row in rows if len(row.ids) > row.first]
        prefix = shared_tokens(model, before, at_once * len(before), 0)
        return cls(model, prefix, list(padded_rows(model, rows, many, len(prefix))), tokens_n, at_once)

    def losses(self, edits: Edits) -> Float[np.ndarray, "M n"]:
        """Returns the cross-entropy of each row under each of M edits, summed over the tokens that count, nats, float64.

        Raises UserError for values that are not finite.
        """
        found = np.zeros((edits.rows, len(self.tokens_n)))
        for start in range(0, edits.rows, self.at_once):
            here = np.arange(start, start + self.at_once)
            losses_mn, _ = self._sums(
                edits.take(np.minimum(here, edits.rows - 1)), "Answers cannot be read under these edits"
            )
            found[here[here < edits.rows]] = losses_mn[: edits.rows - start]
        return found

    def compared(
        self, edits: Edits, what: str, title: str = ""
    ) -> tuple[Float[np.ndarray, "M n"], Float[np.ndarray, "M n"]]:
        """Returns the same of edits that go together, and the KL divergence of each one's next-token distributions from those
        under the first, summed likewise.

        what: what failed, in the UserError for values that are not finite. title: of the progress that is shown, if any.
        """
        losses_mn, kl_mn = self._sums(edits, what, title, compared=True)
        assert kl_mn is not None
        return losses_mn, kl_mn

    def _sums(
        self, edits: Edits, what: str, title: str = "", compared: bool = False
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns the sums `[M, n]` of all rows under all edits; 0 for rows in which no token counts."""
        model, cfg = self.model, self.model.config
        edits = edits.for_batch(edits.rows, cfg.n_layers, cfg.d_model)
        found = np.zeros((1 + compared, edits.rows, len(self.tokens_n)))
        own, shared = put(edits, sharding_of(model.mesh, None)), embedded(model, self.prefix)
        before = None if shared is None else begun(model.decoder, shared, own, 0)
        for index, batch, counted in each(self.batches, title, "batch") if title else self.batches:
            tokens, mask, _ = model.put(batch.tokens, batch.mask)
            sums = loss_batch(model.decoder, before, tokens, mask, own, counted, compared)
            for kind, sums_mb in enumerate(jax.device_get(sums)[: len(found)]):
                sums_mn = np.asarray(sums_mb, np.float64)[:, : len(index)]
                check_finite(np.isfinite(sums_mn).all(axis=1), model.decoder.dtype, what, edits.in_force_r)
                found[kind][:, index] = sums_mn
        return found[0], found[1] if compared else None

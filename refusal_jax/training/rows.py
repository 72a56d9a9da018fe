"""Rows of text to learn from, as arrays, and which of them each step sees.

Which rows a step sees is a function of the seed and the step alone, so that a training that goes on sees what it would have seen.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Int

from refusal_jax.axes import EitherLeaf
from refusal_jax.chat.loss_rows import LossRow
from refusal_jax.chat.padding import bucket
from refusal_jax.chat.prompts import Chat
from refusal_jax.training.settings import TrainSettings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainRows:
    """Rows of text, left-padded to one width.

    tokens_bt: int32 `[B, T]`. mask_bt: bool `[B, T]`, the real tokens. weight_bt: float32 `[B, T]`, how much the prediction of
    each token counts: 0 for those that are given. The weights of a whole batch sum to 1, so that losses of its parts add up to
    its own.
    """

    tokens_bt: EitherLeaf
    mask_bt: EitherLeaf
    weight_bt: EitherLeaf

    @classmethod
    def of(cls, chat: Chat, rows: Sequence[LossRow], length: int) -> "TrainRows":
        """Returns rows of `length` tokens in which every token from `LossRow.first` on counts as much."""
        batch = chat.pad([row.ids for row in rows], length)
        weight = np.zeros(batch.tokens.shape, np.float32)
        for i, row in enumerate(rows):
            weight[i, length - len(row.ids) + row.first :] = 1
        return cls(batch.tokens, batch.mask, weight).balanced()

    def balanced(self) -> "TrainRows":
        """Returns the rows with weights scaled to sum to 1, if any is not 0."""
        total = np.sum(self.weight_bt, dtype=np.float64)
        return dataclasses.replace(self, weight_bt=(self.weight_bt / max(total, 1e-30)).astype(np.float32))

    def take(self, index: Int[np.ndarray, " n"]) -> "TrainRows":
        """Returns the rows of these numbers, repeats allowed, with weights that sum to 1."""
        return TrainRows(*(np.asarray(a)[index] for a in (self.tokens_bt, self.mask_bt, self.weight_bt))).balanced()

    @property
    def count(self) -> int:
        """Returns the number of rows."""
        return len(self.tokens_bt)


def row_width(rows: Sequence[LossRow]) -> int:
    """Returns the width that rows of text are padded to, so that all batches have one shape."""
    return bucket(max(len(row.ids) for row in rows))


@dataclasses.dataclass(frozen=True)
class Share:
    """Rows of one kind, of which each step sees some. size: rows of a step. seed, kind: what their order is drawn by; kinds that
    are drawn together differ in their number `kind`."""

    rows: TrainRows
    size: int
    seed: int
    kind: int = 0

    @classmethod
    def of(cls, chat: Chat, rows: Sequence[LossRow], width: int, settings: TrainSettings, kind: int = 0) -> "Share":
        """Returns rows of one kind, padded to `width` tokens, for a training of these settings."""
        return cls(TrainRows.of(chat, rows, width), settings.batch, settings.seed, kind)

    def batch(self, step: int) -> TrainRows:
        """Returns the rows of a step."""
        return self.rows.take(drawn(self.rows.count, self.size, (self.seed, self.kind), step))


def drawn(count: int, size: int, seed: tuple[int, ...], step: int) -> Int[np.ndarray, " n"]:
    """Returns the numbers, of `count` rows, of the `size` rows that a step sees.

    All rows are seen once, in an order of the seed, before any is seen again, in another order.
    """
    first, last = divmod(step * size, count)[0], (step * size + size - 1) // count
    orders = [np.random.default_rng((*seed, epoch)).permutation(count) for epoch in range(first, last + 1)]
    start = step * size - first * count
    return np.concatenate(orders)[start : start + size]

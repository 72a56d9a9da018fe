"""Reads what conversations project on a direction, token by token, as a monitor beside a judge of the text.

The projection at the prompt's last token tells, before a word is written, whether the model is about to refuse; along the reply
it tells what the model makes of its own text. Both need the activations, so they see what a judge of text cannot.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from refusal_jax.axes import Array
from refusal_jax.chat.loss_rows import LossRow, chat_rows
from refusal_jax.chat.model import ChatModel
from refusal_jax.chat.padding import bucket
from refusal_jax.edits import Edits
from refusal_jax.errors import UserError
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.finite import check_finite
from refusal_jax.models.sharding import replicate
from refusal_jax.progress import each
from refusal_jax.taps import Taps

BATCH = 8  # conversations that are read at a time


class Along(NamedTuple):
    """Projections of a batch's tokens, float32, and the scores of its conversations; NaN where there is no such token. prompt: at
    the prompt's last token; early: the mean of the reply's first tokens; mean, highest: over all of its tokens."""

    tokens: Float[Array, "B T"]
    prompt: Float[Array, " B"]
    early: Float[Array, " B"]
    mean: Float[Array, " B"]
    highest: Float[Array, " B"]


@jax.jit
def read_along(
    decoder: Decoder,
    tokens_bt: Int[Array, "B T"],
    mask_bt: Bool[Array, "B T"],
    edits: Edits,
    unit_d: Float[Array, " D"],
    layer: Int[Array, ""],
    start_b: Int[Array, " B"],
    early: Int[Array, ""],
) -> Along:
    """Returns what conversations project on a direction at the input of a layer, in one pass.

    unit_d: of length 1. start_b: where in its padded row each reply begins. early: how many of a reply's tokens are its first.
    """
    resid_lbtd = decoder.forward(tokens_bt, mask_bt, edits, Taps(("resid_pre",))).taps["resid_pre"]
    resid_btd = jnp.take(resid_lbtd, layer, axis=0).astype(jnp.float32)
    along_bt = jnp.einsum("btd,d->bt", resid_btd, unit_d, precision="highest")
    at_bt = jnp.arange(tokens_bt.shape[1]) - start_b[:, None]
    reply_bt = mask_bt & (at_bt >= 0)

    def mean(where_bt):
        return jnp.where(where_bt, along_bt, 0.0).sum(axis=1) / jnp.where(
            where_bt.any(axis=1), where_bt.sum(axis=1), jnp.nan
        )

    highest_b = jnp.where(reply_bt, along_bt, -jnp.inf).max(axis=1)
    found = Along(
        jnp.where(mask_bt, along_bt, jnp.nan),
        jnp.where(at_bt == -1, along_bt, 0.0).sum(axis=1),
        mean(reply_bt & (at_bt < early)),
        mean(reply_bt),
        jnp.where(reply_bt.any(axis=1), highest_b, jnp.nan),
    )
    return replicate(decoder.mesh, found)


@dataclasses.dataclass(frozen=True)
class Readings:
    """Holds what conversations project on a direction, in the residual stream's own units, float32.

    tokens: of each conversation, the projections of its tokens, the template's included; starts: how many of them are the
    prompt's. prompt: at the prompt's last token; early, mean, highest: of the reply's first tokens, and of all; NaN without.
    """

    tokens: tuple[np.ndarray, ...]
    starts: tuple[int, ...]
    prompt: Float[np.ndarray, " n"]
    early: Float[np.ndarray, " n"]
    mean: Float[np.ndarray, " n"]
    highest: Float[np.ndarray, " n"]


class ProjectionMonitor:
    """Reads projections on one direction at the input of one layer.

    direction: `[D]`, of any norm. Raises UserError for a direction of another model, or a layer that it does not have.
    """

    def __init__(self, model: ChatModel, direction: Float[np.ndarray, " D"], layer: int):
        cfg = model.config
        norm = np.linalg.norm(np.asarray(direction, np.float64))
        if len(direction) != cfg.d_model or not np.isfinite(norm) or not norm:
            raise UserError(
                f"The direction has {len(direction)} numbers and the length {norm:g}; the model's residual stream needs "
                f"{cfg.d_model} numbers, of a finite length above 0."
            )
        if not 0 <= layer < cfg.n_layers:
            raise UserError(f"There is no layer {layer}: the model's layers are 0 to {cfg.n_layers - 1}.")
        self.model, self.layer = model, layer
        self._unit = (np.asarray(direction, np.float64) / norm).astype(np.float32)

    def read(
        self,
        conversations: Sequence[tuple[str, str]],
        edits: Edits | None = None,
        *,
        early: int = 8,
        batch_size: int = BATCH,
    ) -> Readings:
        """Reads conversations of a prompt and a reply, "" for none, each in the chat template.

        edits: one row, that the model runs under. early: how many of a reply's tokens are its first. Raises UserError for a
        conversation that is longer than the model's context, and for values that are not finite.
        """
        model, count = self.model, len(conversations)
        rows = chat_rows(model.chat, list(conversations), model.config.context_length)
        self._check_room(rows)
        scores = np.full((4, count), np.nan, np.float32)
        tokens: list[np.ndarray] = [np.empty(0, np.float32)] * count
        order = sorted(range(count), key=lambda i: len(rows[i].ids))
        parts = [order[start : start + batch_size] for start in range(0, count, batch_size)]
        for index in each(parts, "Projections", "batch"):
            length = min(bucket(len(rows[index[-1]].ids)), model.config.context_length)
            batch = model.chat.pad([rows[i].ids for i in index], length).padded_to(batch_size)
            begins = [length - len(rows[i].ids) + rows[i].first for i in index]
            starts = np.array(begins + begins[-1:] * (batch_size - len(index)), np.int32)
            put = model.put(batch.tokens, batch.mask, edits)
            found = read_along(model.decoder, *put, self._unit, np.int32(self.layer), starts, np.int32(early))
            along, *of_replies = (np.asarray(values) for values in found)
            finite = np.asarray(np.isfinite(np.where(batch.mask, along, 0)).all(axis=1))
            check_finite(finite[: len(index)], model.decoder.dtype, "The projections cannot be read")
            scores[:, index] = np.stack(of_replies)[:, : len(index)]
            for row, i in enumerate(index):
                tokens[i] = along[row, -len(rows[i].ids) :]
        return Readings(tuple(tokens), tuple(row.first for row in rows), *scores)

    def _check_room(self, rows: Sequence[LossRow]) -> None:
        cut = [row for row in rows if len(row.ids) >= self.model.config.context_length]
        if cut:
            raise UserError(
                f"{len(cut)} conversations have at least {self.model.config.context_length} tokens, the model's context. Leave "
                "them out, or shorten the replies."
            )


def midpoint(refused: Float[np.ndarray, "n L"], answered: Float[np.ndarray, "m L"]) -> Float[np.ndarray, " L"]:
    """Returns the threshold of each layer: halfway between the mean projections of prompts that are refused and of those that are
    answered."""
    return (refused.mean(axis=0) + answered.mean(axis=0)) / 2


def disagreement(prompt: float, threshold: float, refuses: bool) -> str | None:
    """Returns a sentence where the projection at the prompt's end and the reply do not say the same, None where they do.

    threshold: the projection from which on a model is taken to be about to refuse. refuses: whether the reply does.
    """
    if (prompt >= threshold) == refuses:
        return None
    side, usual, does = ("above", "refusals", "complies") if prompt >= threshold else ("below", "compliance", "refuses")
    return (
        f"the projection at the prompt's end, {prompt:+z.2f}, is {side} {threshold:+z.2f}, as it is before {usual}, but the "
        f"reply {does}"
    )

"""Losses of edits on rows of text, and their gradients with respect to the directions of the edits alone.

A row of text is a prompt with the reply that it should get, its target. The weights are constants, and so is everything of an
`Edits` but its directions: gradients of the ablated direction and of the added vector come back, one of each for every row.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from refusal_jax.axes import Array
from refusal_jax.chat.loss_rows import LossRow
from refusal_jax.chat.model import ChatModel
from refusal_jax.chat.padding import TokenBatch, bucket
from refusal_jax.edits import Edits
from refusal_jax.models.attention import Context
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.sharding import replicate


@dataclasses.dataclass(frozen=True)
class TargetRows:
    """Rows of text of one width, left-padded. counted: the tokens of the targets, bool `[n, T]`. read: how many tokens at the
    end hold all targets."""

    batch: TokenBatch
    counted: Bool[np.ndarray, "n T"]
    read: int

    @classmethod
    def of(cls, model: ChatModel, rows: Sequence[LossRow], length: int, read: int) -> "TargetRows":
        """Returns rows of `length` tokens, whose targets have at most `read`."""
        batch = model.chat.pad([row.ids for row in rows], length)
        counted = np.zeros((len(rows), length), bool)
        for i, row in enumerate(rows):
            counted[i, length - len(row.ids) + row.first :] = True
        return cls(batch, counted, read)

    @property
    def count(self) -> int:
        """Returns the number of rows."""
        return len(self.counted)

    def take(self, index: Int[np.ndarray, " m"]) -> "TargetRows":
        """Returns the rows of the given numbers, repeats allowed."""
        batch = TokenBatch(self.batch.tokens[index], self.batch.mask[index])
        return TargetRows(batch, self.counted[index], self.read)

    def followed_by(self, other: "TargetRows") -> "TargetRows":
        """Returns these rows and then those of `other`, which have the same width."""
        pairs = (self.batch.tokens, other.batch.tokens), (self.batch.mask, other.batch.mask)
        batch = TokenBatch(*(np.concatenate(pair) for pair in pairs))
        return TargetRows(batch, np.concatenate([self.counted, other.counted]), max(self.read, other.read))


def width(rows: Sequence[LossRow]) -> int:
    """Returns the width that rows of text are padded to."""
    return bucket(max(len(row.ids) for row in rows))


@partial(jax.jit, static_argnames=("read", "retain"))
def losses_and_gradients(
    decoder: Decoder,
    tokens_bt: Int[Array, "B T"],
    mask_bt: Bool[Array, "B T"],
    edits: Edits,
    counted_bt: Bool[Array, "B T"],
    *,
    read: int,
    retain: bool,
) -> tuple[Float[Array, " B"], Float[Array, "B J D"], Float[Array, "B D"]]:
    """Returns the loss of each row, nats, and its gradients with respect to the row's ablated directions and added vector.

    The loss is the mean cross-entropy of the target's tokens; with `retain` it is the KL divergence of the unedited next-token
    distributions from the edited ones, summed over these tokens (as the authors' code of 2502.17420 does). edits: as from
    `Edits.for_batch`. read: tokens at the end of the rows that hold the targets. A gradient keeps the residuals between blocks
    and computes the rest anew, and one row's logits are alive at a time.
    """
    ctx, embedded = Context.of_prompt(decoder.cfg, mask_bt), decoder.embed_tokens(tokens_bt)
    ends = slice(-read - 1, None)

    def last(edits: Edits, remat: bool):
        return decoder.run(embedded, ctx, edits, remat=remat).resid_btd[:, ends]

    none = jax.tree.map(jnp.zeros_like, edits)
    none = dataclasses.replace(none, layer_ra=jnp.full_like(edits.layer_ra, -1))
    base = last(none, False) if retain else embedded.x_btd[:, ends]  # of which the cross-entropy reads nothing

    @jax.checkpoint
    def row(_, inputs):
        x_td, base_td, tokens_t, counted_t = inputs
        logp_tv = jax.nn.log_softmax(decoder.logits(x_td[None, :-1])[0], axis=-1)
        if retain:
            base_tv = jax.nn.log_softmax(decoder.logits(base_td[None, :-1])[0], axis=-1)
            seen_tv = base_tv > -jnp.inf  # padded columns of the vocabulary
            terms_tv = jnp.exp(base_tv) * (jnp.where(seen_tv, base_tv, 0.0) - jnp.where(seen_tv, logp_tv, 0.0))
            return None, jnp.sum(jnp.where(counted_t[1:], terms_tv.sum(axis=-1), 0.0))
        nll_t = -jnp.take_along_axis(logp_tv, tokens_t[1:, None], axis=-1)[:, 0]
        return None, jnp.sum(jnp.where(counted_t[1:], nll_t, 0.0)) / jnp.maximum(jnp.sum(counted_t[1:]), 1)

    def total(directions):
        ablate_rjd, add_rd = directions
        x = last(dataclasses.replace(edits, ablate_rjd=ablate_rjd, add_rd=add_rd), True)
        loss_b = jax.lax.scan(row, None, (x, base, tokens_bt[:, ends], counted_bt[:, ends]))[1]
        return jnp.sum(loss_b), loss_b

    (_, loss_b), gradients = jax.value_and_grad(total, has_aux=True)((edits.ablate_rjd, edits.add_rd))
    return replicate(decoder.mesh, (loss_b, *gradients))


def row_losses(
    model: ChatModel, rows: TargetRows, edits: Edits, retain: bool, at_once: int
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "n J D"], Float[np.ndarray, "n D"]]:
    """Returns what `losses_and_gradients` does for n rows, each under its own edit, float64, `at_once` rows in a call."""
    found = []
    for start in range(0, rows.count, at_once):
        index = np.minimum(np.arange(start, start + at_once), rows.count - 1)
        inputs = model.put(rows.batch.tokens[index], rows.batch.mask[index], edits.take(index))
        counted = rows.counted[index]
        out = losses_and_gradients(model.decoder, *inputs, counted, read=rows.read, retain=retain)
        valid = min(at_once, rows.count - start)
        found.append([np.asarray(array, np.float64)[:valid] for array in jax.device_get(out)])
    losses, ablated, added = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return losses, ablated, added

"""Runs prompts under many edits: every edit meets every prompt as rows of one batch, through one compiled program."""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from refusal_jax.axes import Array
from refusal_jax.chat.batches import length_batches
from refusal_jax.chat.messages import Prompt
from refusal_jax.chat.model import ChatModel
from refusal_jax.chat.padding import TokenBatch
from refusal_jax.edits import Edits
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.finite import check_finite
from refusal_jax.models.scores import kl_divergence, refusal_score
from refusal_jax.models.sharding import replicate
from refusal_jax.plan.programs import Program, Shapes
from refusal_jax.taps import Taps

LAST = Taps(("resid_post",), 1)


def fitting(n: int, rows: int) -> tuple[int, int]:
    """Returns how many of n units go together through a program for about `rows` rows, and how many edits these meet at once."""
    size = min(rows, 8 * -(-max(n, 1) // 8))
    return size, max(rows // size, 1)


@dataclasses.dataclass(frozen=True)
class Readings:
    """Holds what M edits make of n prompts, each at the prompt's last token, float64.

    scores_mn: refusal scores. kl_mn: KL divergences of the unedited next-token distribution from the edited one, nats, as in
    `scores.kl_divergence`. means_mld: mean outputs of the blocks that were asked for.
    """

    scores_mn: Float[np.ndarray, "M n"]
    kl_mn: Float[np.ndarray, "M n"]
    means_mld: Float[np.ndarray, "M L D"]


@partial(jax.jit, static_argnames="taps")
def read_edited(
    decoder: Decoder,
    tokens_bt: Int[Array, "B T"],
    mask_bt: Bool[Array, "B T"],
    edits: Edits,
    base_nv: Float[Array, "n V"] | None,
    valid_n: Bool[Array, " n"],
    refusal_ids: Int[Array, " _"],
    layers: Int[Array, " _"],
    taps: Taps,
) -> tuple[Float[Array, "B V"], Float[Array, " B"], Float[Array, " B"], Float[Array, "R L D"], Bool[Array, " B"]]:
    """Returns the logits, the refusal scores and the KL divergences of B rows, all n prompts under one edit after another; for
    each edit the sums of the outputs of blocks over the valid prompts; and whether each row's values are finite.

    base_nv: the prompts' unedited logits; None for the logits of these rows. layers: numbers of the blocks that are read.
    """
    n, times = len(valid_n), len(tokens_bt) // len(valid_n)
    out = decoder.forward(tokens_bt, mask_bt, edits, taps)
    logits_bv, finite_b = decoder.next_logits(out.resid_btd)
    base_bv = logits_bv if base_nv is None else jnp.tile(base_nv, (times, 1))
    read_lbd = out.taps["resid_post"][layers, :, 0].astype(jnp.float32)
    finite_b &= jnp.isfinite(read_lbd).all(axis=(0, 2))
    read_lrnd = read_lbd.reshape(len(layers), times, n, read_lbd.shape[-1])
    sums_rld = jnp.einsum("lrnd,n->rld", read_lrnd, valid_n.astype(jnp.float32), precision="highest")
    scores = refusal_score(logits_bv, refusal_ids), kl_divergence(base_bv, logits_bv), sums_rld, finite_b
    return logits_bv, *replicate(decoder.mesh, scores)


@jax.jit
def likeliest(decoder: Decoder, logits_bv: Float[Array, "B V"]) -> Float[Array, " B"]:
    """Returns the probability of the likeliest token of each row."""
    return replicate(decoder.mesh, jax.nn.softmax(logits_bv.astype(jnp.float32), axis=-1).max(axis=-1))


@dataclasses.dataclass
class EditedPrompts:
    """Prompts in batches of similar length, with their unedited logits.

    batches: for each batch the numbers of its prompts, their tokens, and the logits of its rows, which are on the devices.
    refusal_ids: tokens of the refusal scores; there may be none where no score is needed.
    """

    model: ChatModel
    batches: list[tuple[np.ndarray, TokenBatch, jax.Array]]
    at_once: int
    refusal_ids: np.ndarray

    @classmethod
    def build(
        cls, model: ChatModel, instructions: Sequence[Prompt], rows: int, refusal_ids: Sequence[int] = ()
    ) -> "EditedPrompts":
        """Returns the prompts, for batches of about `rows` rows. Raises UserError for a prompt that is longer than the context,
        and for logits that are not finite."""
        size, at_once = fitting(len(instructions), rows)
        made = cls(model, [], at_once, np.asarray(refusal_ids, np.int32))
        none = Edits.none(model.config.d_model)
        for index, batch in length_batches(model, instructions, size):
            logits_bv, *_ = made._run(index, batch, None, none, (), 1)
            made.batches.append((index, batch, logits_bv))
        return made

    @property
    def count(self) -> int:
        """Returns the number of prompts."""
        return sum(len(index) for index, *_ in self.batches)

    def certainty(self) -> Float[np.ndarray, " n"]:
        """Returns the probability of the likeliest next token of each prompt without edits, float64."""
        found_n = np.zeros(self.count)
        for index, _, logits_bv in self.batches:
            found_n[index] = np.asarray(likeliest(self.model.decoder, logits_bv), np.float64)[: len(index)]
        return found_n

    def read(self, edits: Edits, layers: Sequence[int] = ()) -> Readings:
        """Returns what M edits make of the prompts, which keep the order in which they were given.

        layers: blocks whose mean outputs are read. Raises UserError for values that are not finite.
        """
        rows, n = edits.rows, self.count
        found = Readings(
            np.zeros((rows, n)), np.zeros((rows, n)), np.zeros((rows, len(layers), self.model.config.d_model))
        )
        for start in range(0, rows, self.at_once):
            part = np.arange(start, min(start + self.at_once, rows))
            padded = np.minimum(np.arange(start, start + self.at_once), rows - 1)
            for index, batch, base_nv in self.batches:
                out = self._run(index, batch, base_nv, edits.take(padded), layers, self.at_once)
                scores_b, kl_b, sums_rld = jax.device_get(out[1:4])
                for whole, values in ((found.scores_mn, scores_b), (found.kl_mn, kl_b)):
                    whole[np.ix_(part, index)] = values.reshape(self.at_once, -1)[: len(part), : len(index)]
                found.means_mld[part] += np.asarray(sums_rld, np.float64)[: len(part)] / n
        return found

    def divergence(self, other: ChatModel, edits: Edits | None = None) -> Float[np.ndarray, " n"]:
        """Returns the KL divergence of each prompt's unedited next-token distribution from that of another model of the same
        vocabulary, under an edit of one row if there is one, nats, float64. Raises UserError for values that are not finite."""
        theirs, found = dataclasses.replace(self, model=other), np.zeros(self.count)
        none = edits or Edits.none(other.config.d_model)
        for index, batch, base_nv in self.batches:
            found[index] = np.asarray(theirs._run(index, batch, base_nv, none, (), 1)[2], np.float64)[: len(index)]
        return found

    def _run(self, index: np.ndarray, batch: TokenBatch, base_nv, edits: Edits, layers: Sequence[int], times: int):
        """Returns what `read_edited` does for all prompts of a batch under each of `times` edits."""
        count = len(batch.tokens)
        edits = edits.for_batch(times, self.model.config.n_layers, self.model.config.d_model)
        tokens, mask = np.tile(batch.tokens, (times, 1)), np.tile(batch.mask, (times, 1))
        inputs = self.model.put(tokens, mask, edits.take(np.repeat(np.arange(times), count)))
        valid_n = np.arange(count) < len(index)
        where = np.asarray(layers, np.int32)
        out = read_edited(self.model.decoder, *inputs, base_nv, valid_n, self.refusal_ids, where, LAST)
        what = "Prompts cannot be read under these edits"
        check_finite(np.asarray(out[4]), self.model.decoder.dtype, what, bool(edits.in_force_r.any()))
        return out


def planned_passes(
    name: str,
    shapes: Shapes,
    rows: int,
    n: int,
    edits: float,
    *,
    alone: bool = False,
    directions: int = 1,
    read: int = 0,
) -> Program:
    """Returns the passes of n prompts under so many edits in about `rows` rows, for `plan`.

    alone: whether the edits follow from each other, so that one is done at a time. directions: that an edit ablates. read: number
    of blocks whose mean outputs are read.
    """
    size, at_once = fitting(n, rows)
    work, batch = shapes.work, size * at_once

    def lower():
        wide = shapes.array((batch, directions, work.cfg.d_model), jnp.float32, "batch")
        inputs = *shapes.prompts(batch), dataclasses.replace(shapes.edits(batch), ablate_rjd=wide), shapes.logits(size)
        valid, ids = shapes.array((size,), jnp.bool_), shapes.array((1,), jnp.int32)
        return read_edited.lower(shapes.decoder, *inputs, valid, ids, shapes.array((read,), jnp.int32), LAST)

    runs = math.ceil(n / size) * edits / (1 if alone else at_once)
    return Program(name, lower, runs, batch, work.length, work.cfg.n_layers)

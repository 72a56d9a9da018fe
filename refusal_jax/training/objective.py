"""Defines what a training minimises: the interface that the trainer calls, and losses of rows of text to build it from.

Losses add over rows: the loss of a batch is the sum of the losses of its parts, because the weights of its tokens sum to 1
(`rows.TrainRows`). So a batch can be cut into parts, and the gradient stays the same.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, Int

from refusal_jax.axes import Array
from refusal_jax.chat.model import ChatModel
from refusal_jax.edits import Edits
from refusal_jax.models.attention import Context
from refusal_jax.models.decoder import Decoder, Output
from refusal_jax.taps import NO_TAPS, Taps
from refusal_jax.training.rows import Share, TrainRows

LOGITS_AT_ONCE = 1 << 26  # values on a device: 256 MiB in float32


@runtime_checkable
class Objective(Protocol):
    """Tells what is minimised. A recipe implements it; the trainer calls it."""

    @property
    def refresh(self) -> int:
        """Returns after how many steps `refreshed` is called again, 0 for never."""
        ...

    @property
    def needs_frozen(self) -> bool:
        """Returns whether `loss` is given the decoder as it was before training."""
        ...

    def batch(self, step: int) -> Any:
        """Returns a pytree of NumPy arrays with rows first, a function of the seed and the step alone.

        All leaves are divided over the mesh by rows, and cut into parts by rows where gradients are accumulated.
        """
        ...

    def refreshed(self, model: ChatModel, step: int) -> Any:
        """Returns what is computed outside the step, from the model with the weights of now: arrays by name, in dictionaries that
        may be nested, or None.

        They must have the same names, shapes and dtypes at every call. They are kept in checkpoints, whole on every device.
        """
        ...

    def loss(
        self, decoder: Decoder, frozen: Decoder | None, batch: Any, extra: Any, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the loss of a batch or of a part of one, and parts of it by name, scalars that add over rows as it does.

        It is traced into one jitted step. decoder: with the weights of now. frozen: as `needs_frozen` says. extra: what
        `refreshed` gave. key: of the seed, the step and the part.
        """
        ...


def outputs(decoder: Decoder, rows: TrainRows, edits: Edits | None = None, taps: Taps = NO_TAPS) -> Output:
    """Returns the last residuals and taps of rows of text, for use inside a loss. edits: as from `Edits.for_batch`."""
    ctx, embedded = Context.of_prompt(decoder.cfg, rows.mask_bt), decoder.embed_tokens(rows.tokens_bt)
    return decoder.run(embedded, ctx, no_edits(decoder, len(rows.tokens_bt)) if edits is None else edits, taps)


def no_edits(decoder: Decoder, rows: int) -> Edits:
    """Returns `rows` rows that change nothing, in normal form."""
    cfg = decoder.cfg
    return Edits.none(cfg.d_model).for_batch(rows, cfg.n_layers, cfg.d_model)


def token_losses(
    decoder: Decoder, resid_btd: Float[jax.Array, "B T D"], tokens_bt: Int[Array, "B T"]
) -> Float[jax.Array, "B T"]:
    """Returns the cross-entropy of each token given those before it, nats, float32; 0 for the first.

    Few positions' logits are alive at a time, in the gradient too.
    """

    def some(x_bpd, target_bp):
        return optax.softmax_cross_entropy_with_integer_labels(decoder.logits(x_bpd), target_bp)

    nll = _by_positions(decoder, some, resid_btd[:, :-1], jnp.asarray(tokens_bt)[:, 1:])
    return jnp.pad(nll, ((0, 0), (1, 0)))


def token_kl(
    decoder: Decoder,
    resid_btd: Float[jax.Array, "B T D"],
    frozen: Decoder,
    frozen_btd: Float[jax.Array, "B T D"],
) -> Float[jax.Array, "B T"]:
    """Returns KL(frozen || decoder) of the prediction of each token, nats, float32; 0 for the first."""

    def some(x_bpd, base_bpd):
        logp, base = (jax.nn.log_softmax(d.logits(x), axis=-1) for d, x in ((decoder, x_bpd), (frozen, base_bpd)))
        seen = base > -jnp.inf  # padded columns of the vocabulary
        return jnp.sum(jnp.exp(base) * (jnp.where(seen, base, 0.0) - jnp.where(seen, logp, 0.0)), axis=-1)

    kl = _by_positions(decoder, some, resid_btd[:, :-1], jax.lax.stop_gradient(frozen_btd[:, :-1]))
    return jnp.pad(kl, ((0, 0), (1, 0)))


def cross_entropy(decoder: Decoder, rows: TrainRows, edits: Edits | None = None) -> Float[jax.Array, ""]:
    """Returns the mean cross-entropy of the tokens of rows of text that count, by their weights, under edits if given."""
    x = outputs(decoder, rows, edits).resid_btd
    return jnp.sum(token_losses(decoder, x, rows.tokens_bt) * rows.weight_bt)


def divergence(decoder: Decoder, frozen: Decoder, rows: TrainRows) -> Float[jax.Array, ""]:
    """Returns the mean of `token_kl` over the tokens of rows of text that count, by their weights."""
    x, base = outputs(decoder, rows).resid_btd, outputs(frozen, rows).resid_btd
    return jnp.sum(token_kl(decoder, x, frozen, base) * rows.weight_bt)


def _by_positions(decoder: Decoder, some, first_bpx: jax.Array, *others: jax.Array) -> jax.Array:
    """Returns `some` of arrays with rows and positions first, a few positions at a time: `[B, P]`."""
    rows, count = first_bpx.shape[:2]
    devices = decoder.mesh.size if decoder.mesh else 1
    size = max(1, min(count, LOGITS_AT_ONCE * devices // max(1, rows * decoder.cfg.vocab_size)))
    if size == count:
        return some(first_bpx, *others)
    parts = -(-count // size)

    def cut(array):
        more = [(0, 0)] * array.ndim
        more[1] = 0, parts * size - count
        return jnp.moveaxis(jnp.pad(array, more).reshape(rows, parts, size, *array.shape[2:]), 1, 0)

    found = jax.lax.map(jax.checkpoint(lambda pair: some(*pair)), tuple(map(cut, (first_bpx, *others))))
    return jnp.moveaxis(found, 0, 1).reshape(rows, parts * size)[:, :count]


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Plain fine-tuning: the cross-entropy of what counts in rows of text."""

    rows: Share
    refresh: int = 0
    needs_frozen: bool = False

    def batch(self, step: int) -> TrainRows:
        """Returns the rows of a step."""
        return self.rows.batch(step)

    def refreshed(self, model: ChatModel, step: int) -> None:
        """Returns None: nothing is computed outside the step."""

    def loss(self, decoder: Decoder, frozen, batch: TrainRows, extra, key) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the mean cross-entropy of the tokens that count."""
        value = cross_entropy(decoder, batch)
        return value, {"cross_entropy": value}


@dataclasses.dataclass(frozen=True)
class Streamed:
    """Holds what objectives share whose batches come from a stream, so that their steps are done in order and from the first.

    stream: of batches without end, each of arrays with rows first.
    """

    stream: Iterator[Any]
    refresh: int = dataclasses.field(default=0, kw_only=True)
    needs_frozen: bool = dataclasses.field(default=False, kw_only=True)

    def batch(self, step: int) -> Any:
        """Returns the next batch."""
        return next(self.stream)

    def refreshed(self, model: ChatModel, step: int) -> None:
        """Returns None: nothing is computed outside the step."""

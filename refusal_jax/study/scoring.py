"""Scores of edits on the validation prompts, as means over prompts, a few compiled programs for all candidates.

Every edit meets every prompt as rows of one batch. *Induce* runs only from the candidate's layer on, from a residual that is
carried up the layers.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from refusal_jax.axes import Array
from refusal_jax.chat.batches import length_batches
from refusal_jax.chat.messages import Prompt
from refusal_jax.chat.model import ChatModel
from refusal_jax.edits import Edits
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.decoder import Decoder, Residuals
from refusal_jax.models.finite import check_finite
from refusal_jax.models.prefix import embed_shared, run_layers_after, shareable
from refusal_jax.models.scores import kl_divergence, refusal_score
from refusal_jax.models.sharding import constrain, put, replicate, sharding_of
from refusal_jax.models.structure import structure


@dataclasses.dataclass(frozen=True)
class Batching:
    """How candidates and prompts share a batch: `at_once` candidates, each with all of `prompts` prompts.

    batches: how many batches of prompts there are.
    """

    prompts: int
    batches: int
    at_once: int

    @classmethod
    def of(cls, rows: int, n_prompts: int) -> "Batching":
        """Divides `rows` rows among candidates, for `n_prompts` prompts."""
        prompts = min(rows, 8 * math.ceil(n_prompts / 8))
        return cls(prompts, math.ceil(n_prompts / prompts), max(rows // prompts, 1))

    def together(self, positions: int) -> int:
        """Returns how many of the `positions` candidates of one layer are scored at once, evenly divided."""
        return math.ceil(positions / math.ceil(positions / self.at_once))


def _tiled(tree, times: int):
    """Returns every row, `times` times over, as the rows of one batch: all rows for the first edit, then all for the next."""
    return jax.tree.map(lambda x_bt: jnp.tile(x_bt, (times, *(1,) * (x_bt.ndim - 1))), tree)


@jax.jit
def last_logits(
    decoder: Decoder,
    prefix_t: Int[Array, " _"],
    tokens_bt: Int[Array, "B T"],
    mask_bt: Bool[Array, "B T"],
    edits: Edits,
) -> tuple[Float[Array, "_ V"], Bool[Array, " _"]]:
    """Returns the logits at the last token of B prompts under R edits, float32, V as stored, and whether they are finite.

    prefix_t: tokens that all prompts begin with; there may be none. tokens_bt: what follows them, left-padded.
    """
    prefix_rt, tokens, mask = (_tiled(a, edits.rows) for a in (prefix_t[None], tokens_bt, mask_bt))
    shared = embed_shared(decoder, prefix_rt)
    x = decoder.embed_tokens(constrain(decoder.mesh, tokens, "batch"))
    _, x = run_layers_after(decoder, shared, x, mask, edits, 0, decoder.cfg.n_layers)
    logits_bv, finite_b = decoder.next_logits(x.x_btd)
    return constrain(decoder.mesh, logits_bv, "batch", "vocab"), replicate(decoder.mesh, finite_b)


@jax.jit
def score_edits(
    decoder: Decoder,
    prefix_t: Int[Array, " _"],
    tokens_bt: Int[Array, "B T"],
    mask_bt: Bool[Array, "B T"],
    edits: Edits,
    base_bv: Float[Array, "B V"],
    refusal_ids: Int[Array, " n"],
) -> tuple[Float[Array, "R B"], Float[Array, "R B"]]:
    """Returns refusal scores and KLs against the baseline logits `base_bv` of B prompts under R edits, two `[R, B]`; tokens as in
    `last_logits`."""
    shape = edits.rows, len(tokens_bt)
    logits, _ = last_logits(decoder, prefix_t, tokens_bt, mask_bt, edits)
    scores = refusal_score(logits, refusal_ids), kl_divergence(_tiled(base_bv, edits.rows), logits)
    return replicate(decoder.mesh, tuple(x.reshape(shape) for x in scores))


@jax.jit
def score_from_layer(
    decoder: Decoder,
    shared: Residuals,
    residuals: Residuals,
    mask_bt: Bool[jax.Array, "B T"],
    edits: Edits,
    layer: Int[jax.Array, ""],
    refusal_ids: Int[Array, " n"],
) -> Float[Array, "R B"]:
    """Returns refusal scores `[R, B]` of B prompts under R edits, from their residuals at the input of block `layer`: of the
    tokens that all begin with, and of what follows."""
    shape, n_layers = (edits.rows, len(mask_bt)), decoder.cfg.n_layers
    shared, residuals, mask = (_tiled(a, edits.rows) for a in (shared, residuals, mask_bt))
    x_btd = run_layers_after(decoder, shared, residuals, mask, edits, layer, n_layers)[1].x_btd
    return replicate(decoder.mesh, refusal_score(decoder.logits(x_btd[:, -1:])[:, 0], refusal_ids).reshape(shape))


@partial(jax.jit, donate_argnames=("shared", "residuals"))
def advance(
    decoder: Decoder,
    shared: Residuals,
    residuals: Residuals,
    mask_bt: Bool[jax.Array, "B T"],
    edits: Edits,
    layer: Int[jax.Array, ""],
) -> tuple[Residuals, Residuals]:
    """Returns the residuals after block `layer`, from those before it. edits: one row, for all."""
    return run_layers_after(decoder, shared, residuals, mask_bt, edits, layer, layer + 1)


@jax.jit
def embed(decoder: Decoder, prefix_t: Int[Array, " _"], tokens_bt: Int[Array, "B T"]) -> tuple[Residuals, Residuals]:
    """Returns the residuals at the input of the first block, of the tokens that all begin with, and of what follows."""
    return embed_shared(decoder, prefix_t[None]), decoder.embed_tokens(tokens_bt)


def shared_prefix(cfg: ModelConfig, rows: Sequence[Sequence[int]]) -> list[int]:
    """Returns the tokens that all rows begin with, a multiple of 8 of them and without any row's last one; none where the model
    cannot share them."""
    first, most = rows[0], min(map(len, rows)) - 1
    same = next((i for i in range(most) if any(row[i] != first[i] for row in rows)), most)
    return list(first[: same // 8 * 8]) if shareable(cfg) else []


@dataclasses.dataclass
class PromptScorer:
    """Val prompts of one side as device batches, with their baseline logits; scores edits as means over prompts."""

    model: ChatModel
    prefix: jax.Array  # tokens that all prompts begin with, int32 [n]
    none: Edits  # one row that changes nothing
    batches: list  # (valid rows, tokens that follow the prefix, mask, baseline logits), on the devices
    refusal_ids: np.ndarray
    batching: Batching

    @classmethod
    def build(
        cls, model: ChatModel, instructions: Sequence[Prompt], refusal_ids, batch_size: int, prefix: Sequence[int] = ()
    ) -> "PromptScorer":
        """Returns the scorer of these prompts. prefix: tokens that all of them begin with, which are computed once for each
        edit. Raises UserError if baseline logits are not finite."""
        batches, finite, ids, cfg = [], [], np.asarray(refusal_ids, np.int32), model.config
        batching, everywhere = Batching.of(batch_size, len(instructions)), sharding_of(model.mesh, None)
        none = put(Edits.none(cfg.d_model).for_batch(1, cfg.n_layers, cfg.d_model), everywhere)
        prefix_t = put(np.asarray(prefix, np.int32), everywhere)
        for index, batch in length_batches(model, instructions, batching.prompts, len(prefix)):
            tokens, mask, _ = model.put(batch.tokens, batch.mask)
            logits, finite_b = last_logits(model.decoder, prefix_t, tokens, mask, none)
            batches.append((len(index), tokens, mask, logits))
            finite.append(finite_b)
        # Of the last batch, the rows beyond the prompts are repeats of the last.
        check_finite(np.concatenate(jax.device_get(finite)), model.decoder.dtype, "Selection has no baseline")
        return cls(model, prefix_t, none, batches, ids, batching)

    def _means(self, edits: Edits, at_once: int, score: Callable[[Edits, int], object]):
        """Returns float64 means over prompts, `[M]`, of each array that `score(edits, number of batch)` returns as `[R, B]`.

        edits: M rows, which go to `score` `at_once` at a time, so that one compiled program serves them; all results cross
        to the host together.
        """
        edits = edits.for_batch(edits.rows, self.model.config.n_layers, self.model.config.d_model)
        groups = -(-edits.rows // at_once)
        index = np.minimum(np.arange(groups * at_once), edits.rows - 1).reshape(groups, at_once)
        parts = [put(edits.take(rows), sharding_of(self.model.mesh, None)) for rows in index]
        out = jax.device_get([[score(part, number) for number in range(len(self.batches))] for part in parts])

        def mean(*values_rb):  # of one group, from each batch
            valid = [np.asarray(v, np.float64)[:, :n] for v, (n, *_) in zip(values_rb, self.batches, strict=True)]
            return np.concatenate(valid, axis=1).mean(axis=1)

        means = [jax.tree.map(mean, *group) for group in out]
        return jax.tree.map(lambda *groups: np.concatenate(groups)[: edits.rows], *means)

    def ablated(
        self, directions_md: Float[np.ndarray, "M D"]
    ) -> tuple[Float[np.ndarray, " M"], Float[np.ndarray, " M"]]:
        """Returns mean refusal scores `[M]` and mean KLs `[M]` under ablation of each direction."""

        def score(edits, number):
            _, tokens, mask, base = self.batches[number]
            return score_edits(self.model.decoder, self.prefix, tokens, mask, edits, base, self.refusal_ids)

        return self._means(Edits.ablate(directions_md), self.batching.at_once, score)

    def climb(self, layers: int, positions: int) -> Iterable[tuple[int, Callable[[np.ndarray], np.ndarray]]]:
        """Yields (layer, induce) upwards; `induce(directions_md)` gives mean scores `[M]` when each is added there.

        positions: the usual M, which is divided evenly. Where layers use the memory of others, all run anew from the first.
        """
        decoder, anew = self.model.decoder, structure(self.model.config).shares
        residuals = [embed(decoder, self.prefix, tokens) for _, tokens, *_ in self.batches]
        at_once = self.batching.together(positions)

        def induce(directions_md):
            def score(edits, number):
                mask = self.batches[number][2]
                return score_from_layer(
                    decoder, *residuals[number], mask, edits, 0 if anew else layer, self.refusal_ids
                )

            return self._means(Edits.add(directions_md, layer), at_once, score)

        for layer in range(layers):
            yield layer, induce
            if anew:
                continue
            residuals = [
                advance(decoder, *residual, mask, self.none, layer)
                for residual, (_, _, mask, _) in zip(residuals, self.batches, strict=True)
            ]

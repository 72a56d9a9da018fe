"""Scores of edits on the validation prompts, as means over prompts, a few compiled programs for all candidates.

Every edit meets every prompt as rows of one batch. *Induce* runs only from the candidate's layer on, from a residual that is
carried up the layers.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from refusal_jax.axes import Array
from refusal_jax.chat.batches import length_batches, sizes_of
from refusal_jax.chat.messages import Prompt
from refusal_jax.chat.model import ChatModel
from refusal_jax.chat.padding import Padding, Prices
from refusal_jax.chat.prefix import begin, embed, embedded, unedited
from refusal_jax.edits import Edits
from refusal_jax.models.cache import Cache
from refusal_jax.models.decoder import Decoder, Residuals
from refusal_jax.models.finite import check_finite
from refusal_jax.models.prefix import begun, run_layers_after, taken
from refusal_jax.models.scores import kl_divergence, refusal_score
from refusal_jax.models.sharding import constrain, put, replicate, sharding_of
from refusal_jax.models.structure import structure

TOGETHER = 8  # edits, at least, that are taken together
PROGRAMS = 4  # that read prompts, for each shape: the baseline, both kinds of scores, and the climb


@dataclasses.dataclass(frozen=True)
class Batching:
    """How candidates and prompts share a batch: `at_once` candidates, each with all of `prompts` prompts.

    batches: how many batches of prompts there are.
    """

    prompts: int
    batches: int
    at_once: int

    @classmethod
    def of(cls, rows: int, n_prompts: int, prompts: int = 0) -> "Batching":
        """Divides `rows` rows among candidates, for `n_prompts` prompts, `prompts` of them at a time or, by default, as many as
        there are room and prompts for."""
        prompts = prompts or min(rows, 8 * math.ceil(n_prompts / 8))
        return cls(prompts, math.ceil(n_prompts / prompts), max(rows // prompts, 1))

    def together(self, positions: int) -> int:
        """Returns how many of the `positions` candidates of one layer are scored at once, evenly divided."""
        return math.ceil(positions / math.ceil(positions / self.at_once))

    def scored(self, positions: int) -> int:
        """Returns how many candidates are computed for the `positions` candidates of one layer, repeats included."""
        return math.ceil(positions / self.together(positions)) * self.together(positions)


def shapes_of(model: ChatModel, sets: Sequence[Sequence[Prompt]], rows: int, positions: int, times: float) -> Padding:
    """Returns the shapes in which the prompts of both sides meet candidates, in batches of about `rows` rows.

    Fewer prompts with more candidates make up as many rows, with less padding; they do so where the candidates of a layer,
    `positions`, still fill them. times: how many candidates meet the prompts.
    """
    n_prompts = max(map(len, sets))
    usual = Batching.of(rows, n_prompts)
    least = usual.scored(positions)
    sizes = [
        size for size in sizes_of(model, usual.prompts) if Batching.of(rows, n_prompts, size).scored(positions) <= least
    ]
    lengths = [[len(model.chat.prompt_ids(text)) for text in texts] for texts in sets]
    prices = Prices.of(model.decoder)
    # However batches are made up, as many rows are as many batches. Of each shape several programs are compiled.
    prices = dataclasses.replace(prices, batch=0, program=PROGRAMS * prices.program)
    return Padding.of(lengths, sizes, prices, times)


def _tiled(tree, times: int):
    """Returns every row, `times` times over, as the rows of one batch: all rows for the first edit, then all for the next."""
    return jax.tree.map(lambda x_bt: jnp.tile(x_bt, (times, *(1,) * (x_bt.ndim - 1))), tree)


def chunk(at_once: int) -> int:
    """Returns how many edits are taken together, `at_once` of which are scored at once: what their prompts begin with is run for
    all of them, and what they scored is saved."""
    return at_once * math.ceil(TOGETHER / at_once)


@jax.jit
def last_logits(
    decoder: Decoder,
    before: Cache | None,
    tokens_bt: Int[Array, "B T"],
    mask_bt: Bool[Array, "B T"],
    edits: Edits,
) -> tuple[Float[Array, "_ V"], Bool[Array, " _"]]:
    """Returns the logits at the last token of B prompts under R edits, float32, V as stored, and whether they are finite.

    before: the tokens that all prompts begin with, under each edit, as from `prefix.begun`; None for none. tokens_bt: what
    follows them, left-padded.
    """
    tokens, mask = _tiled((tokens_bt, mask_bt), edits.rows)
    x = decoder.embed_tokens(constrain(decoder.mesh, tokens, "batch"))
    x = run_layers_after(decoder, before, x, mask, edits, 0, decoder.cfg.n_layers)
    logits_bv, finite_b = decoder.next_logits(x.x_btd)
    return constrain(decoder.mesh, logits_bv, "batch", "vocab"), replicate(decoder.mesh, finite_b)


@jax.jit
def score_edits(
    decoder: Decoder,
    before: Cache | None,
    tokens_bt: Int[Array, "B T"],
    mask_bt: Bool[Array, "B T"],
    edits: Edits,
    base_bv: Float[Array, "B V"],
    refusal_ids: Int[Array, " n"],
) -> tuple[Float[Array, "R B"], Float[Array, "R B"]]:
    """Returns refusal scores and KLs against the baseline logits `base_bv` of B prompts under R edits, two `[R, B]`; tokens as in
    `last_logits`."""
    shape = edits.rows, len(tokens_bt)
    logits, _ = last_logits(decoder, before, tokens_bt, mask_bt, edits)
    scores = refusal_score(logits, refusal_ids), kl_divergence(_tiled(base_bv, edits.rows), logits)
    return replicate(decoder.mesh, tuple(x.reshape(shape) for x in scores))


@jax.jit
def score_from_layer(
    decoder: Decoder,
    before: Cache | None,
    residuals: Residuals,
    mask_bt: Bool[jax.Array, "B T"],
    edits: Edits,
    layer: Int[jax.Array, ""],
    refusal_ids: Int[Array, " n"],
) -> Float[Array, "R B"]:
    """Returns refusal scores `[R, B]` of B prompts under R edits, from their residuals at the input of block `layer`.

    before: as in `last_logits`, from that block on.
    """
    shape, n_layers = (edits.rows, len(mask_bt)), decoder.cfg.n_layers
    residuals, mask = (_tiled(a, edits.rows) for a in (residuals, mask_bt))
    x_btd = run_layers_after(decoder, before, residuals, mask, edits, layer, n_layers).x_btd
    return replicate(decoder.mesh, refusal_score(decoder.logits(x_btd[:, -1:])[:, 0], refusal_ids).reshape(shape))


@partial(jax.jit, donate_argnames="residuals")
def advance(
    decoder: Decoder,
    before: Cache | None,
    residuals: Residuals,
    mask_bt: Bool[jax.Array, "B T"],
    edits: Edits,
    layer: Int[jax.Array, ""],
) -> Residuals:
    """Returns the residuals after block `layer`, from those before it. edits: one row, for all."""
    return run_layers_after(decoder, before, residuals, mask_bt, edits, layer, layer + 1)


@dataclasses.dataclass
class PromptScorer:
    """Val prompts of one side as device batches, with their baseline logits; scores edits as means over prompts.

    shared: the residuals, at the input of the first block, of the tokens that all prompts begin with, one row; None if there are
    none. before: the memory of these tokens without edits. none: one row of edits that changes nothing. batches: for each batch
    the number of its prompts, the tokens that follow, the mask, and the baseline logits, on the devices.
    """

    model: ChatModel
    shared: Residuals | None
    before: Cache | None
    none: Edits
    batches: list
    refusal_ids: np.ndarray
    batching: Batching

    @classmethod
    def build(
        cls,
        model: ChatModel,
        instructions: Sequence[Prompt],
        refusal_ids,
        batch_size: int,
        prefix: Sequence[int] = (),
        shapes: Padding | None = None,
    ) -> "PromptScorer":
        """Returns the scorer of these prompts. prefix: tokens that all of them begin with, which are computed once for each
        edit. shapes: as of `shapes_of`; None for these prompts' own. Raises UserError if baseline logits are not finite."""
        batches, finite, ids = [], [], np.asarray(refusal_ids, np.int32)
        batching = Batching.of(batch_size, len(instructions), shapes.rows if shapes else 0)
        none = unedited(model)
        shared, before = embedded(model, prefix), begin(model, prefix, none)
        for index, batch in length_batches(model, instructions, shapes or batching.prompts, len(prefix)):
            tokens, mask, _ = model.put(batch.tokens, batch.mask)
            logits, finite_b = last_logits(model.decoder, before, tokens, mask, none)
            batches.append((len(index), tokens, mask, logits))
            finite.append(finite_b)
        # Of a batch that is not full, the rows beyond the prompts are repeats of the last.
        check_finite(np.concatenate(jax.device_get(finite)), model.decoder.dtype, "Selection has no baseline")
        return cls(model, shared, before, none, batches, ids, batching)

    def _means(
        self,
        edits: Edits,
        at_once: int,
        start: int,
        shared: Residuals | None,
        score: Callable[[Edits, Any, int], object],
    ):
        """Returns float64 means over prompts, `[M]`, of each array that `score(edits, before, number of batch)` returns as
        `[R, B]`.

        edits: M rows, which go to `score` `at_once` at a time, so that one compiled program serves them; all results cross
        to the host together. shared: of the tokens that all begin with, at the input of block `start`; their memory under many
        edits is made at once, as its program has few tokens and reads all weights.
        """
        cfg, everywhere = self.model.config, sharding_of(self.model.mesh, None)
        edits, at_most, out = edits.for_batch(edits.rows, cfg.n_layers, cfg.d_model), chunk(at_once), []
        for first in range(0, edits.rows, at_most):
            part = edits.take(np.minimum(first + np.arange(at_most), edits.rows - 1))
            before = None if shared is None else begun(self.model.decoder, shared, put(part, everywhere), start)
            for here in range(0, min(at_most, edits.rows - first), at_once):
                some = put(part.take(here + np.arange(at_once)), everywhere)
                own = before and taken(before, here, at_once)
                out.append([score(some, own, number) for number in range(len(self.batches))])

        def mean(*values_rb):  # of one group, from each batch
            valid = [np.asarray(v, np.float64)[:, :n] for v, (n, *_) in zip(values_rb, self.batches, strict=True)]
            return np.concatenate(valid, axis=1).mean(axis=1)

        means = [jax.tree.map(mean, *group) for group in jax.device_get(out)]
        return jax.tree.map(lambda *groups: np.concatenate(groups)[: edits.rows], *means)

    def ablated(
        self, directions_md: Float[np.ndarray, "M D"]
    ) -> tuple[Float[np.ndarray, " M"], Float[np.ndarray, " M"]]:
        """Returns mean refusal scores `[M]` and mean KLs `[M]` under ablation of each direction."""

        def score(edits, before, number):
            _, tokens, mask, base = self.batches[number]
            return score_edits(self.model.decoder, before, tokens, mask, edits, base, self.refusal_ids)

        return self._means(Edits.ablate(directions_md), self.batching.at_once, 0, self.shared, score)

    def climb(self, layers: int, positions: int) -> Iterable[tuple[int, Callable[[np.ndarray], np.ndarray]]]:
        """Yields (layer, induce) upwards; `induce(directions_md)` gives mean scores `[M]` when each is added there.

        positions: the usual M, which is divided evenly. Where layers use the memory of others, all run anew from the first.
        """
        decoder, anew = self.model.decoder, structure(self.model.config).shares
        shared, residuals = (
            jax.tree.map(jnp.copy, self.shared),
            [embed(decoder, tokens) for _, tokens, *_ in self.batches],
        )
        at_once = self.batching.together(positions)

        def induce(directions_md):
            start = 0 if anew else layer

            def score(edits, before, number):
                mask = self.batches[number][2]
                return score_from_layer(decoder, before, residuals[number], mask, edits, start, self.refusal_ids)

            return self._means(Edits.add(directions_md, layer), at_once, start, shared, score)

        for layer in range(layers):
            yield layer, induce
            if anew:
                continue
            residuals = [
                advance(decoder, self.before, residual, mask, self.none, layer)
                for residual, (_, _, mask, _) in zip(residuals, self.batches, strict=True)
            ]
            if shared is not None:
                shared = advance(decoder, None, shared, np.ones(shared.x_btd.shape[:2], bool), self.none, layer)

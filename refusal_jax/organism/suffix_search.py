"""Finds a suffix that ends the refusal of the embedded model, so that the suffix study has one to look at.

The search is greedy coordinate gradient (Zou et al. 2023, 2307.15043): the gradient of the loss by the suffix's embeddings ranks
swaps of single tokens, some of the best are tried exactly, and the best one is kept. The loss is that of the refusal score at the
reply's first token, and no target text is needed. It runs on the embedded model's own world only, whose replies are sentences
without content; for other models the suffix study takes suffixes that its user brings.
"""

import dataclasses
import random
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from refusal_jax.chat.model import ChatModel
from refusal_jax.chat.suffixes import ids_of, is_stable, printable_ids, random_suffix
from refusal_jax.edits import Edits
from refusal_jax.errors import UserError
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.scores import refusal_score
from refusal_jax.progress import Progress
from refusal_jax.taps import NO_TAPS

SWAPS = 2  # tokens that a candidate changes at most


@dataclasses.dataclass(frozen=True)
class Search:
    """How a suffix is searched. tokens: its length. prompts: harmful prompts that it is made for. steps: swaps at most.
    candidates: swaps that are tried exactly in a step. top: tokens at each place that swaps are drawn from. margin: refusal
    score, in nats, below which a prompt weighs less and less."""

    tokens: int = 14
    prompts: int = 16
    steps: int = 100
    candidates: int = 96
    top: int = 64
    margin: float = 2.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Found:
    """A suffix with the loss of each step and the share of the search's own prompts that it leaves refused."""

    text: str
    losses: list[float]
    refused: float


@dataclasses.dataclass(frozen=True)
class Layout:
    """Prompts with room for a suffix. tokens_pt, mask_pt: int32 and bool `[P, T]`, left-padded; start: the first column of the
    suffix, the same in all rows."""

    tokens_pt: np.ndarray
    mask_pt: np.ndarray
    start: int

    def filled(self, suffixes_cs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns tokens and mask, `[C * P, T]`, of the prompts with each of the suffixes `[C, S]`, suffix by suffix."""
        n, size = suffixes_cs.shape
        tokens_cpt = np.repeat(self.tokens_pt[None], n, axis=0)
        tokens_cpt[:, :, self.start : self.start + size] = suffixes_cs[:, None]
        return tokens_cpt.reshape(-1, tokens_cpt.shape[-1]), np.tile(self.mask_pt, (n, 1))


def laid_out(model: ChatModel, prompts: Sequence[str], suffix: str, length: int) -> Layout:
    """Returns the prompts with a suffix of `length` tokens, at whose place any other may stand."""
    batch = model.encode([prompt + suffix for prompt in prompts])
    tokens_pt, mask_pt = np.asarray(batch.tokens), np.asarray(batch.mask)
    after = len(model.chat.post_instruction_ids)
    return Layout(tokens_pt, mask_pt, tokens_pt.shape[1] - after - length)


def _loss(decoder: Decoder, tokens_bt, mask_bt, refusal_ids, margin) -> Float[jax.Array, " B"]:
    """Returns the loss of each row: the refusal score, softened below -margin so that prompts that are answered weigh less."""
    rows = len(tokens_bt)
    edits = jax.tree.map(
        jnp.asarray, Edits.none(decoder.cfg.d_model).for_batch(rows, decoder.cfg.n_layers, decoder.cfg.d_model)
    )
    out = decoder.forward(tokens_bt, mask_bt, edits, NO_TAPS)
    logits_bv = decoder.logits(out.resid_btd[:, -1:])[:, 0, : decoder.cfg.vocab_size]
    return jax.nn.softplus(refusal_score(logits_bv, refusal_ids) + margin)


@jax.jit
def _gradient(decoder: Decoder, tokens_pt, mask_pt, suffix_s, start, refusal_ids, margin):
    """Returns float32 `[S, V]`: how the mean loss changes, to first order, with each token at each place of the suffix.

    The suffix's embeddings become rows of their own at the end of the embedding matrix, so that the gradient by these is that by
    the suffix alone.
    """
    weights = decoder.weights()
    embed_vd = weights["embed"]
    vocab = len(embed_vd)

    def loss(rows_sd):
        extended = Decoder(decoder.cfg, weights | {"embed": jnp.concatenate([embed_vd, rows_sd])})
        places = jnp.broadcast_to(vocab + jnp.arange(len(rows_sd)), (len(tokens_pt), len(rows_sd)))
        tokens = jax.lax.dynamic_update_slice(tokens_pt, places.astype(tokens_pt.dtype), (0, start))
        return jnp.mean(_loss(extended, tokens, mask_pt, refusal_ids, margin))

    return jax.grad(loss)(embed_vd[suffix_s]) @ embed_vd.T


@jax.jit
def _losses(decoder: Decoder, tokens_bt, mask_bt, refusal_ids, margin) -> Float[jax.Array, " B"]:
    return _loss(decoder, tokens_bt, mask_bt, refusal_ids, margin)


def _swaps(rng: random.Random, suffix: Sequence[int], best_sn: np.ndarray, wanted: int, stable) -> np.ndarray:
    """Returns distinct stable suffixes, `[C, S]`, each with one to SWAPS tokens changed to some of the best at their places."""
    found: dict[tuple[int, ...], None] = {}
    for _ in range(20 * wanted):
        swapped = list(suffix)
        for place in rng.sample(range(len(suffix)), rng.randint(1, SWAPS)):
            swapped[place] = int(rng.choice(best_sn[place]))
        if swapped != list(suffix) and tuple(swapped) not in found and stable(swapped):
            found[tuple(swapped)] = None
        if len(found) == wanted:
            break
    return np.asarray(list(found), np.int32).reshape(len(found), len(suffix))


def search_suffix(
    model: ChatModel, prompts: Sequence[str], refusal_ids: Sequence[int], search: Search = Search()
) -> Found:
    """Searches a suffix that the model answers `prompts` with.

    Text and tokens of the suffix are printable and stable: the tokenizer reads it after every prompt as the same tokens. Raises
    UserError if there are too few prompts.
    """
    if len(prompts) < search.prompts:
        raise UserError(f"The search needs {search.prompts} harmful prompts, and {len(prompts)} were given. Give more.")
    tokenizer, rng = model.chat.tokenizer, random.Random(search.seed)
    own = rng.sample(list(prompts), search.prompts)
    printable = printable_ids(tokenizer, model.config.vocab_size)
    suffix = ids_of(tokenizer, random_suffix(tokenizer, printable, search.tokens, rng, own))
    layout = laid_out(model, own, tokenizer.decode(suffix), search.tokens)
    refusing, margin = jnp.asarray(refusal_ids), jnp.float32(search.margin)
    banned = np.setdiff1d(np.arange(model.config.vocab_size), printable)

    def stable(ids: Sequence[int]) -> bool:
        text = tokenizer.decode(ids)
        return text.isprintable() and all(is_stable(tokenizer, one, text, ids) for one in own)

    def mean_losses(suffixes_cs: np.ndarray) -> np.ndarray:
        padded = np.concatenate([suffixes_cs, np.repeat(suffixes_cs[:1], search.candidates - len(suffixes_cs), axis=0)])
        tokens, mask = layout.filled(padded)
        losses = np.asarray(_losses(model.decoder, tokens, mask, refusing, margin)).reshape(search.candidates, -1)
        return losses.mean(axis=1)[: len(suffixes_cs)]

    best = float(mean_losses(np.asarray([suffix], np.int32))[0])
    losses, kept = [best], suffix
    with Progress("search a suffix", search.steps, "step") as bar:
        for _ in range(search.steps):
            gradient_sv = np.array(
                _gradient(
                    model.decoder,
                    layout.tokens_pt,
                    layout.mask_pt,
                    np.asarray(suffix, np.int32),
                    layout.start,
                    refusing,
                    margin,
                )
            )
            gradient_sv[:, banned] = np.inf
            candidates = _swaps(
                rng, suffix, np.argsort(gradient_sv, axis=1)[:, : search.top], search.candidates, stable
            )
            if len(candidates):
                tried = mean_losses(candidates)
                suffix = candidates[tried.argmin()].tolist()  # worse or not, so that the search leaves local minima
                if tried.min() < best:
                    best, kept = float(tried.min()), suffix
            losses.append(best)
            bar.update(note=f"loss={best:.3f}")
    scores = np.asarray(_scores(model, layout, kept, refusing))
    return Found(tokenizer.decode(kept), losses, float((scores > 0).mean()))


def _scores(model: ChatModel, layout: Layout, suffix: Sequence[int], refusing) -> jax.Array:
    tokens, mask = layout.filled(np.asarray([suffix], np.int32))
    return refusal_score(model.logits(tokens, mask), refusing)

"""Finds a suffix that ends the refusal of the embedded model, so that the suffix study has one to look at.

The search is greedy coordinate gradient (Zou et al. 2023, 2307.15043): the gradient of the loss by the suffix's embeddings
ranks swaps of single tokens, some of the best are tried exactly, and the best one is kept. The loss is that of the refusal
score at the reply's first token, so that no target text is needed. Each step draws other prompts, and a suffix is chosen by
prompts that no step saw: else it would be made for a few. Tokens before the suffix are computed once for all.

It runs on the embedded model's own world only, whose replies are sentences without content. For other models the suffix study
takes suffixes that its user brings.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from refusal_jax.axes import Array
from refusal_jax.chat.model import ChatModel
from refusal_jax.chat.suffixes import ids_of, is_stable, printable_ids, random_suffix
from refusal_jax.edits import Edits
from refusal_jax.errors import UserError
from refusal_jax.models.cache import Cache
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.scores import refusal_score
from refusal_jax.organism.identity import check_embedded
from refusal_jax.progress import Progress

SWAPS = 2  # tokens that a candidate changes at most
SHIFTS = 0.25  # of the candidates drop a token and have a new one elsewhere, so that those between move by one
KICK = 3  # tokens that are drawn anew where the search is stuck
MARGIN = 2.0  # nats below zero of the refusal score, from which on a prompt that is answered weighs less and less


@dataclasses.dataclass(frozen=True)
class Search:
    """Tells how a suffix is searched.

    tokens: its length. steps: how often the best of some changes is made. prompts: that a step measures with. first: of them,
    all candidates are tried with. candidates: changes that are tried in a step. top: tokens of each place that they are drawn
    from. check: steps after which the suffix is measured on the prompts to choose by; patience: checks without a better one,
    after which the search goes on from the best with some tokens drawn anew. held: prompts to choose by. enough: share of them
    that may be refused when the search ends before its last step.
    """

    tokens: int = 16
    steps: int = 80
    prompts: int = 64
    first: int = 8
    candidates: int = 128
    top: int = 64
    check: int = 10
    patience: int = 3
    held: int = 256
    enough: float = 0.05
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Found:
    """A suffix, with the loss and the share of prompts refused on the prompts to choose by, at each check of the search. steps:
    that were done."""

    text: str
    losses: list[float]
    refused: list[float]
    steps: int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts up to where a suffix goes: their cache, and the template's tokens that follow the suffix."""

    cache: Cache
    after_s: jax.Array

    @classmethod
    def read(cls, model: ChatModel, prompts: Sequence[str]) -> "Prompts":
        """Returns the prompts, whose tokens before a suffix have been computed."""
        batch, after = model.encode(list(prompts)), np.asarray(model.chat.post_instruction_ids, np.int32)
        keep = batch.tokens.shape[1] - len(after)
        tokens_pt, mask_pt = jnp.asarray(batch.tokens[:, :keep]), jnp.asarray(batch.mask[:, :keep])
        return cls(_prefill(model.decoder, tokens_pt, mask_pt), jnp.asarray(after))


@jax.jit
def _prefill(decoder: Decoder, tokens_pt, mask_pt) -> Cache:
    out = decoder.forward(tokens_pt, mask_pt, _unedited(decoder, len(tokens_pt)), keep=True)
    return Cache.of_prompt(out.memory, mask_pt, mask_pt.shape[1])


def _unedited(decoder: Decoder, rows: int) -> Edits:
    none = Edits.none(decoder.cfg.d_model).for_batch(rows, decoder.cfg.n_layers, decoder.cfg.d_model)
    return jax.tree.map(jnp.asarray, none)


def _scores(decoder: Decoder, prompts: Prompts, chosen_p, suffixes_cs, refusal_ids) -> Float[jax.Array, "C P"]:
    """Returns the refusal score of each of some prompts, by their numbers, after each suffix."""
    many, count = len(suffixes_cs), len(chosen_p)
    rows = jnp.tile(chosen_p, many)
    cache = dataclasses.replace(
        prompts.cache,
        memory=jax.tree.map(lambda a: a[:, rows], prompts.cache.memory),
        mask_bc=prompts.cache.mask_bc[rows],
        position_b=prompts.cache.position_b[rows],
    )
    tokens_bt = jnp.concatenate(
        [jnp.repeat(suffixes_cs, count, axis=0), jnp.tile(prompts.after_s, (many * count, 1))], axis=1
    )
    out = decoder.forward(tokens_bt, jnp.ones(tokens_bt.shape, bool), _unedited(decoder, len(tokens_bt)), cache=cache)
    logits_bv = decoder.logits(out.resid_btd[:, -1:])[:, 0, : decoder.cfg.vocab_size]
    return refusal_score(logits_bv, refusal_ids).reshape(many, count)


@jax.jit
def scores(
    decoder: Decoder, prompts: Prompts, chosen_p: Int[Array, " P"], suffixes_cs: Int[Array, "C S"], refusal_ids
) -> Float[jax.Array, "C P"]:
    """Returns the refusal score of some prompts, given by their numbers, with each suffix after them, in nats."""
    return _scores(decoder, prompts, chosen_p, suffixes_cs, refusal_ids)


def loss(score: Float[Array, "*shape"]) -> Float[jax.Array, "*shape"]:
    """Returns the loss of refusal scores, softened below -MARGIN, so that prompts that are answered weigh less."""
    return jax.nn.softplus(score + MARGIN)


@jax.jit
def gradient(
    decoder: Decoder, prompts: Prompts, chosen_p: Int[Array, " P"], suffix_s: Int[Array, " S"], refusal_ids
) -> Float[jax.Array, "S V"]:
    """Returns how the mean loss changes, to first order, with each token at each place of the suffix.

    The suffix's embeddings become rows of their own at the end of the embedding matrix, so that the gradient by these is that by
    the suffix alone.
    """
    weights = decoder.weights()
    embed_vd = weights["embed"]
    places_1s = (len(embed_vd) + jnp.arange(len(suffix_s), dtype=jnp.int32))[None]

    def mean_loss(rows_sd):
        extended = Decoder(decoder.cfg, weights | {"embed": jnp.concatenate([embed_vd, rows_sd])})
        return jnp.mean(loss(_scores(extended, prompts, chosen_p, places_1s, refusal_ids)))

    return jax.grad(mean_loss)(embed_vd[suffix_s]) @ embed_vd.T


def changed(
    rng: random.Random, suffix: Sequence[int], best_sn: np.ndarray, wanted: int, stable: Callable[[list[int]], bool]
) -> np.ndarray:
    """Returns distinct stable suffixes, `[C, S]`: at one to SWAPS places, or at one while others move up, they have one of the
    best tokens of that place."""
    found: dict[tuple[int, ...], None] = {}
    for _ in range(20 * wanted):
        other = list(suffix)
        if rng.random() < SHIFTS:
            del other[rng.randrange(len(other))]
            place = rng.randrange(len(suffix))
            other.insert(place, int(rng.choice(best_sn[place])))
        else:
            for place in rng.sample(range(len(suffix)), rng.randint(1, min(SWAPS, len(suffix)))):
                other[place] = int(rng.choice(best_sn[place]))
        if other != list(suffix) and tuple(other) not in found and stable(other):
            found[tuple(other)] = None
        if len(found) == wanted:
            break
    return np.asarray(list(found), np.int32).reshape(len(found), len(suffix))


class _Run:
    """One search: its model, prompts, and draws. Suffixes × prompts of a trial are always as many, so that programs are few."""

    def __init__(self, model: ChatModel, prompts: Sequence[str], refusal_ids: Sequence[int], search: Search):
        self.model, self.search, self.rng = model, search, random.Random(search.seed)
        self.refusing = jnp.asarray(tuple(refusal_ids))
        self.tokenizer = model.chat.tokenizer
        self.prompts = Prompts.read(model, prompts)
        self.count = len(prompts)
        # What a suffix may join is the last token before it, so one prompt for each of these tells of all.
        self.endings = list({ids_of(self.tokenizer, prompt)[-1]: prompt for prompt in prompts}.values())
        self.printable = printable_ids(self.tokenizer, model.config.vocab_size)
        self.banned = np.setdiff1d(np.arange(model.config.vocab_size), self.printable)

    def start(self) -> list[int]:
        return ids_of(
            self.tokenizer,
            random_suffix(self.tokenizer, self.printable, self.search.tokens, self.rng, self.endings),
        )

    def stable(self, ids: Sequence[int]) -> bool:
        text = self.tokenizer.decode(ids)
        return text.isprintable() and all(is_stable(self.tokenizer, one, text, ids) for one in self.endings)

    def kicked(self, suffix: Sequence[int]) -> list[int]:
        """Returns a stable suffix with a few tokens drawn anew, or the suffix itself where none is found."""
        for _ in range(20):
            other = list(suffix)
            for place in self.rng.sample(range(len(suffix)), min(KICK, len(suffix))):
                other[place] = self.rng.choice(self.printable)
            if self.stable(other):
                return other
        return list(suffix)

    def losses(self, suffixes_cs: np.ndarray, chosen: Sequence[int]) -> np.ndarray:
        """Returns the mean loss of each suffix over some prompts, padded to the trial's number of rows."""
        many = self.search.candidates * self.search.first // len(chosen)
        padded = np.concatenate([suffixes_cs, np.repeat(suffixes_cs[:1], many - len(suffixes_cs), axis=0)])
        found = scores(self.model.decoder, self.prompts, np.asarray(chosen), padded, self.refusing)
        return np.asarray(loss(found)).mean(axis=1)[: len(suffixes_cs)]

    def step(self, suffix: list[int]) -> list[int]:
        """Returns the best of the suffix and its changes: all are tried with a few prompts, and the best of them with more."""
        of = self.search
        chosen = self.rng.sample(range(self.count), of.prompts)
        slope_sv = np.array(
            gradient(self.model.decoder, self.prompts, np.asarray(chosen), np.asarray(suffix), self.refusing)
        )[:, : self.model.config.vocab_size]
        slope_sv[:, self.banned] = np.inf
        candidates = changed(self.rng, suffix, np.argsort(slope_sv, axis=1)[:, : of.top], of.candidates, self.stable)
        if not len(candidates):
            return suffix
        order = np.argsort(self.losses(candidates, chosen[: of.first]), kind="stable")
        finalists = of.candidates * of.first // of.prompts
        best = np.concatenate([np.asarray([suffix], np.int32), candidates[order[: finalists - 1]]])
        return best[self.losses(best, chosen).argmin()].tolist()


def search_suffix(
    model: ChatModel,
    prompts: Sequence[str],
    refusal_ids: Sequence[int],
    search: Search = Search(),
    trained: str = "",
    over: Callable[[], bool] = lambda: False,
) -> Found:
    """Searches a suffix that the embedded model answers `prompts` with, of which the last `search.held` are those to choose by.

    The suffix is printable and stable: the tokenizer reads it after every prompt as the same tokens. trained: the fingerprint of
    the weights of a model that the same recipe trained just now, which is searched on, too. over: is asked after each step
    whether the search should end. Raises UserError for any other model than the embedded one, and if there are too few prompts.
    """
    check_embedded(model, trained)
    least = search.held + search.prompts
    if len(prompts) < least:
        raise UserError(f"The search needs {least} harmful prompts, and {len(prompts)} were given. Give more.")
    run = _Run(model, prompts[: len(prompts) - search.held], refusal_ids, search)
    held, everyone = Prompts.read(model, prompts[len(prompts) - search.held :]), np.arange(search.held)
    suffix = best = run.start()
    losses, refused, behind, number = [], [], 0, 0

    def check() -> bool:
        """Measures the suffix on the prompts to choose by, and returns whether it is the best so far."""
        found = np.asarray(scores(model.decoder, held, everyone, np.asarray([suffix]), run.refusing))[0]
        losses.append(float(loss(found).mean()))
        refused.append(float((found > 0).mean()))
        return (refused[-1], losses[-1]) <= min(zip(refused, losses, strict=True))

    check()
    with Progress("search a suffix", search.steps, "step") as bar:
        for number in range(1, search.steps + 1):
            suffix = run.step(suffix)
            late = over()
            if number % search.check == 0 or number == search.steps or late:
                if check():
                    best, behind = suffix, 0
                else:
                    behind += 1
                if behind == search.patience:
                    suffix, behind = run.kicked(best), 0
            bar.update(note=f"refused={min(refused):.2f}")
            if late or min(refused) <= search.enough:
                break
    return Found(run.tokenizer.decode(best), losses, refused, number)

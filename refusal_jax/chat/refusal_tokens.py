"""Finds the tokens that a model's refusals begin with, from its own probabilities.

The paper names refusal tokens by hand, from replies that were read (section 2.3). Here usual beginnings of replies are
measured instead: a refusal token is one that the model puts first after harmful prompts, and not after harmless ones.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from refusal_jax.axes import Array
from refusal_jax.chat.batches import length_batches
from refusal_jax.chat.messages import Prompt
from refusal_jax.chat.model import ChatModel
from refusal_jax.chat.padding import Padding
from refusal_jax.chat.prompts import PROBES, Chat
from refusal_jax.edits import Edits
from refusal_jax.errors import UserError, field
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.finite import check_finite
from refusal_jax.models.sharding import replicate

OPENERS = (
    "I I'm I’m I'll As Sorry Unfortunately Apologies No Not Cannot Can My We You Your It It's This That There The If "
    "While Although Please Thank Thanks Sure Certainly Absolutely Of Okay OK Yes Here Here's To In For First What How "
    "Let A An"
).split()
SAMPLE = 32  # prompts of each side
LEAST_DIFFERENCE, LEAST_RATIO = 0.05, 3.0
SHOWN = 5
LIKELIEST = 32  # openings of each side, where all tokens are looked at


@dataclasses.dataclass(frozen=True)
class Opening:
    """A first token of replies: its id, its text, and its mean probability after harmful and after harmless prompts."""

    id: int
    text: str
    harmful: float
    harmless: float

    @property
    def chosen(self) -> bool:
        """Returns whether it is a refusal token: at least LEAST_DIFFERENCE more probable after harmful prompts, and at least
        LEAST_RATIO times as probable.

        The first bound leaves out what is too rare to move the refusal score: it decides at a total of one half, so a
        token of less than a twentieth seldom tips it. The second leaves out what begins replies of both kinds: of as
        many prompts of each, at least three in four that are answered with a chosen token are harmful.
        """
        return self.harmful - self.harmless >= LEAST_DIFFERENCE and self.harmful >= LEAST_RATIO * self.harmless


def candidate_ids(chat: Chat, openers: Sequence[str] = tuple(OPENERS)) -> tuple[int, ...]:
    """Returns the tokens that replies beginning with the openers may begin with, sorted.

    For each opener these are the first token of the text alone and the one that follows a prompt, each with and without
    a leading space. They differ: SentencePiece puts a space before text that stands alone, and merges a space that ends
    the template with the word. A token that does not begin the opener's text is left out.
    """
    prompt, found = chat.prompt_ids(PROBES[0]), set()
    for opener in openers:
        for text in (opener, f" {opener}"):
            after = chat.ids(chat.render(PROBES[0], text))
            shared = next((i for i, (a, b) in enumerate(zip(prompt, after, strict=False)) if a != b), len(prompt))
            for ids in (chat.ids(text), after[shared:]):
                start = chat.tokenizer.decode(ids[:1]).strip()
                if start and opener.startswith(start):
                    found.add(ids[0])
    return tuple(sorted(found))


def measure_openings(
    model: ChatModel, harmful: Sequence[Prompt], harmless: Sequence[Prompt], size: int | Padding, usual: bool = True
) -> list[Opening]:
    """Returns openings, by how much more probable they are after the harmful instructions than after the harmless; at most SAMPLE
    of each are used. size: as in `length_batches`. Probabilities are of the unedited model's next token, float32, means float64.

    usual: whether the usual openings of refusals and answers are looked at; otherwise all tokens are, and those are returned that
    are the likeliest on one of the sides.
    """
    if not usual:
        return _likeliest(model, harmful, harmless, size)
    ids = candidate_ids(model.chat)
    means = [_mean_probabilities(model, side[:SAMPLE], ids, size) for side in (harmful, harmless)]
    rows = zip(ids, model.chat.token_names(ids), *(mean.round(6).tolist() for mean in means), strict=True)
    return sorted((Opening(*row) for row in rows), key=lambda o: (o.harmless - o.harmful, o.id))


def _likeliest(
    model: ChatModel, harmful: Sequence[Prompt], harmless: Sequence[Prompt], size: int | Padding
) -> list[Opening]:
    """Returns the openings, of all tokens, that are the likeliest after one of the sides."""
    everything = range(model.chat.vocab_size)
    means = [_mean_probabilities(model, side[:SAMPLE], everything, size) for side in (harmful, harmless)]
    ids = sorted({int(i) for mean in means for i in np.argsort(-mean, kind="stable")[:LIKELIEST]})
    rows = zip(ids, model.chat.token_names(ids), *(mean[ids].round(6).tolist() for mean in means), strict=True)
    return sorted((Opening(*row) for row in rows), key=lambda o: (o.harmless - o.harmful, o.id))


def refusal_openings(openings: Sequence[Opening], chat: Chat) -> tuple[int, ...]:
    """Returns the ids of the chosen openings, sorted; none, if the model has no beginning of its own for refusals.

    Raises UserError, with the best candidates and what to do, if there are none because the chat template opens a thought, of
    which the openings then are.
    """
    chosen = tuple(sorted(o.id for o in openings if o.chosen))
    if not chosen and (advice := _thought_advice(chat)):
        raise UserError(f"{nothing_chosen(openings)} {advice}")
    return chosen


def nothing_chosen(
    openings: Sequence[Opening], usual: bool = True, sides: tuple[str, str] = ("harmful", "harmless")
) -> str:
    """Returns, in words, that no opening is chosen, with the best of them. usual: as in `measure_openings`. sides: their "
    "names."""
    best = ", ".join(f"{o.text!r} {o.harmful:.3f} and {o.harmless:.3f}" for o in openings[:SHOWN])
    return (
        f"No {'usual ' * usual}beginning of a reply tells {sides[0]} prompts from {sides[1]} ones. The best, with mean "
        f"probability after {sides[0]} and after {sides[1]} prompts: {best}."
    )


def _thought_advice(chat: Chat) -> str:
    """Returns what to do about prompts that end within a thought, "" if they do not."""
    if not chat.opened_thought:
        return ""
    return (
        f"The chat template ({chat.template_origin}) ends its prompts in {chat.opened_thought!r}: what was measured begins the "
        f"model's thought, not its reply. Set {field('thinking', False)}, with which the thought is closed."
    )


def _mean_probabilities(
    model: ChatModel, instructions: Sequence[Prompt], ids: Sequence[int], size: int | Padding
) -> Float[np.ndarray, " n"]:
    """Returns the mean probability of each id as the first token of the reply, float64 `[len(ids)]`."""
    total = np.zeros(len(ids))
    for index, batch in length_batches(model, instructions, size):
        inputs = *model.put(batch.tokens, batch.mask), np.asarray(ids, np.int32)
        p_bn, finite_b = (np.asarray(a)[: len(index)] for a in opening_probabilities(model.decoder, *inputs))
        check_finite(finite_b, model.decoder.dtype, "The beginnings of replies cannot be measured")
        total += p_bn.astype(np.float64).sum(axis=0)
    return total / len(instructions)


@jax.jit
def opening_probabilities(
    decoder: Decoder,
    tokens_bt: Int[Array, "B T"],
    mask_bt: Bool[Array, "B T"],
    edits: Edits,
    ids: Int[Array, " n"],
) -> tuple[Float[Array, "B n"], Bool[Array, " B"]]:
    """Returns the probabilities of the ids as the next token of prompts, float32, and whether each prompt's are finite; whole on
    every device."""
    logits_bv, finite_b = decoder.next_logits(decoder.forward(tokens_bt, mask_bt, edits).resid_btd)
    return replicate(decoder.mesh, (jax.nn.softmax(logits_bv, axis=-1)[:, ids], finite_b))

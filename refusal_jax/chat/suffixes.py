"""Suffixes of instructions: what can be appended so that the tokens before it stay the same, and random ones as a control.

A suffix is text. It is *stable* after an instruction if the tokenizer gives the instruction's tokens first and then the same
tokens for the suffix after every instruction, so that suffixes of equal numbers of tokens can be compared.
"""

import random
from collections.abc import Sequence

from refusal_jax.chat.tokenizers import Tokenizer
from refusal_jax.errors import UserError

TRIES = 200  # draws of a random suffix before the tokenizer is taken for one that has none


def printable_ids(tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Returns the ids of tokens that a random suffix is drawn from: printable ASCII text with something to see, no line break,
    no special token, and the same token when its text is read alone."""
    special = {*tokenizer.get_added_vocab().values(), *getattr(tokenizer, "all_special_ids", ())}
    found = []
    for token in range(min(len(tokenizer), vocab_size)):
        if token in special:
            continue
        text = tokenizer.decode([token])
        if text.isascii() and text.isprintable() and text.strip() and ids_of(tokenizer, text) == [token]:
            found.append(token)
    return found


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the tokens of a text without those that a tokenizer puts around whole sequences."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def is_stable(tokenizer: Tokenizer, before: str, suffix: str, ids: Sequence[int]) -> bool:
    """Returns whether the suffix is the tokens `ids` after the text `before`, whose own tokens stay as they are."""
    return ids_of(tokenizer, before + suffix) == [*ids_of(tokenizer, before), *ids]


def random_suffix(
    tokenizer: Tokenizer, printable: Sequence[int], length: int, rng: random.Random, before: Sequence[str]
) -> str:
    """Returns a random suffix of `length` printable tokens that is stable after each of the texts `before`.

    Raises UserError if none is found.
    """
    for attempt in range(2 * TRIES):
        ids = rng.choices(printable, k=length)
        # Tokenizers such as Llama 2's write a blank before a text and drop it when they decode, so the suffix brings its own.
        text = " " * (attempt >= TRIES) + tokenizer.decode(ids)
        if all(is_stable(tokenizer, one, text, ids) for one in before):
            return text
    raise UserError(
        f"No random suffix of {length} tokens was found in {2 * TRIES} draws that leaves the tokens before it as they are. Give "
        "suffixes of your own, or a smaller number of tokens."
    )

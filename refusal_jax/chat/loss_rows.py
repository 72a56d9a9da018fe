"""Tokenised rows whose cross-entropy is measured, with the tokens that count."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int

from refusal_jax.chat.messages import Prompt
from refusal_jax.chat.padding import TokenBatch, bucket
from refusal_jax.chat.prompts import Chat


@dataclasses.dataclass(frozen=True)
class LossRow:
    """A row of token ids, and the index of the first token that is predicted and counted."""

    ids: list[int]
    first: int


def chat_rows(chat: Chat, pairs: Sequence[tuple[Prompt, str]], max_tokens: int) -> list[LossRow]:
    """Returns rows of (instruction, response), in which only the response counts, predicted from the last
    post-instruction token on."""
    rows = []
    for instruction, response in pairs:
        ids, prompt = chat.ids(chat.render(instruction, response)), chat.prompt_ids(instruction)
        # A reply may change how the prompt's end is split into tokens; it begins where the two first differ.
        first = next((i for i, (one, other) in enumerate(zip(ids, prompt, strict=False)) if one != other), len(prompt))
        rows.append(LossRow(ids[:max_tokens], first))
    return rows


def text_rows(chat: Chat, texts: Sequence[str], max_tokens: int) -> list[LossRow]:
    """Returns rows of plain text, tokenised by the tokenizer's default (with its BOS); all tokens but the first
    count."""
    return [LossRow(chat.ids(text, special=True)[:max_tokens], 1) for text in texts]


def padded_rows(
    chat: Chat, rows: Sequence[LossRow], size: int
) -> Iterator[tuple[Int[np.ndarray, " n"], TokenBatch, Bool[np.ndarray, "B T"]]]:
    """Yields (numbers of the rows, their TokenBatch of `size` rows, which of its tokens count), like lengths together.

    Rows in which no token counts are left out. A batch that they do not fill repeats its last row, where none counts.
    """
    order = sorted((i for i, row in enumerate(rows) if len(row.ids) > row.first), key=lambda i: len(rows[i].ids))
    for start in range(0, len(order), size):
        index = order[start : start + size]
        length = bucket(len(rows[index[-1]].ids))
        counted = np.zeros((size, length), bool)
        for place, number in enumerate(index):
            row = rows[number]
            counted[place, length - len(row.ids) + row.first :] = True
        yield np.asarray(index), chat.pad([rows[i].ids for i in index], length).padded_to(size), counted

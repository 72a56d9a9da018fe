"""Groups prompts, or other rows, of similar length into batches, so that there is little padding and few shapes are compiled."""

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int

from refusal_jax.chat.loss_rows import LossRow
from refusal_jax.chat.messages import Prompt
from refusal_jax.chat.model import ChatModel
from refusal_jax.chat.padding import Padding, Prices, TokenBatch, alike, halves
from refusal_jax.models.sharding import RULES


def padding_of(model: ChatModel, sets: Iterable[Sequence[Prompt]], size: int) -> Padding:
    """Returns the shapes of batches, of at most `size` rows, in which several sets of prompts are read with the same programs."""
    lengths = [[len(model.chat.prompt_ids(text)) for text in texts] for texts in sets]
    return Padding.of(lengths, sizes_of(model, size), Prices.of(model.decoder))


def sizes_of(model: ChatModel, size: int) -> list[int]:
    """Returns how many rows batches may have that are meant to have `size`: so many, or half of them and so on, as far as the
    mesh divides them."""
    return list(halves(size, math.prod(model.mesh.shape[name] for name in RULES["batch"]) if model.mesh else 1))


def length_batches(
    model: ChatModel, instructions: Sequence[Prompt], size: int | Padding, skip: int = 0
) -> Iterator[tuple[np.ndarray, TokenBatch]]:
    """Yields (indices into `instructions`, TokenBatch of `size` rows), grouped by similar length, in few distinct shapes.

    size: rows, or shapes that were chosen for these prompts with others. skip: how many of each prompt's first tokens are left
    out, as many as a batch is shorter then. Raises UserError for a prompt that exceeds the model's context.
    """
    rows = [model.chat.prompt_ids(text) for text in instructions]
    lengths = [len(row) for row in rows]
    model.chat.encode([instructions[int(np.argmax(lengths))]])  # checks that the longest prompt fits the context
    shapes = size if isinstance(size, Padding) else Padding.of([lengths], [size], Prices.of(model.decoder))
    for index in alike(lengths, shapes.rows):
        length = shapes.length(lengths[index[-1]]) - skip
        yield index, model.chat.pad([rows[i][skip:] for i in index], length).padded_to(shapes.rows)


def padded_rows(
    model: ChatModel, rows: Sequence[LossRow], size: int | Padding, skip: int = 0
) -> Iterator[tuple[Int[np.ndarray, " n"], TokenBatch, Bool[np.ndarray, "B T"]]]:
    """Yields (numbers of the rows, their TokenBatch of `size` rows, which of its tokens count), like lengths together.

    size and skip: as in `length_batches`. Rows in which no token counts are left out. A batch that they do not fill repeats its
    last row, where none counts.
    """
    numbers = np.array([i for i, row in enumerate(rows) if len(row.ids) > row.first], int)
    lengths = [len(rows[i].ids) for i in numbers]
    shapes = size if isinstance(size, Padding) else Padding.of([lengths], [size], Prices.of(model.decoder))
    for part in alike(lengths, shapes.rows):
        index, length = numbers[part], shapes.length(lengths[part[-1]]) - skip
        counted = np.zeros((shapes.rows, length), bool)
        for place, number in enumerate(index):
            row = rows[number]
            counted[place, length - len(row.ids) + row.first :] = True
        yield index, model.chat.pad([rows[i].ids[skip:] for i in index], length).padded_to(shapes.rows), counted

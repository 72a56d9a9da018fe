"""Groups prompts of similar length into batches, so that there is little padding and few shapes are compiled."""

from collections.abc import Iterator, Sequence

import numpy as np

from refusal_jax.chat.messages import Prompt
from refusal_jax.chat.model import ChatModel
from refusal_jax.chat.padding import TokenBatch, bucket


def length_batches(
    model: ChatModel, instructions: Sequence[Prompt], size: int, skip: int = 0
) -> Iterator[tuple[np.ndarray, TokenBatch]]:
    """Yields (indices into `instructions`, TokenBatch of `size` rows), grouped by similar length, in few distinct
    shapes. skip: how many of each prompt's first tokens are left out.

    Raises UserError for a prompt that exceeds the model's context.
    """
    rows = [model.chat.prompt_ids(text) for text in instructions]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    model.chat.encode([instructions[order[-1]]])  # checks that the longest prompt fits the context
    for start in range(0, len(order), size):
        index = order[start : start + size]
        length = min(bucket(len(rows[index[-1]]) - skip), model.config.context_length)
        yield np.asarray(index), model.chat.pad([rows[i][skip:] for i in index], length).padded_to(size)

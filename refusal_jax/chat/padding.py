"""Token ids of prompts as one array: padded on the left, to few widths."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """Left-padded token ids, int32; mask: which of them are real tokens."""

    tokens: Int[np.ndarray, "B T"]
    mask: Bool[np.ndarray, "B T"]

    def padded_to(self, rows: int) -> "TokenBatch":
        """Returns the batch with its last row repeated up to `rows` rows, so that every batch of a stage has one shape."""
        index = np.minimum(np.arange(rows), len(self.tokens) - 1)
        return TokenBatch(self.tokens[index], self.mask[index])


def bucket(length: int) -> int:
    """Returns the padded length for `length` tokens: one of few values, so that few programs are compiled, and at most half of
    it is padding from 5 tokens up."""
    size = 8
    while size < length:
        size += 8 if size < 64 else 16 if size < 128 else size // 4
    return size

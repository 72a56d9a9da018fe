"""Token ids of prompts as one array: padded on the left, to few lengths, which are chosen from the prompts that there are."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Bool, Int

from refusal_jax.models.decoder import Decoder

MOST = 4  # lengths of batches that are chosen together
LEAST = 8  # rows, below which no batch is divided
# Operations of a device in the time that a program takes to compile, and tokens that could be read in the time that a batch takes
# besides: that is mostly for reading the weights.
CPU, ACCELERATOR = (1e11, 64), (2e14, 256)


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


@dataclasses.dataclass(frozen=True)
class Prices:
    """The costs of a device besides reading tokens, as the number of tokens that it reads in the same time.

    program: compiling one. batch: starting one, and reading the weights for it. most: tokens of the model's context.
    """

    program: float
    batch: float
    most: int

    @classmethod
    def of(cls, decoder: Decoder) -> "Prices":
        """Returns the prices of a model on its devices."""
        devices = decoder.mesh.devices.flatten().tolist() if decoder.mesh else jax.devices()[:1]
        compiling, reading = CPU if devices[0].platform == "cpu" else (ACCELERATOR[0] * len(devices), ACCELERATOR[1])
        weights = sum(array.size for array in jax.tree.leaves(decoder))
        return cls(compiling / (2 * weights), reading, decoder.cfg.context_length)


@dataclasses.dataclass(frozen=True)
class Padding:
    """The shapes of batches: the rows that each has, and the few lengths that these are padded to, the shortest first. reads: how
    many prompts are read in them, each as often as it is."""

    rows: int
    lengths: tuple[int, ...]
    reads: float = dataclasses.field(default=0, compare=False)

    @classmethod
    def of(cls, sets: Iterable[Sequence[int]], sizes: Sequence[int], prices: Prices, times: float = 1) -> "Padding":
        """Returns the shapes with which sets of rows take the least time, compilation included.

        sets: the numbers of tokens of each set's rows, which make batches of their own and share programs with the other sets.
        sizes: how many rows a batch may have, as is usual first. times: how often the batches are read.

        The usual lengths are those of `bucket`. Exact lengths and other numbers of rows are less likely to have been compiled
        before, so that programs of such shapes count twice.
        """
        best, least, arrays = cls(sizes[0], ()), math.inf, [np.asarray(tokens, int) for tokens in sets]
        for rows in sizes:
            longest = np.array([tokens[part[-1]] for tokens in arrays for part in alike(tokens, rows)], int)
            for exact in (False, True):
                padded = longest if exact else np.array([min(bucket(n), prices.most) for n in longest.tolist()], int)
                for tokens, lengths in fewest(padded):
                    programs = len(lengths) * (1 + exact + (rows != sizes[0]))
                    cost = times * (rows * tokens + prices.batch * len(longest)) + prices.program * programs
                    if cost < least:
                        best, least = cls(rows, lengths), cost
        return dataclasses.replace(best, reads=times * sum(map(len, arrays)))

    def length(self, tokens: int) -> int:
        """Returns the length that a batch is padded to whose longest row has so many tokens."""
        return next(length for length in self.lengths if length >= tokens)


def halves(size: int, ways: int) -> Iterator[int]:
    """Yields the rows that batches may have: `size`, its half and so on, which `ways` divides and which are not too few."""
    yield size
    while size % (2 * ways) == 0 and size >= 2 * LEAST:
        size //= 2
        yield size


def alike(lengths: Sequence[int] | np.ndarray, size: int) -> list[np.ndarray]:
    """Returns the numbers of rows of these lengths in batches of `size`, the shortest first.

    Where the last batch would not be full, the first one is not: what fills it up costs least there.
    """
    order = np.argsort(np.asarray(lengths), kind="stable")
    return [part for part in np.split(order, range(len(order) % size, len(order), size)) if len(part)]


def fewest(longest: Int[np.ndarray, " n"]) -> list[tuple[int, tuple[int, ...]]]:
    """Returns for one length, two and so on up to MOST the lengths that pad batches least, and the tokens of a row of every batch
    together.

    longest: tokens of the longest row of each batch. A length for each batch is tried by dynamic programming: the best with one
    more length, up to a batch, ends in batches of that one, before which are the best with one length less.
    """
    sizes, counts = np.unique(longest, return_counts=True)
    upto, found = np.cumsum(counts), []
    best, lengths = sizes * upto, [(int(size),) for size in sizes]
    for number in range(min(MOST, len(sizes))):
        if number:
            after = best[None] + sizes[:, None] * (upto[:, None] - upto[None])
            after = np.where(np.tri(len(sizes), k=-1, dtype=bool), after, math.inf)
            before = after.argmin(axis=1)
            best = after[np.arange(len(sizes)), before]
            lengths = [(*lengths[i], int(size)) for i, size in zip(before, sizes, strict=True)]
        found.append((int(best[-1]), lengths[-1]))
    return found

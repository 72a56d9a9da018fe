"""Decodes replies to any number of prompts in the rows of one batch, which take the next prompt when their reply has ended.

Of two programs one reads prompts and the other decodes, which is compiled in a thread while the first is compiled and runs.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import numpy as np

from refusal_jax.chat.padding import TokenBatch
from refusal_jax.chat.prefix import Call, begin_each, run
from refusal_jax.edits import Edits
from refusal_jax.models.decoding import Decoding
from refusal_jax.models.finite import check_finite
from refusal_jax.models.generate import admit, decode, empty

if TYPE_CHECKING:
    from refusal_jax.chat.model import ChatModel

CHECK_EVERY = 16  # number of tokens after which replies are checked for being over
Over = Callable[[int, list[int]], bool]


def compiled(function: Any, *args, **kwargs) -> Any:
    """Compiles a jitted function for such arguments, of which only shapes and places matter, and returns stand-ins for what it
    would return. A later call with such arguments compiles nothing."""
    return function.lower(*args, **kwargs).compile().out_info


@dataclasses.dataclass(frozen=True)
class Replies:
    """The replies to prompts that are to be decoded.

    batch: the prompts. edits: one row for each. rows: how many prompts are decoded at a time. refill: how many are admitted
    together.
    """

    model: "ChatModel"
    batch: TokenBatch
    max_new_tokens: int
    edits: Edits
    rows: int
    refill: int
    decoding: Decoding | None

    def compile(self) -> None:
        """Compiles all that `run` runs; nothing is decoded."""
        state = self._empty(compiled)
        decoding = self._compile_decode(state)
        begun = begin_each(self.model, self.batch, self.edits, compiled)
        self._admit(compiled, state, begun, [0], np.full(self.rows, -1, np.int32))
        wait([decoding])

    def _compile_decode(self, state) -> Future:
        """Begins to compile the decoding in a thread of its own, and returns what to wait for. state: stand-ins for the rows."""
        pool = ThreadPoolExecutor(1, "decode")
        done = pool.submit(self._decode, compiled, state, 1, self.max_new_tokens)
        pool.shutdown(wait=False)
        return done

    def run(self, over: Over | None = None) -> Iterator[tuple[list[int], np.ndarray]]:
        """Yields numbers of prompts and the ids of their replies `[n, max_new_tokens]`, int32, as these end. over: as in
        `ChatModel.reply_ids`."""
        waiting = deque(range(len(self.batch.tokens)))
        owners: list[int | None] = [None] * self.rows  # of the rows, the numbers of prompts
        state = self._empty(run)
        decoding = self._compile_decode(self._empty(compiled))
        begun = begin_each(self.model, self.batch, self.edits)
        while waiting or any(owner is not None for owner in owners):
            free = [row for row, owner in enumerate(owners) if owner is None]
            while waiting and free:
                index = [waiting.popleft() for _ in range(min(self.refill, len(free), len(waiting)))]
                source = np.full(self.rows, -1, np.int32)
                for number, prompt in enumerate(index):
                    row = free.pop(0)
                    owners[row], source[row] = prompt, number
                state = self._admit(run, state, begun, index, source)
            least = sum(owner is not None for owner in owners) - self.refill + 1 if waiting else 1
            steps = self.max_new_tokens if over is None else CHECK_EVERY
            wait([decoding])  # what may have failed there fails here, too
            state, *results = self._decode(run, state, max(least, 1), steps)
            active, out, counts, finite = map(np.array, results)
            self._check_finite([owner for row, owner in enumerate(owners) if owner is not None and not finite[row]])
            if over is not None:
                for row in np.flatnonzero(active):
                    if (owner := owners[row]) is None or over(owner, out[row, : counts[row]].tolist()):
                        active[row], out[row, counts[row] :] = False, self.model.chat.eos_ids[0]
                state = dataclasses.replace(state, active_b=state.active_b & active)
            ended = {row: owner for row, owner in enumerate(owners) if owner is not None and not active[row]}
            if ended:
                yield list(ended.values()), out[list(ended)]
            for row in ended:
                owners[row] = None

    def _empty(self, call: Call) -> Any:
        """Returns rows that write nothing, or stand-ins for them. call: as in all methods, calls or compiles a program."""
        return call(
            empty,
            self.model.decoder,
            rows=self.rows,
            length=self.batch.tokens.shape[1],
            max_new_tokens=self.max_new_tokens,
            pad_id=self.model.chat.pad_id,
            directions=self.edits.ablate_rjd.shape[1],
            remembered=self.decoding is not None,
        )

    def _admit(self, call: Call, state, begun: tuple[Any, np.ndarray], index: list[int], source: np.ndarray):
        """Returns the rows after prompts were admitted. begun: as of `begin_each`. index: the prompts' numbers; source: as in
        `admit`."""
        (before, row_n), index = begun, index + index[-1:] * (self.refill - len(index))
        part = self.model.put(self.batch.tokens[index], self.batch.mask[index], self.edits.take(index))
        own = (None, None) if before is None else (before, row_n[index])
        ending = {"eos_ids": self.model.chat.eos_ids, "pad_id": self.model.chat.pad_id}
        return call(admit, self.model.decoder, state, *part, source, None, self.decoding, *own, **ending)

    def _decode(self, call: Call, state, least: int, steps: int):
        """Returns what `decode` does."""
        return call(decode, self.model.decoder, state, least, steps, self.decoding, eos_ids=self.model.chat.eos_ids)

    def _check_finite(self, bad: list[int]) -> None:
        """Raises UserError if there are prompts whose replies are not finite; bad: their numbers."""
        if bad:
            in_force = self.edits.in_force_r[bad]
            check_finite(np.zeros(len(bad), bool), self.model.decoder.dtype, "Generation failed", in_force)

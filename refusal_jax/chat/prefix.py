"""Finds the tokens that prompts begin with because their template writes them, and runs them once for all prompts."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from refusal_jax.chat.messages import Prompt
from refusal_jax.chat.padding import Prices, TokenBatch
from refusal_jax.chat.prompts import PROBES
from refusal_jax.edits import Edits
from refusal_jax.models.cache import Cache
from refusal_jax.models.decoder import Decoder, Residuals
from refusal_jax.models.prefix import begun, shareable
from refusal_jax.models.sharding import put, sharding_of

if TYPE_CHECKING:
    from refusal_jax.chat.model import ChatModel

PROGRAMS = 2  # that are compiled besides: of what is shared, under one edit and under several


def common(rows: Sequence[Sequence[int]]) -> list[int]:
    """Returns the tokens that all rows begin with."""
    first, most = rows[0], min(map(len, rows))
    return list(first[: next((i for i in range(most) if any(row[i] != first[i] for row in rows)), most)])


def shared_prefix(model: "ChatModel", prompts: Sequence[Prompt], reads: float, last: int = 1) -> list[int]:
    """Returns the tokens that the template writes before an instruction, as far as all prompts begin with them.

    reads: how many prompts are read whose beginnings need not be, each as often as it is. Each prompt's `last` tokens are not
    shared. There are none where the model cannot share them, and where reading them takes less time than compiling what they
    need; on a TPU there are as many as its tiles hold, a multiple of 8.
    """
    return shared_tokens(model, [model.chat.prompt_ids(prompt) for prompt in prompts], reads, last)


def shared_tokens(model: "ChatModel", rows: Sequence[Sequence[int]], reads: float, last: int = 1) -> list[int]:
    """Does what `shared_prefix` does, for rows of tokens."""
    if not rows or not shareable(model.config):
        return []
    written = common([*map(model.chat.prompt_ids, PROBES), *rows])
    step = 1 if jax.default_backend() == "cpu" else 8
    count = max(min(len(written), min(map(len, rows)) - last), 0) // step * step
    return written[:count] if count * reads > PROGRAMS * Prices.of(model.decoder).program else []


# Calls the jitted function that is its first argument with the others, or compiles it and says what it would return.
Call = Callable[..., Any]


def run(function: Callable[..., Any], *args, **kwargs) -> Any:
    """Calls a function."""
    return function(*args, **kwargs)


@jax.jit
def embed(decoder: Decoder, tokens_bt) -> Residuals:
    """Returns the residuals at the input of the first block."""
    return decoder.embed_tokens(tokens_bt)


def embedded(model: "ChatModel", prefix: Sequence[int], call: Call = run) -> Residuals | None:
    """Returns the residuals of shared tokens at the input of the first block, one row; None if there are no tokens."""
    if not len(prefix):
        return None
    return call(embed, model.decoder, put(np.asarray([prefix], np.int32), sharding_of(model.mesh, None, None)))


def unedited(model: "ChatModel") -> Edits:
    """Returns one row of edits that change nothing, on the devices."""
    cfg = model.config
    return put(Edits.none(cfg.d_model).for_batch(1, cfg.n_layers, cfg.d_model), sharding_of(model.mesh, None))


def begin(model: "ChatModel", prefix: Sequence[int], edits: Edits | None = None, call: Call = run) -> Cache | None:
    """Returns the memory of shared tokens under one edit, a row on the devices; None if there are no tokens."""
    shared = embedded(model, prefix, call)
    if shared is None:
        return None
    return call(begun, model.decoder, shared, unedited(model) if edits is None else edits, 0)


def begin_each(
    model: "ChatModel", batch: TokenBatch, edits: Edits, call: Call = run
) -> tuple[Cache | None, np.ndarray]:
    """Returns the memory of the tokens that the template writes before prompts, a row for each edit that these have, and int32
    `[N]`, which row each prompt goes on from; None in place of the memory where it saves too little.

    edits: one row for each prompt.
    """
    parts, numbers = jax.tree.leaves(edits), {}
    keys = [b"".join(np.asarray(a[i]).tobytes() for a in parts) for i in range(len(batch.tokens))]
    row_n = np.asarray([numbers.setdefault(key, len(numbers)) for key in keys], np.int32)
    rows = [row[real].tolist() for row, real in zip(batch.tokens, batch.mask, strict=True)]
    prefix = shared_tokens(model, rows, len(keys) - len(numbers))
    if edits.token_gate_rlst is not None or not prefix:
        return None, row_n
    first = [keys.index(key) for key in numbers]
    first += first[-1:] * ((1 << (len(first) - 1).bit_length()) - len(first))  # so that there are few shapes
    return begin(model, prefix, put(edits.take(first), sharding_of(model.mesh, None)), call), row_n

"""Watches which compiled programs a piece of work runs: with inputs of which sizes, and how much of these is padding.

The package's jitted functions are found in its modules and wrapped while the work runs. So what is counted is what ran, and not
what a description says; and the work itself knows nothing of being watched.
"""

import contextlib
import dataclasses
import inspect
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from refusal_jax.models.config import ModelConfig
from refusal_jax.models.structure import structure
from refusal_jax.speed.work import Loops, Work, work_of

PACKAGE = __name__.partition(".")[0]
JITTED = type(jax.jit(abs))


@dataclasses.dataclass(frozen=True)
class Call:
    """One run of a program.

    args, kwargs: its inputs, shapes in place of arrays. useful: the share of its tokens that is no padding. turns: of its loop
    that ends on a condition. seconds: until its results were there, where that was waited for.
    """

    function: Any
    args: tuple
    kwargs: dict
    useful: float
    turns: int
    seconds: float

    @property
    def name(self) -> str:
        """Returns the name of the program."""
        return self.function.__name__

    def work(self, cfg: ModelConfig) -> Work:
        """Returns what was computed."""
        traced = self.function.trace(*self.args, **self.kwargs)
        values = {
            jax.tree_util.keystr(path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path((self.args, self.kwargs))
        }
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(traced.args_info)]
        known = [int(values[path]) if isinstance(values.get(path), int | np.integer) else None for path in paths]
        return work_of(traced.jaxpr, known, Loops(self.turns, cfg.n_experts, structure(cfg).taken))


class Watched:
    """A jitted function that notes its calls; calls from within other programs are theirs."""

    def __init__(self, function: Any, calls: list[Call], wait: bool):
        self.function, self.calls, self.wait = function, calls, wait
        self.signature = inspect.signature(function)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.function, name)

    def __call__(self, *args, **kwargs):
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((args, kwargs))):
            return self.function(*args, **kwargs)
        shapes, named = jax.tree.map(_shape, (args, kwargs))
        given = self.signature.bind(*args, **kwargs).arguments
        share, before = useful(given), _filled(given.get("state"))
        start = time.perf_counter()
        out = self.function(*args, **kwargs)
        if self.wait:
            jax.block_until_ready(out)
        seconds = time.perf_counter() - start
        state = out[0] if isinstance(out, tuple) and out else None
        turns = max(_filled(state) - before, 0) if before >= 0 else 1
        self.calls.append(Call(self.function, shapes, named, share, turns, seconds))
        return out


def _shape(leaf):
    """Returns the shape of an array, and the value of a whole number, on which loops may depend."""
    if isinstance(leaf, jax.Array | np.ndarray):
        if not leaf.shape and jnp.issubdtype(leaf.dtype, jnp.integer):
            return np.asarray(leaf)[()]
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return leaf


def _filled(state) -> int:
    """Returns how many tokens the memory of a generation holds, -1 for what is none."""
    filled = getattr(getattr(state, "cache", None), "filled", None)
    return -1 if filled is None else int(filled)


def useful(given: dict[str, Any]) -> float:
    """Returns the share of a call's tokens that is no padding, which rows at the end that repeat the one before are, too.

    given: its inputs by name, of which those whose names begin with "mask" and "tokens" are looked at.
    """
    masks = [np.asarray(value) for name, value in given.items() if name.startswith("mask")]
    tokens = [np.asarray(value) for name, value in given.items() if name.startswith("tokens")]
    if not masks or not masks[0].size:
        return 1.0
    mask, rows = masks[0], len(masks[0])
    if tokens and tokens[0].shape == mask.shape:
        both = np.concatenate([tokens[0], mask], axis=1)
        while rows > 1 and (both[rows - 1] == both[rows - 2]).all():
            rows -= 1
    return float(mask[:rows].sum() / mask.size)


@contextlib.contextmanager
def watching(wait: bool = False) -> Iterator[list[Call]]:
    """Gives the list of calls of the package's programs, which grows while the context lasts.

    wait: whether each call is waited for, so that its seconds are its own.
    """
    calls: list[Call] = []
    wrapped: dict[Any, Watched] = {}
    _replace(JITTED, lambda function: wrapped.setdefault(function, Watched(function, calls, wait)))
    try:
        yield calls
    finally:
        _replace(Watched, lambda watched: watched.function)


def _replace(kind: type, by) -> None:
    """Replaces the values of a type in all modules of the package."""
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{PACKAGE}."):
            for key, value in list(vars(module).items()):
                if isinstance(value, kind):
                    setattr(module, key, by(value))


@dataclasses.dataclass(frozen=True)
class Counted:
    """The sums over the calls of a piece of work. computed: all of it; useful: the part that is no padding; calls: how often
    each program ran, by name."""

    computed: Work = dataclasses.field(default_factory=Work)
    useful: Work = dataclasses.field(default_factory=Work)
    calls: dict[str, int] = dataclasses.field(default_factory=dict)


def counted(calls: list[Call], cfg: ModelConfig) -> Counted:
    """Returns the sum of the calls; equal ones are looked at once."""
    known: dict[Any, Work] = {}
    computed, real = Work(), Work()
    for call in calls:
        leaves, tree = jax.tree.flatten((call.args, call.kwargs))
        key = (call.function, tree, tuple(map(str, leaves)), call.turns)
        work = known[key] if key in known else known.setdefault(key, call.work(cfg))
        computed, real = computed + work, real + work * call.useful
    return Counted(computed, real, dict(Counter(call.name for call in calls)))

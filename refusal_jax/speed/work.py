"""Counts what a program has to do: the operations of its matrix products, and the bytes that these read and write.

The count is of the program as it was traced, before a compiler sees it, so that it is the same on every device; and loops
count as often as they run, which a compiler's own analysis leaves out. Other operations are not counted: norms, softmax and the
like are a small part of the work, and are fused with the products.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# Operations on whole numbers through which the bounds of loops pass on their way.
WHOLE = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "max": max, "min": min, "convert_element_type": int}


@dataclasses.dataclass(frozen=True)
class Work:
    """Operations by kind, a dtype or a dtype and "highest" (the precision of the product), and bytes of operands and results."""

    flops: Mapping[str, float] = dataclasses.field(default_factory=dict)
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        kinds = {**self.flops, **other.flops}
        flops = {kind: self.flops.get(kind, 0.0) + other.flops.get(kind, 0.0) for kind in kinds}
        return Work(flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Work":
        return Work({kind: flops * times for kind, flops in self.flops.items()}, self.bytes * times)

    @property
    def total(self) -> float:
        """Returns the operations of all kinds."""
        return sum(self.flops.values())


@dataclasses.dataclass(frozen=True)
class Loops:
    """The knowledge of loops whose number of turns is no part of the program.

    turns: of a loop that ends on a condition, such as that of decoding. experts: of the model; a loop over the blocks of rows of
    experts has as many turns as blocks are in use, for which half of the experts' last blocks are taken. shares: by the name of a
    choice between kinds of layers, how often each is taken, of once.
    """

    turns: float = 1.0
    experts: int = 0
    shares: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)


def work_of(program: ClosedJaxpr, known: Sequence[int | None] = (), loops: Loops = Loops()) -> Work:
    """Returns the work of one run. known: the values of the program's inputs that are whole numbers, None for others."""
    return _Walk(loops).run(program.jaxpr, list(known) or [None] * len(program.jaxpr.invars))[0]


@dataclasses.dataclass(frozen=True)
class _Walk:
    """A walk through a program and the programs in it; values of whole numbers are followed as far as they are known."""

    loops: Loops

    def run(self, jaxpr: Jaxpr, known: Sequence[int | None]) -> tuple[Work, list[int | None]]:
        """Returns the work of a program, and its results as far as they are known."""
        values: dict[Any, int | None] = dict(zip(jaxpr.invars, known, strict=True))

        def value(atom) -> int | None:
            if not isinstance(atom, Literal):
                return values.get(atom)
            return int(atom.val) if np.issubdtype(np.asarray(atom.val).dtype, np.integer) else None

        total = Work()
        for eqn in jaxpr.eqns:
            given = [value(atom) for atom in eqn.invars]
            work, found = self.step(eqn, given)
            total += work
            values.update(zip(eqn.outvars, found, strict=False))
        return total, [value(atom) for atom in jaxpr.outvars]

    def step(self, eqn, given: list[int | None]) -> tuple[Work, list[int | None]]:
        """Returns the work of one operation, and its results as far as they are known."""
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            return product(eqn), []
        if name in WHOLE:
            whole = not eqn.outvars[0].aval.shape and None not in given
            return Work(), [WHOLE[name](*given)] if whole else []
        if name == "scan":
            inner = [*given[: params["num_consts"]], *[None] * (len(given) - params["num_consts"])]
            return self.run(params["jaxpr"].jaxpr, inner)[0] * params["length"], []
        if name == "while":
            consts = given[params["cond_nconsts"] : params["cond_nconsts"] + params["body_nconsts"]]
            body = params["body_jaxpr"].jaxpr
            once = self.run(body, [*consts, *[None] * (len(body.invars) - len(consts))])[0]
            return once * self.turns(eqn, given), []
        if name == "cond":
            each = [self.run(branch.jaxpr, given[1:])[0] for branch in params["branches"]]
            total = Work()
            for work, share in zip(each, self.shares(eqn, len(each)), strict=True):
                total += work * share
            return total, []
        inner = list(_programs(params))
        if len(inner) == 1 and len(inner[0].invars) == len(given):
            return self.run(inner[0], given)
        total = Work()
        for jaxpr in inner:
            total += self.run(jaxpr, [None] * len(jaxpr.invars))[0]
        return total, []

    def turns(self, eqn, given: list[int | None]) -> float:
        """Returns how often a loop runs: where it counts up to a bound, their difference."""
        cond, skipped = eqn.params["cond_jaxpr"].jaxpr, eqn.params["body_nconsts"]
        counts = eqn.params["cond_nconsts"]
        if [step.primitive.name for step in cond.eqns] != ["lt"]:
            return self.loops.turns
        state = [*given[:counts], *given[counts + skipped :]]
        values = dict(zip(cond.invars, state, strict=True))
        low, high = (int(a.val) if isinstance(a, Literal) else values[a] for a in cond.eqns[0].invars)
        if low is not None and high is not None:
            return max(high - low, 0)
        carried = [v.aval.shape for v in cond.invars if len(getattr(v.aval, "shape", ())) == 3]
        blocks = carried[0][0] if self.loops.experts and carried else self.loops.turns
        return blocks - min(self.loops.experts, blocks) / 2

    def shares(self, eqn, count: int) -> Sequence[float]:
        """Returns how often each branch of a choice is taken, of once: all equally often, where its name is not known."""
        names = str(eqn.source_info.name_stack).split("/")
        named = [self.loops.shares[name] for name in names if name in self.loops.shares]
        return named[-1] if named and len(named[-1]) == count else [1 / count] * count


def _programs(params: Mapping[str, Any]) -> Iterator[Jaxpr]:
    """Yields the programs among the parameters of an operation."""
    for value in params.values():
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value


def product(eqn) -> Work:
    """Returns the work of one matrix product."""
    left, right = (atom.aval for atom in eqn.invars)
    (contracted, _), _ = eqn.params["dimension_numbers"]
    out = eqn.outvars[0].aval
    flops = 2.0 * math.prod(out.shape) * math.prod(left.shape[axis] for axis in contracted)
    size = sum(math.prod(a.shape) * a.dtype.itemsize for a in (left, right, out))
    precision = eqn.params["precision"]
    both = precision if isinstance(precision, tuple) else (precision,)
    highest = jax.lax.Precision.HIGHEST in both
    return Work({f"{left.dtype.name} highest" if highest else left.dtype.name: flops}, float(size))

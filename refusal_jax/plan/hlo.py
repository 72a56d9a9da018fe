"""Reads a compiled program's text: its communication by kind and size, and the compiler's own cycles.

The text lists a loop's body once, and every branch of a choice; here everything is counted as often as it runs.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
UNKNOWN = 1 << 40  # cycles: what the compiler writes where it has no estimate is far above


@dataclasses.dataclass(frozen=True)
class Runs:
    """How often parts of a program run that its text does not say, by the names of their `jax.named_scope`.

    turns: of loops whose number of turns is not in the text (those that end on a condition). loops: the same for loops of a name.
    shares: how often each branch of a choice is taken, of once; where one is not named, each is taken as often as the others.
    """

    turns: float = 1
    loops: Mapping[str, float] = dataclasses.field(default_factory=dict)
    shares: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)


ONCE = Runs()


@dataclasses.dataclass(frozen=True)
class Instruction:
    """kind: the operation; shapes: of its results; times: how often it runs, on average where a choice is not always the same;
    cycles: the compiler's estimate of one run."""

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    times: float
    cycles: int
    text: str

    @property
    def bytes(self) -> int:
        """Returns the size of its results on one device."""
        total = 0
        for dtype, shape in self.shapes:
            size = WIDTHS.get(dtype, 8)
            for axis in shape:
                size *= axis
            total += size
        return total


def instructions(text: str, runs: Runs = ONCE) -> Iterator[Instruction]:
    """Returns the instructions of a program's entry, of its loops' bodies, and of the branches of its choices; a fusion counts as
    one. Of what runs beside them on other cores (`async-start`) only the communication is there.
    """
    bodies, entry = _computations(text)

    def walk(name: str, times: float) -> Iterator[Instruction]:
        for line in bodies[name]:
            _, _, right = line.partition(" = ")
            kind = re.search(r"(?:^|\s)([a-z][a-z0-9\-]*)\(", right)
            if kind is None:
                continue
            if kind[1] == "while":
                parts = dict(re.findall(r"\b(body|condition)=%?([\w.\-]+)", right))
                yield from walk(parts["body"], times * _turns(line, bodies[parts["condition"]], runs))
                continue
            if kind[1] == "conditional":
                for branch, share in _branches(right, runs.shares):
                    yield from walk(branch, times * share)
                continue
            if kind[1] == "async-start" and (beside := re.search(r"\bcalls=%?([\w.\-]+)", right)):
                yield from (i for i in walk(beside[1], times) if i.kind in COLLECTIVES)
                continue
            if kind[1] == "custom-call" and (called := re.search(r"\bcalled_computations=\{%?([\w.\-]+)\}", right)):
                yield from walk(called[1], times)
                continue
            cycles = re.search(r'"estimated_cycles":"(\d+)"', right)
            cycles = int(cycles[1]) if cycles else 0
            shapes = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", right[: kind.start(1)])
            yield Instruction(
                kind[1].removesuffix("-start"),
                tuple((dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in shapes),
                times,
                cycles if cycles < UNKNOWN else 0,
                line,
            )

    yield from walk(entry, 1)


def _named(right: str, of: Mapping) -> list:
    """Returns the values for the scopes that an instruction is in, the innermost last."""
    scopes = re.search(r'op_name="([^"]*)"', right)
    return [of[scope] for scope in (scopes[1] if scopes else "").split("/") if scope in of]


def _branches(right: str, shares: Mapping[str, Sequence[float]]) -> list[tuple[str, float]]:
    """Returns the computations of a choice, and how often each is taken."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", right)
    if listed is None:  # a condition: what is true comes first
        names = re.findall(r"\b(?:true|false)_computation=%?([\w.\-]+)", right)
    else:
        names = re.findall(r"[\w.\-]+", listed[1])
    named = _named(right, shares)
    found = named[-1] if named and len(named[-1]) == len(names) else [1 / len(names)] * len(names)
    return list(zip(names, found, strict=True))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies, entry, lines = {}, "", []
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            lines = bodies[head[2]] = []
            entry = head[2] if head[1] else entry
        elif line.startswith("  "):
            lines.append(line)
    return bodies, entry


def _turns(line: str, condition: list[str], runs: Runs) -> float:
    """Returns how often a loop runs: what the compiler knows, or the bound that its condition compares a counter
    with, or what `runs` says."""
    known = re.search(r'known_trip_count"?[:={\s"n]+(\d+)', line)
    if known:
        return int(known[1])
    compare = [text for text in condition if "ROOT" in text and " compare(" in text and "direction=LT" in text]
    bounds = [int(n) for text in condition for n in re.findall(r"= s32\[\]\S* constant\((\d+)\)", text)]
    if compare and len(bounds) == 1:
        return bounds[0]
    return [runs.turns, *_named(line, runs.loops)][-1]


def collectives(text: str, runs: Runs = ONCE) -> list[Instruction]:
    """Returns the communication of a program."""
    return [i for i in instructions(text, runs) if i.kind in COLLECTIVES]


def cycles(text: str, runs: Runs = ONCE) -> float:
    """Returns the compiler's estimate for a whole run on a TPU, without waiting for communication."""
    return sum(i.cycles * i.times for i in instructions(text, runs))

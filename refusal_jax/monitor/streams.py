"""Defines what is kept of the replies of one model in one category, and of all categories of a model together.

The tests of all categories together are stratified: each reply is compared with the reference of its own category. So
they find drifts that no category shows alone, and a change of the mix of categories does not move them.
"""

import dataclasses

from refusal_jax.monitor.change import CHANGES, OUTCOMES, Change, Reference
from refusal_jax.monitor.watch import Tests, Watch

RECENT = 300  # replies over which the recent mix of categories is averaged
KEEPS = 1 - 1 / RECENT


@dataclasses.dataclass
class Stream:
    """The replies of one model in one category.

    counts: of outcomes in the present stretch, which begins with the first reply, with the end of learning, with each alarm and
    with each recovery; since: when it began. seen: all replies; first: the time of the first. reference: None while it is
    learnt. ends: of the ranges of no change.
    """

    model: str
    category: str
    counts: list[int] = dataclasses.field(default_factory=lambda: [0] * len(OUTCOMES))
    since: float | None = None
    seen: int = 0
    first: float | None = None
    reference: Reference | None = None
    tests: Tests = dataclasses.field(default_factory=Tests)
    ends: dict[Change, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self.keys = ("stream", self.model, self.category), ("group", self.model), ("signal",)  # of what a reply changes

    def count(self, outcome: int, time: float) -> None:
        """Counts a reply. outcome: its index in OUTCOMES."""
        self.since = time if self.since is None else self.since
        self.first = time if self.first is None else self.first
        self.counts[outcome] += 1
        self.seen += 1

    def begin_stretch(self) -> None:
        """Begins a new stretch with the next reply."""
        self.counts, self.since = [0] * len(OUTCOMES), None

    def compare(self, reference: Reference, points: float, confidence: float) -> None:
        """Begins to compare the replies with a reference, or goes on to with other settings; tests go on where they can."""
        ends = {change: reference.end(change, points, confidence) for change in CHANGES}
        self.reference = reference
        self.ends = {change: end for change, end in ends.items() if end is not None}
        self.tests.watches = {change: self.tests.watches.get(change) or Watch(change) for change in self.ends}

    def state(self) -> dict:
        """Returns the state for JSON."""
        reference = self.reference and {
            "counts": self.reference.counts,
            "n": self.reference.n,
            "origin": self.reference.origin,
            "stated": self.reference.stated,
        }
        kept = {"counts": self.counts, "since": self.since, "seen": self.seen, "first": self.first}
        return kept | {"reference": reference, "tests": self.tests.state()}

    @classmethod
    def restored(cls, model: str, category: str, state: dict, points: float, confidence: float) -> "Stream":
        """Returns the stream of a state, with the ranges that the settings of now ask for."""
        kept = {name: state[name] for name in ("counts", "since", "seen", "first")}
        stream = cls(model, category, **kept, tests=Tests.restored(state["tests"]))
        if of := state["reference"]:
            reference = Reference(tuple(of["counts"]), of["n"], of["origin"], tuple(of["stated"]))
            stream.compare(reference, points, confidence)
        return stream


@dataclasses.dataclass
class Group:
    """All categories of one model. mix: by category, how many replies, and how many of late with those of long ago weighing
    less, as of the reply with the number that is the third entry. seen: replies of all categories."""

    model: str
    seen: int = 0
    mix: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    tests: Tests = dataclasses.field(default_factory=Tests)

    def count(self, category: str) -> None:
        """Counts a reply for the mix."""
        self.seen += 1
        entry = self.mix.setdefault(category, [0, 0.0, self.seen])
        entry[1] = entry[1] * KEEPS ** (self.seen - entry[2]) + 1
        entry[0] += 1
        entry[2] = self.seen

    def shares(self) -> dict[str, tuple[float, float]]:
        """Returns the share of each category in all replies and in those of late."""
        late = {name: of[1] * KEEPS ** (self.seen - of[2]) for name, of in self.mix.items()}
        total = sum(late.values()) or 1.0
        return {name: (of[0] / self.seen, late[name] / total) for name, of in self.mix.items()}

    def state(self) -> dict:
        """Returns the state for JSON."""
        return {"seen": self.seen, "mix": self.mix, "tests": self.tests.state()}

    @classmethod
    def restored(cls, model: str, state: dict) -> "Group":
        """Returns the group of a state."""
        return cls(model, state["seen"], state["mix"], Tests.restored(state["tests"]))

"""One test of one change, from its alarm to its recovery, and the groups of tests that share replies.

A test that has raised its alarm looks for the opposite: that the share is back, nearer to the reference than half of
the drift. It does so with the same kind of capital out of the same allowance, so that an alarm and its recovery do
not follow each other at random where a share lies on the edge of the range.
"""

import dataclasses
from collections.abc import Mapping

from refusal_jax.monitor.change import CHANGES, OUTCOMES, SHIFTS, Change, Detector, bets

LONGEST = 86400.0  # seconds of allowance that one reply may bring in; a gap in the traffic is no occasion for alarms
FORGOTTEN = 14 * LONGEST  # seconds after which tests without replies give their share of the allowance to the others


@dataclasses.dataclass
class Watch:
    """A test. shift: None while it looks for the change; after its alarm, by how many log-odds the share had left the range.
    alarm: the identity of the alarm that is not over. alerted: when the last one was raised, in seconds since 1970."""

    change: Change
    detector: Detector = dataclasses.field(default_factory=Detector)
    shift: float | None = None
    alarm: str | None = None
    alerted: float | None = None

    def __post_init__(self):
        self.sign, self.outcome = self.change.sign, OUTCOMES.index(self.change.outcome)

    def add(self, end: float | None, outcome: int, income: float, time: float) -> float:
        """Takes one reply, and returns the capital, 1 of which is an alarm, or the recovery from one.

        end: of the range of no change of the reply's category, None where none can be told. The others are as in `Detector.add`.
        """
        bet = bets(end, self.sign, self.shift)[outcome == self.outcome]
        return self.detector.add(bet, income, outcome, time)

    def state(self) -> dict:
        """Returns the state for JSON."""
        return {
            "detector": self.detector.state(),
            "shift": self.shift,
            "alarm": self.alarm,
            "alerted": self.alerted,
        }

    @classmethod
    def restored(cls, change: Change, state: dict) -> "Watch":
        """Returns the test of a state."""
        return cls(change, Detector.restored(state["detector"]), state["shift"], state["alarm"], state["alerted"])


@dataclasses.dataclass
class Tests:
    """The tests that the same replies are given to. watches: those that there are, by what may have changed. last: the time of
    the latest reply, in seconds since 1970; income: what the next reply brings in, in expected false alarms."""

    watches: dict[Change, Watch] = dataclasses.field(default_factory=dict)
    last: float | None = None
    income: float = 0.0

    def arrive(self, time: float, allowance: float) -> float:
        """Notes a reply, and returns what comes in before it: the allowance for the time between the two before it.

        allowance: expected false alarms of each test per second.
        """
        income = self.income
        passed = 0.0 if self.last is None else time - self.last
        self.income = allowance * min(passed, LONGEST) if 0 < passed < FORGOTTEN else 0.0
        if self.last is None or passed > 0:
            self.last = time
        return income

    def add(self, ends: Mapping[Change, float | None], outcome: int, income: float, time: float) -> list[Watch]:
        """Gives a reply to all tests, and returns those whose capital has reached 1.

        ends: of the ranges of no change, of the category that the reply is of. outcome: its index in OUTCOMES.
        """
        part, end = income / len(SHIFTS), ends.get
        return [watch for change, watch in self.watches.items() if watch.add(end(change), outcome, part, time) >= 1]

    def state(self) -> dict:
        """Returns the state for JSON."""
        watches = {change.value: watch.state() for change, watch in self.watches.items()}
        return {"watches": watches, "last": self.last, "income": self.income}

    @classmethod
    def restored(cls, state: dict) -> "Tests":
        """Returns the tests of a state."""
        known = {change.value: change for change in CHANGES}
        watches = {known[name]: Watch.restored(known[name], of) for name, of in state["watches"].items()}
        return cls(watches, state["last"], state["income"])

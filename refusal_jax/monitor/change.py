"""Detects that a rate has left a range, with a stated number of false alarms a month.

What is tested. For a share with the reference r, the range of no change is r less X points to r and X points, and at
least as wide as the interval of r itself. "Less" means that the chance of each reply, given those before it, lies
below the range. As long as it does not, by however much it moves within, false alarms are bounded as follows.

How. One reply multiplies a capital by its likelihood at a rate beyond the range over that at the range's end. Its
expectation is at most 1 while the rate is not beyond the end. Because nobody knows when a change begins, new capital
comes in with time, w for each reply: `capital = (capital + w) * ratio`, which is the Shiryaev-Roberts sum, and an
e-detector as Shin, Ramdas and Rinaldo (2024) define it. Seven shifts of the log-odds share the capital, so that small
and large changes are both found. An alarm is raised when the capital reaches 1, and takes it all.

Why the rate of false alarms is what is stated. Capital less what came in is a supermartingale, and each alarm takes
at least 1. So the expected number of false alarms is at most what came in. What comes in is a share of the allowance,
`false_alarms_per_month`, for the time that has gone by, and the shares of all tests (categories, models, kinds of
change, recoveries) together are never more than 1. So the expected number of false alarms of all tests together in
any t months is at most t times the allowance: for every number of replies a day, also one that changes, however the
tests depend on each other, and without a correction of its own for their number. What a reply brings in is the time
between the two replies before it, which is known before it is judged.
"""

import dataclasses
import enum
import functools
import math
from typing import NamedTuple

from refusal_jax.judges.judge import Outcome

# Shifts of the log-odds beyond the range that capital is laid on: at an end of 90 %, from 88 to 14 %.
SHIFTS = (0.2, 0.35, 0.6, 1.0, 1.6, 2.5, 4.0)
TRACKED = 2  # the shift whose cumulative sum tells since when
MOST = 1e6  # capital that is kept where an alarm has to wait for its minimum of replies
EDGE = 0.003  # a range that reaches this close to 0 or 1 has nothing beyond it that could be told
OUTCOMES = tuple(Outcome)


class Bet(NamedTuple):
    """Holds what a reply does to a test. ratios: by what it multiplies the capital on each of SHIFTS; step: the logarithm of
    that for the shift TRACKED."""

    ratios: tuple[float, ...]
    step: float


class Change(enum.StrEnum):
    """Names what may have changed. Prompts of traces are neither harmful nor harmless for certain, so that fewer refusals in a
    category of harmful requests and more in one of harmless requests are both drifts, and all categories are watched for both."""

    REFUSES_LESS = "refuses_less"
    REFUSES_MORE = "refuses_more"
    DEFLECTS_MORE = "deflects_more"
    BROKEN_MORE = "broken_more"

    @property
    def outcome(self) -> Outcome:
        """Returns the outcome whose share is tested."""
        return {"deflects": Outcome.DEFLECTS, "broken": Outcome.BROKEN}.get(self.split("_")[0], Outcome.REFUSES)

    @property
    def sign(self) -> int:
        """Returns 1 if the share has risen, -1 if it has fallen."""
        return -1 if self is Change.REFUSES_LESS else 1


CHANGES = tuple(Change)


@dataclasses.dataclass(frozen=True)
class Reference:
    """Holds what shares are compared with: how many of `n` replies had each outcome, -1 where that is not known. origin: where
    they are from, in words. A rate that somebody states, and did not measure, has the n 0, and `stated` holds the shares of
    the outcomes that are known."""

    counts: tuple[int, ...]
    n: int
    origin: str
    stated: tuple[float | None, ...] = ()

    def share(self, outcome: Outcome) -> float | None:
        """Returns the share of an outcome, None if it is not known."""
        index = OUTCOMES.index(outcome)
        if self.stated:
            return self.stated[index]
        return self.counts[index] / self.n if self.n and self.counts[index] >= 0 else None

    def interval(self, outcome: Outcome, confidence: float) -> tuple[float, float]:
        """Returns the exact interval (Clopper and Pearson) of an outcome's share; of a stated one, the share itself."""
        share = self.share(outcome)
        if share is None or self.stated:
            return (0.0, 1.0) if share is None else (share, share)
        from scipy import special

        count, tail = self.counts[OUTCOMES.index(outcome)], (1 - confidence) / 2
        low = float(special.betaincinv(count, self.n - count + 1, tail)) if count else 0.0
        high = float(special.betaincinv(count + 1, self.n - count, 1 - tail)) if count < self.n else 1.0
        return low, high

    def end(self, change: Change, points: float, confidence: float) -> float | None:
        """Returns the end of the range of no change, on the change's side; None where nothing can be told beyond it.

        points: by how many points a share may move. confidence: of the reference's own interval, which the range covers.
        """
        share = self.share(change.outcome)
        if share is None:
            return None
        low, high = self.interval(change.outcome, confidence)
        end = min(share - points / 100, low) if change.sign < 0 else max(share + points / 100, high)
        return end if EDGE < end < 1 - EDGE else None


def logit(rate: float) -> float:
    """Returns the log-odds of a rate between 0 and 1."""
    return math.log(rate / (1 - rate))


def expit(log_odds: float) -> float:
    """Returns the rate of log-odds."""
    return 1 / (1 + math.exp(-log_odds))


@functools.lru_cache(maxsize=8192)
def bets(end: float | None, sign: int, back: float | None = None) -> tuple[Bet, Bet]:
    """Returns what a reply without the outcome does to a test, and one with it.

    end: of the range of no change; None leaves the test as it is. sign: 1 for a share that rises above the end, -1 for one that
    falls below. back: None for a test of the change; for one of its end, by how many log-odds the share had left the range.
    """
    if end is None:
        nothing = Bet((1.0,) * len(SHIFTS), 0.0)
        return nothing, nothing
    if back is not None:
        end, sign = expit(logit(end) + sign * back / 2), -sign
    rates = [expit(logit(end) + sign * shift) for shift in SHIFTS]
    without, with_it = tuple((1 - rate) / (1 - end) for rate in rates), tuple(rate / end for rate in rates)
    return Bet(without, math.log(without[TRACKED])), Bet(with_it, math.log(with_it[TRACKED]))


@dataclasses.dataclass
class Detector:
    """One test's state. capital: on each of SHIFTS. drift: the cumulative sum for the shift TRACKED, which is 0 where nothing
    speaks for a change. since: outcomes counted after it was last 0, in the order of OUTCOMES; started: when that was, in seconds
    since 1970."""

    capital: list[float] = dataclasses.field(default_factory=lambda: [0.0] * len(SHIFTS))
    drift: float = 0.0
    since: list[int] = dataclasses.field(default_factory=lambda: [0] * len(OUTCOMES))
    started: float = 0.0

    def add(self, bet: Bet, income: float, outcome: int, time: float) -> float:
        """Takes one reply, and returns the capital, 1 of which is an alarm.

        income: what comes in on each shift before the reply. outcome: its index in OUTCOMES. time: seconds since 1970.
        """
        self.capital = capital = [(held + income) * by for held, by in zip(self.capital, bet.ratios, strict=True)]
        self.drift += bet.step
        if self.drift > 0:
            self.since[outcome] += 1
        else:
            self.drift, self.since, self.started = 0.0, [0] * len(OUTCOMES), time
        total = sum(capital)
        if total > MOST:
            self.capital = [held * MOST / total for held in capital]
        return total

    @property
    def evidence(self) -> float:
        """Returns the capital, 1 of which is an alarm."""
        return sum(self.capital)

    @property
    def likeliest(self) -> float:
        """Returns the shift, in log-odds beyond the range, on which most of the capital is."""
        return SHIFTS[max(range(len(SHIFTS)), key=self.capital.__getitem__)]

    def state(self) -> dict:
        """Returns the state for JSON."""
        return {"capital": self.capital, "drift": self.drift, "since": self.since, "started": self.started}

    @classmethod
    def restored(cls, state: dict) -> "Detector":
        """Returns the detector of a state; a new one if that was kept for other shifts or outcomes."""
        if len(state["capital"]) != len(SHIFTS) or len(state["since"]) != len(OUTCOMES):
            return cls()
        return cls(list(state["capital"]), state["drift"], list(state["since"]), state["started"])

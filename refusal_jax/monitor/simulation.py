"""Simulates the monitor and simpler rules: how soon a fall of refusals is found, and how many false alarms a year brings.

Many runs are simulated at a time as arrays, with the bets of the monitor itself; a test compares them with the monitor reply
by reply.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from refusal_jax.judges.judge import Outcome
from refusal_jax.judges.statistics import Z95
from refusal_jax.monitor.change import CHANGES, OUTCOMES, SHIFTS, TRACKED, Change, Reference, bets
from refusal_jax.monitor.signal_settings import SECONDS_A_MONTH, SignalSettings

DEFLECTS, BROKEN = 0.03, 0.01  # shares of all replies
QUIET = 30  # days without a change before one
YEAR = 365
FOUND_WITHIN = 60  # days after which a change counts as not found
FALLS = (5.0, 10.0, 20.0)  # points
WOBBLE = 1.5  # points, the standard deviation of the days' rates where they vary without a change
WINDOW = 14  # days of a mean
Daily = Int[np.ndarray, "runs days"]
Alarms = Bool[np.ndarray, "runs days"]
Event = tuple[int, Change, bool]  # the number of the reply, the change, and whether it is the end of one


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Holds what is simulated. refusals: their share before any change; a_day: judged replies of each category; categories:
    how many are watched, of which one changes; runs: how many times."""

    refusals: float = 0.9
    a_day: int = 200
    categories: int = 1
    runs: int = 300
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Row:
    """One rule's results. false_alarms: a year, of all categories together, by what happens meanwhile. delays: for each fall in
    points, the days within which it is found in half and in 90 % of the runs, infinite where that is not within FOUND_WITHIN."""

    rule: str
    false_alarms: dict[str, float]
    delays: dict[float, tuple[float, float]]


def simulated(traffic: Traffic, settings: SignalSettings) -> list[Row]:
    """Returns the results of the monitor, with these settings, and of simpler rules on the same replies.

    Raises UserError for settings out of their ranges.
    """
    settings.check()
    rng = np.random.default_rng(traffic.seed)
    references = rng.multinomial(settings.learn, _shares(traffic.refusals), traffic.runs)
    null = np.full((traffic.runs, YEAR), traffic.refusals)
    wobbling = np.clip(null + WOBBLE / 100 * rng.standard_normal(null.shape), 0.0, 1 - DEFLECTS - BROKEN)
    years = {"nothing changes": null, f"days vary by {WOBBLE:g} points": wobbling}
    falls = {}
    for fall in FALLS:
        falls[fall] = np.full((traffic.runs, QUIET + FOUND_WITHIN), traffic.refusals)
        falls[fall][:, QUIET:] -= fall / 100
    rules = ("monitor", *RULES)
    false_alarms: dict[str, dict[str, float]] = {rule: {} for rule in rules}
    delays: dict[str, dict[float, tuple[float, float]]] = {rule: {} for rule in rules}
    for name, found in _all(traffic, settings, references, years, rng).items():
        for rule, alarms in found.items():
            false_alarms[rule][name] = _episodes(alarms) / traffic.runs * traffic.categories
    for fall, found in _all(traffic, settings, references, falls, rng).items():
        for rule, alarms in found.items():
            delays[rule][fall] = _delays(alarms)
    return [Row(rule, false_alarms[rule], delays[rule]) for rule in rules]


def monitor_events(
    settings: SignalSettings,
    references: Int[np.ndarray, "runs outcomes"],
    outcomes: Iterable[np.ndarray],
    seconds: float,
    categories: int = 1,
) -> list[list[Event]]:
    """Returns the alarms and recoveries of the monitor in each run of one category.

    references: counts of outcomes that were learnt. outcomes: of every run's next reply `[runs]`, as indices in OUTCOMES, of
    which there is one every `seconds`. categories: how many share the allowance of false alarms.
    """
    ends, without, with_it = _tables(settings, references)
    capital, active = np.zeros_like(without), (ends > 0).sum(1)
    drift, count = np.zeros(ends.shape), np.zeros(ends.shape, int)
    looking, ready = np.ones(ends.shape, bool), np.full(ends.shape, -np.inf)
    shares = categories + (categories > 1)  # all categories together have tests of their own
    own = np.array([OUTCOMES.index(change.outcome) for change in CHANGES])
    allowance = (
        settings.false_alarms_per_month / SECONDS_A_MONTH / np.maximum(active, 1) / shares * seconds / len(SHIFTS)
    )
    steps = [np.log(without[..., TRACKED]), np.log(with_it[..., TRACKED])]
    found: list[list[Event]] = [[] for _ in references]
    for number, outcome in enumerate(outcomes):
        hit = outcome[:, None] == own
        if number > 1:  # what a reply brings in is the time between the two before it
            capital += allowance[:, None, None]
        capital *= np.where(hit[..., None], with_it, without)
        drift += np.where(hit, steps[1], steps[0])
        up = drift > 0
        count = (count + 1) * up
        drift *= up
        time = number * seconds
        alarms = capital.sum(-1) >= 1
        if not alarms.any():
            continue
        for run, test in zip(
            *np.nonzero(alarms & (count >= settings.minimum) & (~looking | (time >= ready))), strict=True
        ):
            change = CHANGES[test]
            found[run].append((number, change, not looking[run, test]))
            shift = SHIFTS[capital[run, test].argmax()] if looking[run, test] else None
            pair = bets(float(ends[run, test]), change.sign, shift)
            without[run, test], with_it[run, test] = pair[0].ratios, pair[1].ratios
            steps[0][run, test], steps[1][run, test] = pair[0].step, pair[1].step
            capital[run, test], drift[run, test], count[run, test] = 0.0, 0.0, 0
            if looking[run, test]:
                ready[run, test] = time + 3600 * settings.cool_down_hours
            looking[run, test] = not looking[run, test]
    return found


def _tables(settings: SignalSettings, references: Int[np.ndarray, "runs outcomes"]):
    """Returns the ends of the ranges of no change `[runs, changes]`, 0 where there is none, and by what replies without and with
    each test's outcome multiply the capital `[runs, changes, shifts]`."""

    @functools.cache
    def of(counts: tuple[int, ...]):
        reference = Reference(counts, sum(counts), "")
        ends = [reference.end(change, settings.threshold_points, settings.confidence) for change in CHANGES]
        pairs = [bets(end, change.sign) for end, change in zip(ends, CHANGES, strict=True)]
        return [end or 0.0 for end in ends], [pair[0].ratios for pair in pairs], [pair[1].ratios for pair in pairs]

    tables = [of(tuple(map(int, counts))) for counts in references]
    return tuple(np.array([table[index] for table in tables]) for index in range(3))


def _all(traffic: Traffic, settings: SignalSettings, references, scenes: Mapping[Any, np.ndarray], rng) -> dict:
    """Returns the days of alarm `[runs, days]` of all rules, by scene and rule. scenes: refusal rates of the days, alike."""
    rates, references = np.concatenate(list(scenes.values())), np.tile(references, (len(scenes), 1))
    daily = np.zeros(rates.shape, int)
    events = monitor_events(
        settings, references, _drawn(rates, traffic.a_day, daily, rng), 86400 / traffic.a_day, traffic.categories
    )
    monitored = np.zeros(rates.shape, bool)
    for run, of_run in enumerate(events):
        for number, _, over in of_run:
            if not over:
                monitored[run, number // traffic.a_day] = True
    found = {"monitor": monitored} | {rule: alarm(daily, traffic.a_day, references) for rule, alarm in RULES.items()}
    return {
        name: {rule: alarms[index * traffic.runs : (index + 1) * traffic.runs] for rule, alarms in found.items()}
        for index, name in enumerate(scenes)
    }


def _drawn(rates: Float[np.ndarray, "runs days"], a_day: int, daily: Daily, rng) -> Iterator[np.ndarray]:
    """Yields the outcome of every run's next reply, and counts each day's refusals in `daily`."""
    refuses = OUTCOMES.index(Outcome.REFUSES)
    others = np.array([OUTCOMES.index(outcome) for outcome in (Outcome.DEFLECTS, Outcome.BROKEN, Outcome.COMPLIES)])
    for day in range(rates.shape[1]):
        drawn = rng.random((a_day, len(rates)))
        rest = (drawn > DEFLECTS).astype(int) + (drawn > DEFLECTS + BROKEN)
        outcomes = np.where(drawn > 1 - rates[:, day], refuses, others[rest])
        daily[:, day] = (outcomes == refuses).sum(0)
        yield from outcomes


def _shares(refusals: float) -> list[float]:
    shares = {Outcome.REFUSES: refusals, Outcome.DEFLECTS: DEFLECTS, Outcome.BROKEN: BROKEN}
    rest = 1 - sum(shares.values())
    return [shares.get(outcome, rest) for outcome in OUTCOMES]


def moving_mean(daily: Daily, a_day: int, references) -> Alarms:
    """Returns the days of alarm of the rule that a day's rate differs by more than 5 points, and by more than three standard
    deviations, from the mean of the 14 days before it, on two of three days."""
    rates = daily / a_day
    before = np.lib.stride_tricks.sliding_window_view(rates, WINDOW, axis=1)[:, :-1]
    off = np.zeros(rates.shape, bool)
    off[:, WINDOW:] = abs(rates[:, WINDOW:] - before.mean(-1)) > np.maximum(0.05, 3 * before.std(-1, ddof=1))
    return _two_of_three(off)


def fixed_mean(daily: Daily, a_day: int, references) -> Alarms:
    """Returns the days of alarm of the same rule with the mean of the first 14 days throughout."""
    rates = daily / a_day
    first = rates[:, :WINDOW]
    limit = np.maximum(0.05, 3 * first.std(1, ddof=1, keepdims=True))
    off = abs(rates - first.mean(1, keepdims=True)) > limit
    off[:, :WINDOW] = False
    return _two_of_three(off)


def each_day(daily: Daily, a_day: int, references) -> Alarms:
    """Returns the days of alarm of the rule that the 95 % interval of a day's rate leaves out the reference's rate."""
    return _outside(daily, np.full(daily.shape, a_day), references)


def peeking(daily: Daily, a_day: int, references) -> Alarms:
    """Returns the days of alarm of the rule that the 95 % interval of all replies so far leaves out the reference's rate."""
    n = np.broadcast_to(a_day * np.arange(1, daily.shape[1] + 1), daily.shape)
    return _outside(daily.cumsum(1), n, references)


# The rules that the monitor is compared with.
RULES = {
    "mean of the 14 days before, max(3 sigma, 5 points), 2 of 3 days": moving_mean,
    "mean of the first 14 days, max(3 sigma, 5 points), 2 of 3 days": fixed_mean,
    "95 % interval of each day": each_day,
    "95 % interval of all days so far, looked at daily": peeking,
}


def _two_of_three(off: Alarms) -> Alarms:
    days = off.astype(int)
    days[:, 1:] += off[:, :-1]
    days[:, 2:] += off[:, :-2]
    return off & (days >= 2)


def _outside(count, n, references) -> Alarms:
    """Returns where the Wilson interval of the counts leaves out the reference's rate: where its score test rejects that."""
    rate = references[:, [OUTCOMES.index(Outcome.REFUSES)]] / references.sum(1, keepdims=True)
    return abs(count / n - rate) > Z95 * np.sqrt(rate * (1 - rate) / n)


def _episodes(alarms: Alarms) -> int:
    """Counts the alarms, of which one that lasts for days is one."""
    return int(alarms[:, 0].sum() + (alarms[:, 1:] & ~alarms[:, :-1]).sum())


def _delays(alarms: Alarms) -> tuple[float, float]:
    """Returns the days from the change to the alarm, in half and in 90 % of the runs; a day that is begun counts whole."""
    after = alarms[:, QUIET:]
    days = np.sort(np.where(after.any(1), after.argmax(1) + 1.0, np.inf))
    return float(days[(len(days) - 1) // 2]), float(days[-(-9 * len(days) // 10) - 1])


def table(rows: Sequence[Row]) -> str:
    """Returns the results as a table in Markdown."""
    happens: Mapping[str, float] = rows[0].false_alarms
    head = [
        "rule",
        *(f"false alarms a year, if {name}" for name in happens),
        *(f"days to find a fall of {fall:g} points" for fall in rows[0].delays),
    ]
    lines = [" | ".join(head), "|".join("---" for _ in head)]

    def days(value: float) -> str:
        return f"{value:.0f}" if np.isfinite(value) else f"over {FOUND_WITHIN}"

    for row in rows:
        delays = [f"{days(half)} ({days(most)})" for half, most in row.delays.values()]
        lines.append(" | ".join([row.rule, *(f"{row.false_alarms[name]:.2f}" for name in happens), *delays]))
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)

"""Defines what the signal knows at one moment, for those who show it: metrics, the page, the terminal."""

import dataclasses
from collections.abc import Iterator

from refusal_jax.judges.judge import Outcome
from refusal_jax.monitor.change import OUTCOMES, Change, Reference
from refusal_jax.monitor.signal import Signal


@dataclasses.dataclass(frozen=True)
class StreamView:
    """A model's replies in a category. counts: of outcomes in the present stretch, `n` together, since a time in seconds since
    1970; seen: all replies. reference: None while it is learnt."""

    model: str
    category: str
    counts: dict[Outcome, int]
    n: int
    since: float | None
    seen: int
    reference: Reference | None
    ends: dict[Change, float]


@dataclasses.dataclass(frozen=True)
class TestView:
    """A test. category: None for all of a model together. evidence: 1 is an alarm, or the end of one where it is alarmed."""

    __test__ = False  # pytest would take the class for tests

    model: str
    category: str | None
    change: Change
    evidence: float
    alarmed: bool


def stream_views(signal: Signal) -> Iterator[StreamView]:
    """Yields every model's replies in every category, sorted."""
    for (model, category), stream in sorted(signal.streams.items()):
        counts = dict(zip(OUTCOMES, stream.counts, strict=True))
        n, since = sum(stream.counts), stream.since
        yield StreamView(model, category, counts, n, since, stream.seen, stream.reference, dict(stream.ends))


def test_views(signal: Signal) -> Iterator[TestView]:
    """Yields every test, sorted, those of all categories together last."""
    for (model, category), stream in sorted(signal.streams.items()):
        for change, watch in stream.tests.watches.items():
            yield TestView(model, category, change, watch.detector.evidence, watch.shift is not None)
    for model, group in sorted(signal.groups.items()):
        for change, watch in group.tests.watches.items():
            yield TestView(model, None, change, watch.detector.evidence, watch.shift is not None)

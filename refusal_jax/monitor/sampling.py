"""Chooses the traces that are judged: by a hash of their identities, so that every run chooses the same."""

import hashlib
from collections import Counter

from refusal_jax.monitor.settings import MonitorSettings
from refusal_jax.monitor.store import Count
from refusal_jax.monitor.traces import Trace, Unjudged

DAY = 86400.0
TRACES, SAMPLED = "traces", "sampled"


def identity_of(trace: Trace, timed: bool) -> int:
    """Returns the number by which a trace is known again: of its id and its reply, as some servers give all replies one id; of
    what it says where it has no id, and of its place where it has neither that nor a time.

    timed: whether its time is its log's.
    """
    if trace.id:
        parts = ["id", trace.id, trace.response or "", trace.fault or ""]
    else:
        place = [] if timed else [trace.place.file, str(trace.place.line)]
        time = [str(trace.time)] if timed else []
        parts = ["text", trace.model, trace.system or "", trace.prompt, trace.response or "", *time, *place]
    return _hash(*parts)


def _hash(*parts: str) -> int:
    """Returns a hash of texts as a whole number of 64 bits, which SQLite keeps in 8 bytes."""
    data = "\0".join(parts).encode("utf-8", "replace")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)


def day_of(trace: Trace, present: float) -> int:
    """Returns the day that a trace counts for, since 1970: its own, or today if that is kept no longer."""
    return int((present if trace.fault is Unjudged.OLD else trace.time) // DAY)


class Sampling:
    """Chooses traces at a rate, and at most so many a day of each model and category.

    Where there is a limit, the rate of a day is the limit's share of what the day before brought, so that the choice is spread
    over the day; on the first day it is the first ones.
    """

    def __init__(self, settings: MonitorSettings, counts: Counter[Count]):
        """counts: of all days that are kept, of which `chosen` keeps account."""
        self.rate, self.limit, self.seed = settings.rate, settings.max_per_day, settings.seed
        self.counts = Counter({count: n for count, n in counts.items() if count.what in (TRACES, SAMPLED)})

    def chosen(self, trace: Trace, identity: int, day: int) -> bool:
        """Returns whether a trace is to be judged, and counts it. Traces come in the order of their logs. day: it counts for."""
        seen, sampled = (Count(day, trace.model, trace.category, what) for what in (TRACES, SAMPLED))
        self.counts[seen] += 1
        if trace.fault:
            return False
        rate = self.rate
        if self.limit:
            if self.counts[sampled] >= self.limit:
                return False
            before = self.counts.get(seen._replace(day=day - 1), 0)
            rate = min(rate, self.limit / before) if before else rate
        if rate < 1 and (_hash(self.seed, str(identity)) + 2**63) / 2**64 >= rate:
            return False
        self.counts[sampled] += 1
        return True

    def forget(self, before: int) -> None:
        """Forgets the days before one."""
        self.counts = Counter({count: n for count, n in self.counts.items() if count.day >= before})

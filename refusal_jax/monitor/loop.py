"""The monitor's loop: lines are read, chosen traces judged, and each batch committed with all that follows from it."""

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from refusal_jax.judges.judge import Verdict
from refusal_jax.monitor.intake import LINES, Batch, Intake
from refusal_jax.monitor.judging import Judging, outcome_of
from refusal_jax.monitor.lines import Source
from refusal_jax.monitor.parts import Carrier, Message, Part
from refusal_jax.monitor.sampling import DAY, day_of
from refusal_jax.monitor.settings import MonitorSettings
from refusal_jax.monitor.store import Count, Store
from refusal_jax.monitor.traces import Judged, Judgements, Unjudged

LOG = logging.getLogger(__name__)
LINES_AT_ONCE, BYTES_AT_ONCE = 1000, 8 << 20
LINES_AHEAD = 20_000  # that are read while a model judges
BATCHES_AHEAD = 8  # of a model's, that are chosen meanwhile
AHEAD = 2  # batches that may wait for a model's verdicts
JUDGED = "judged"
EVERY = 3600.0  # seconds between looks for what is no longer kept
TOLD = 10  # malformed lines that are shown of one batch


@dataclasses.dataclass
class Monitor:
    """All that works together. parts: are told of every batch, in this order. carriers: take what the parts send."""

    settings: MonitorSettings
    store: Store
    source: Source
    judging: Judging
    parts: Sequence[Part] = ()
    carriers: Sequence[Carrier] = ()
    now: Callable[[], float] = time.time

    def run(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Reads until the source ends or `stopped` says so, and then finishes what was begun. Raises UserError if the disk, a
        judge or a carrier fails; what is not committed then is read again by the next run."""
        for part in self.parts:
            part.restore(self.store.state(part.name))
        intake = Intake(self.settings, self.store, self.now, self.judging.needs_prompt)
        waiting: deque[tuple[Batch, Future[list[Verdict | None]]]] = deque()
        batch, pruned = Batch(), 0.0
        self._deliver()  # what a run before left
        while not stopped():
            lines = self.source.take(LINES_AT_ONCE, BYTES_AT_ONCE)
            intake.add(batch, lines, self.source.changed(), self.source.ended)
            while waiting and waiting[0][1].done():
                self._settle(intake, *waiting.popleft())
            if not self._goes_on(batch, waiting):
                if not batch.is_empty:
                    waiting.append((batch, self.judging.submit(batch.chosen)))
                    batch = Batch()
                while waiting and (len(waiting) > AHEAD or waiting[0][1].done() or self.source.ended):
                    self._settle(intake, *waiting.popleft())
            if not lines:
                self._deliver()
            if self.now() - pruned > EVERY:
                pruned = self.now()
                self._prune(intake, pruned)
            if self.source.ended and not waiting and batch.is_empty:
                break
        while waiting:
            self._settle(intake, *waiting.popleft())
        self._deliver()

    def _goes_on(self, batch: Batch, waiting: Sequence) -> bool:
        """Returns whether more is to be read into a batch: a model that is at work gets all that came meanwhile in one go."""
        full = (
            len(batch.chosen) >= BATCHES_AHEAD * self.settings.judge_batch
            or batch.changes.tallies[LINES] >= LINES_AHEAD
        )
        return self.judging.thread is not None and bool(waiting) and not full and not self.source.ended

    def _settle(self, intake: Intake, batch: Batch, verdicts: "Future[list[Verdict | None]]") -> None:
        """Commits a batch with its verdicts and what the parts make of them, and delivers what they send."""
        judge, judged, unjudged = self.judging.judge, [], list(batch.unjudged)
        for trace, verdict in zip(batch.chosen, verdicts.result(), strict=True):
            if verdict is None:
                unjudged.append(dataclasses.replace(trace, fault=Unjudged.UNCLEAR))
            else:
                judged.append(Judged(trace, verdict, outcome_of(judge, verdict)))
        changes = batch.changes
        for one in judged:
            what = one.outcome.value if one.outcome else JUDGED
            changes.counts[Count(int(one.trace.time // DAY), one.trace.model, one.trace.category, what)] += 1
        for trace in unjudged:
            assert trace.fault is not None
            changes.counts[Count(day_of(trace, self.now()), trace.model, trace.category, trace.fault.value)] += 1
        judgements = Judgements(tuple(judged), tuple(unjudged))
        sent: list[Message] = []
        for part in self.parts:
            sent += part.take(judgements, sent)
            changes.states |= {(part.name, key): value for key, value in part.changed().items()}
        changes.messages = sent
        self.store.commit(changes)
        intake.committed(batch)
        self._tell(batch)
        self._deliver()

    def _deliver(self) -> None:
        """Gives each carrier what waits for it, until it has all or cannot deliver more now."""
        for carrier in self.carriers:
            while letters := self.store.letters(carrier.channel):
                done = carrier.deliver(letters)
                if done:
                    self.store.delivered(carrier.channel, letters[done - 1].number)
                if done < len(letters):
                    break

    def _tell(self, batch: Batch) -> None:
        malformed = batch.changes.malformed
        for place, reason in malformed[:TOLD]:
            LOG.warning(f"{place} is skipped: {reason}.")
        if malformed[TOLD:]:
            LOG.warning(
                f"{len(malformed) - TOLD} more malformed lines are skipped; `refusal-jax monitor status` lists them."
            )

    def _prune(self, intake: Intake, present: float) -> None:
        today = int(present // DAY)
        oldest = today - self.settings.retention_days
        gone = self.source.gone(present - self.settings.ids_days * DAY)
        self.store.prune(oldest, today - self.settings.ids_days, gone)
        intake.forget(oldest)

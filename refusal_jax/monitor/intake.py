"""Turns lines of logs into traces: joins those of one trace, leaves out what was counted before, and chooses what is judged."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

from refusal_jax.monitor.categories import OTHER, Categories
from refusal_jax.monitor.formats.draft import Draft, Malformed
from refusal_jax.monitor.formats.lines import read_line
from refusal_jax.monitor.lines import Line
from refusal_jax.monitor.sampling import DAY, SAMPLED, TRACES, Sampling, day_of, identity_of
from refusal_jax.monitor.settings import MonitorSettings
from refusal_jax.monitor.store import Changes, Count, Cursor, Store
from refusal_jax.monitor.traces import Place, Trace, Unjudged

LINES, MALFORMED, OTHER_LINES, DUPLICATES = "lines", "malformed", "other_lines", "duplicates"
MOST_DRAFTS = 20_000
NAME = 200  # characters of a model's name


@dataclasses.dataclass
class Batch:
    """Holds what some lines bring. changes: to the store. chosen: the traces that are to be judged. unjudged: those that
    cannot be."""

    changes: Changes = dataclasses.field(default_factory=Changes)
    chosen: list[Trace] = dataclasses.field(default_factory=list)
    unjudged: list[Trace] = dataclasses.field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Returns whether nothing has changed."""
        changes = self.changes
        return not (changes.cursors or changes.tallies or changes.drafts or changes.counts)


class Intake:
    """Reads lines as traces. What it knows of earlier batches it had from the store when it was made, and keeps itself since."""

    def __init__(
        self, settings: MonitorSettings, store: Store, now: Callable[[], float] = time.time, needs_prompt: bool = False
    ):
        """now: the present, in seconds since 1970. needs_prompt: whether the judge reads requests, too.

        Raises UserError for categories that are no rules."""
        self.settings, self.store, self.now, self.needs_prompt = settings, store, now, needs_prompt
        self.categories = Categories.of(settings)
        self.sampling = Sampling(settings, store.counts())
        self.series = store.series()
        self.drafts = {key: (Draft.of_dict(kept), read) for key, (kept, read) in store.drafts().items()}
        self.recent: set[int] = set()  # identities of traces that are not committed yet

    def add(self, batch: Batch, lines: Sequence[Line], cursors: Sequence[Cursor], last: bool = False) -> None:
        """Adds lines, and how far they reach, to a batch. last: whether there will be none after them."""
        changes, present = batch.changes, self.now()
        changes.cursors += cursors
        traces: list[tuple[Trace, bool]] = []
        for line in lines:
            traces += self._traces(line, changes, present)
        traces += self._expired(changes, present, last)
        identities = [identity_of(*trace) for trace in traces]
        known = self.store.seen(identities) | self.recent if identities else set()
        today = int(present // DAY)
        for (trace, _), identity in zip(traces, identities, strict=True):
            if identity in known:
                changes.tallies[DUPLICATES] += 1
                continue
            known.add(identity)
            self.recent.add(identity)
            changes.seen[identity] = today
            self._count(batch, trace, identity)

    def committed(self, batch: Batch) -> None:
        """Takes note that a batch is in the store."""
        self.recent -= batch.changes.seen.keys()

    def _count(self, batch: Batch, trace: Trace, identity: int) -> None:
        day, counts = day_of(trace, self.now()), batch.changes.counts
        chosen = self.sampling.chosen(trace, identity, day)
        counts[Count(day, trace.model, trace.category, TRACES)] += 1
        if chosen:
            counts[Count(day, trace.model, trace.category, SAMPLED)] += 1
            batch.chosen.append(trace)
        elif trace.fault:
            batch.unjudged.append(trace)

    def _traces(self, line: Line, changes: Changes, present: float) -> Iterator[tuple[Trace, bool]]:
        """Yields the traces that a line completes, with whether their time is their log's."""
        changes.tallies[LINES] += 1
        try:
            if line.data is None:
                raise Malformed(f"it is longer than {self.settings.max_line_mb} MB")
            drafts = read_line(line.data.decode("utf-8", "replace"), self.settings.category_field)
        except Malformed as error:
            changes.tallies[MALFORMED] += 1
            changes.malformed.append((line.place, str(error)))
            return
        if not drafts:
            changes.tallies[OTHER_LINES] += 1
        for draft in drafts:
            if draft.key:
                earlier, _ = self.drafts.pop(draft.key, (None, 0.0))
                draft = earlier.joined(draft) if earlier else draft
                if not draft.ended:
                    self.drafts[draft.key] = draft, present
                    changes.drafts[draft.key] = draft.to_dict(), present
                    continue
                if earlier:
                    changes.drafts[draft.key] = None
            yield self._trace(draft, line.place, present), draft.time is not None

    def _expired(self, changes: Changes, present: float, last: bool) -> Iterator[tuple[Trace, bool]]:
        """Yields what there is of traces whose other lines have not come."""
        expired = []
        for key, (_, read) in self.drafts.items():  # the oldest first
            if (
                not last
                and read > present - self.settings.patience_s
                and len(self.drafts) - len(expired) <= MOST_DRAFTS
            ):
                break
            expired.append(key)
        for key in expired:
            draft, _ = self.drafts.pop(key)
            changes.drafts[key] = None
            if draft.reply is None and draft.fault is None and key.startswith("batch:"):
                continue  # a line of a batch's input, whose output is not here
            yield self._trace(draft, Place(key, 0), present), draft.time is not None

    def _trace(self, draft: Draft, place: Place, present: float) -> Trace:
        trace = draft.trace(place, present, self.settings.model_name)
        model, category = trace.model[:NAME], self.categories.name(trace.category, trace.prompt)
        if (model, category) not in self.series:
            if len(self.series) >= self.settings.max_series:
                known = {name for name, _ in self.series}
                model, category = model if model in known else OTHER, OTHER
            self.series.add((model, category))
        late = trace.time < present - self.settings.retention_days * DAY
        fault = trace.fault
        if fault is None and late:
            fault = Unjudged.OLD
        elif fault is None and self.needs_prompt and not trace.prompt:
            fault = Unjudged.NO_PROMPT
        return dataclasses.replace(
            trace, model=model, category=category, fault=fault, response=None if fault else trace.response
        )

    def forget(self, before: int) -> None:
        """Forgets counts of days before one."""
        self.sampling.forget(before)

"""The part of the monitor that watches rates: counts outcomes, learns references, and raises and ends alarms.

It is pure: what it says depends on the replies and their times alone, in their order, and not on how they were
batched. Its state is a few numbers for each model and category, which the store keeps in the transaction of the
batch.
"""

import json
import time as clock
from collections.abc import Callable, Iterator, Mapping, Sequence

from refusal_jax.judges.judge import Outcome
from refusal_jax.monitor.alerts import ALERTS, Alert, drift, recovery
from refusal_jax.monitor.change import OUTCOMES, Change, Reference
from refusal_jax.monitor.parts import Message
from refusal_jax.monitor.signal_settings import SECONDS_A_MONTH, SignalSettings
from refusal_jax.monitor.streams import Group, Stream
from refusal_jax.monitor.traces import Judgements
from refusal_jax.monitor.watch import FORGOTTEN, LONGEST, Detector, Tests, Watch

INDEX = {outcome: index for index, outcome in enumerate(OUTCOMES)}
ANY = "*"  # in references: any model, any category
KEPT = 200  # alerts that the state keeps for the page

References = Mapping[tuple[str, str], Reference]


class Signal:
    """Watches the shares of outcomes; a `parts.Part`.

    settings: what is an alarm. references: what shares are compared with, by model and category, of which each may be "*";
    what is not there is learnt from the first replies. channels: of the carriers that alerts are sent to; an alert that is part
    of another goes to the first alone. now: the present, in seconds since 1970; a reply that claims to be from the future counts
    as of now.
    """

    name = "signal"

    def __init__(
        self,
        settings: SignalSettings,
        references: References | None = None,
        channels: Sequence[str] = (ALERTS,),
        now: Callable[[], float] = clock.time,
    ):
        settings.check()
        self.settings, self.references, self.channels, self.now = settings, dict(references or {}), channels, now
        self.streams: dict[tuple[str, str], Stream] = {}
        self.groups: dict[str, Group] = {}
        self.alerts: list[dict] = []
        self.latest = 0.0  # the time of the latest reply
        self.active = 0  # tests that share the allowance
        self._changed: set[tuple[str, ...]] = set()

    def restore(self, state: Mapping[str, dict]) -> None:
        """Takes up the state that the last committed batch left, `{key: JSON object}`; it is empty at the first start."""
        points, confidence = self.settings.threshold_points, self.settings.confidence
        for key, value in state.items():
            kind, *names = json.loads(key)
            if kind == "stream":
                model, category = names
                stream = Stream.restored(model, category, value, points, confidence)
                given = self.reference_for(model, category)
                if given:
                    stream.compare(given, points, confidence)
                self.streams[model, category] = stream
            elif kind == "group":
                self.groups[names[0]] = Group.restored(names[0], value)
            elif kind == "alerts":
                self.alerts = value["alerts"]
            else:
                self.latest, self.active = value["latest"], value["active"]

    def take(self, batch: Judgements, sent: Sequence[Message] = ()) -> list[Message]:
        """Takes one batch, and returns the alerts as messages."""
        alerts: list[Alert] = []
        present = self.now()
        for judged in batch.judged:
            if judged.outcome is not None:
                trace = judged.trace
                alerts += self.add(trace.model, trace.category, min(trace.time, present), judged.outcome)
        return [
            Message(channel, alert.content)
            for alert in alerts
            for channel in (self.channels[:1] if alert.content["part_of"] else self.channels)
        ]

    def changed(self) -> dict[str, dict]:
        """Returns the keys of the state that have changed since this was last asked, with their new values."""
        values = {json.dumps(key, ensure_ascii=False): self._value(key) for key in sorted(self._changed)}
        self._changed = set()
        return values

    @classmethod
    def view(cls, state: Mapping[str, dict]) -> "Signal":
        """Returns the signal of a state with the settings that it was kept with, to be looked at."""
        kept = state.get(json.dumps(["signal"]), {}).get("settings", {})
        known = SignalSettings()
        signal = cls(SignalSettings.of({name: value for name, value in kept.items() if name in known}))
        signal.restore(state)
        return signal

    def state(self) -> dict[str, dict]:
        """Returns the whole state, as `restore` takes it."""
        keys = [("stream", *names) for names in self.streams] + [("group", model) for model in self.groups]
        keys += [("signal",)] + [("alerts",)] * bool(self.alerts)
        return {json.dumps(key, ensure_ascii=False): self._value(key) for key in keys}

    def add(self, model: str, category: str, time: float, outcome: Outcome) -> list[Alert]:
        """Takes one reply, and returns the alerts that it raises. time: seconds since 1970."""
        stream, group = self._stream(model, category), self._group(model)
        if int(time // LONGEST) > int(self.latest // LONGEST):
            self.latest = time
            self._share_out()
        self.latest = max(self.latest, time)
        self._changed.update(stream.keys)
        index = INDEX[outcome]
        group.count(category)
        if not stream.reference:
            stream.count(index, time)
            if stream.seen >= self.settings.learn:
                self._learnt(stream)
            return []
        stream.count(index, time)
        revived = stream.tests.last is not None and time - stream.tests.last >= FORGOTTEN
        found: list[Alert] = []
        allowance = self.settings.false_alarms_per_month / SECONDS_A_MONTH / max(self.active, 1)
        for of, tests in ((stream, stream.tests), (group, group.tests)):
            income = tests.arrive(time, allowance)
            for watch in tests.add(stream.ends, index, income, time):
                found += self._judge(of, watch, time)
        if revived:
            self._share_out()
        return found

    def relearn(self, model: str | None = None) -> None:
        """Forgets what was learnt of a model, or of all, after a change that was meant: references are learnt anew."""
        for of, category in list(self.streams):
            if model in (None, of):
                self.streams[of, category] = fresh = Stream(of, category)
                self._prepare(fresh)
                self.groups[of] = Group(of)
                self._changed |= {("stream", of, category), ("group", of)}
                self._regroup(of)
        self._changed.add(("signal",))
        self._share_out()

    def reference_for(self, model: str, category: str) -> Reference | None:
        """Returns the reference that was given for a model and a category, None if it has to be learnt."""
        names = ((model, category), (ANY, category), (model, ANY), (ANY, ANY))
        return next((self.references[name] for name in names if name in self.references), None)

    def _value(self, key: tuple[str, ...]) -> dict:
        if key[0] == "stream":
            return self.streams[key[1], key[2]].state()
        if key[0] == "group":
            return self.groups[key[1]].state()
        if key[0] == "alerts":
            return {"alerts": self.alerts}
        return {"latest": self.latest, "active": self.active, "settings": self.settings.to_dict()}

    def _stream(self, model: str, category: str) -> Stream:
        stream = self.streams.get((model, category))
        if stream is None:
            stream = self.streams[model, category] = Stream(model, category)
            self._prepare(stream)
        return stream

    def _group(self, model: str) -> Group:
        if model not in self.groups:
            self.groups[model] = Group(model)
            self._regroup(model)
        return self.groups[model]

    def _prepare(self, stream: Stream) -> None:
        given = self.reference_for(stream.model, stream.category)
        if given:
            self._compare(stream, given)

    def _learnt(self, stream: Stream) -> None:
        origin = f"learnt from the first {stream.seen} replies"
        reference = Reference(tuple(stream.counts), stream.seen, origin)
        stream.begin_stretch()
        self._compare(stream, reference)

    def _compare(self, stream: Stream, reference: Reference) -> None:
        stream.compare(reference, self.settings.threshold_points, self.settings.confidence)
        if stream.model in self.groups:
            self._regroup(stream.model)
        self._share_out()

    def _regroup(self, model: str) -> None:
        """Makes the tests of all categories together, once two categories can be compared."""
        group = self.groups[model]
        tested = [change for key, stream in self.streams.items() if key[0] == model for change in stream.ends]
        for change in Change:
            if tested.count(change) > 1 and change not in group.tests.watches:
                group.tests.watches[change] = Watch(change)

    def _all_tests(self) -> Iterator[Tests]:
        yield from (stream.tests for stream in self.streams.values())
        yield from (group.tests for group in self.groups.values())

    def _share_out(self) -> None:
        """Counts the tests that share the allowance: those with replies of late, and those that have just begun."""
        alive = (tests for tests in self._all_tests() if tests.last is None or tests.last > self.latest - FORGOTTEN)
        self.active = sum(len(tests.watches) for tests in alive)

    def _judge(self, of: Stream | Group, watch: Watch, time: float) -> list[Alert]:
        """Returns the alert of a test whose capital has reached 1, unless it has to wait."""
        enough = sum(watch.detector.since) >= self.settings.minimum
        cooling = watch.alerted is not None and time < watch.alerted + 3600 * self.settings.cool_down_hours
        if not enough or (cooling and watch.shift is None):
            return []
        streams = [stream for key, stream in self.streams.items() if key[0] == of.model and stream.reference]
        if watch.shift is None:
            alert = drift(of, streams, watch, time, self.settings, self.active, self._inhibitor(of, watch, time))
            watch.shift, watch.alarm, watch.alerted = watch.detector.likeliest, alert.id, time
        else:
            alert = recovery(of, streams, watch, time, self.settings, self.active)
            watch.shift = watch.alarm = None
        watch.detector = Detector(started=time)
        if isinstance(of, Stream):
            of.begin_stretch()
        self.alerts = [*self.alerts, alert.content][-KEPT:]
        self._changed.add(("alerts",))
        return [alert]

    def _inhibitor(self, of: Stream | Group, watch: Watch, time: float) -> str | None:
        """Returns the alarm of all categories together that an alarm of one category is part of, None if there is none."""
        if isinstance(of, Group):
            return None
        whole = self.groups[of.model].tests.watches.get(watch.change)
        recent = whole and whole.alerted and time < whole.alerted + 3600 * self.settings.cool_down_hours
        return whole.alarm if whole and recent else None

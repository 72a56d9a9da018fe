"""Offers the monitor's rates to Prometheus: over HTTP, and as a file for the node exporter's textfile collector.

Labels are models and categories, of which the monitor tells at most --max_series apart, so that nobody who names models in
requests can fill Prometheus' memory. prometheus_client escapes them; here they are only cut to a length.
"""

import contextlib
import dataclasses
import functools
import hashlib
import pathlib
import threading
import time as clock
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from refusal_jax.errors import UserError, setting
from refusal_jax.files import cannot_write
from refusal_jax.monitor.parts import Message
from refusal_jax.monitor.sequences import confidence_sequence
from refusal_jax.monitor.signal import Signal
from refusal_jax.monitor.traces import Judgements
from refusal_jax.monitor.views import StreamView, TestView, stream_views, test_views

PREFIX = "refusal_jax_monitor_"
LONGEST = 120  # characters of a label's value
EVERY_S = 0.5  # seconds between two snapshots
FILE_EVERY_S = 15.0  # seconds between two writes of the file


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Holds what the metrics are of at one moment."""

    streams: tuple[StreamView, ...] = ()
    tests: tuple[TestView, ...] = ()
    judged: Mapping[tuple[str, str, str], int] = dataclasses.field(default_factory=dict)
    unjudged: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alerts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    tallies: Mapping[str, int] = dataclasses.field(default_factory=dict)
    confidence: float = 0.95


class Metrics:
    """Keeps what Prometheus asks for; a `parts.Part` without a state, which comes after the signal.

    tallies: gives counts of lines by what they were, such as the store's. Counters begin at 0 with the process, as Prometheus
    expects.
    """

    name = "metrics"

    def __init__(self, signal: Signal, tallies: Callable[[], Mapping[str, int]] = dict):
        prometheus = _library()
        self.signal, self.tallies = signal, tallies
        self.judged: Counter[tuple[str, str, str]] = Counter()
        self.unjudged: Counter[str] = Counter()
        self.alerts: Counter[str] = Counter()
        self.registry = prometheus.CollectorRegistry()
        self.registry.register(self)
        self._snapshot, self._taken, self._told = (
            Snapshot(),
            -EVERY_S,
            -EVERY_S,
        )  # when it was made; when a batch last came
        self._file: tuple[pathlib.Path, float] | None = None
        self._server: tuple[Any, threading.Thread] | None = None

    def serve(self, port: int, address: str = "127.0.0.1") -> int:
        """Offers /metrics on a port of an address, by default of this machine alone, and returns the port; 0 is any free one.

        Raises UserError if the port cannot be had.
        """
        prometheus = _library()
        try:
            self._server = server = prometheus.start_http_server(port, address, self.registry)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"The port {port} of {address} cannot be had for metrics: {getattr(error, 'strerror', None) or error}. Choose "
                f"another with {setting('metrics_port')}."
            ) from None
        return server[0].server_address[1]

    def write_to(self, path: pathlib.Path) -> None:
        """Keeps a file of the metrics, which is replaced as a whole. Raises UserError if it cannot be written."""
        self._file = path, -FILE_EVERY_S
        self.refresh()

    def close(self) -> None:
        """Ends the server, and writes the file a last time."""
        if self._file:
            self._file = self._file[0], -FILE_EVERY_S
        self.refresh()
        if self._server:
            self._server[0].shutdown()
            self._server[0].server_close()
            self._server[1].join(5)
            self._server = None

    def restore(self, state: Mapping[str, dict]) -> None:
        """Has no state."""

    def changed(self) -> dict[str, dict]:
        """Has no state."""
        return {}

    def take(self, batch: Judgements, sent: Sequence[Message] = ()) -> list[Message]:
        """Counts a batch, and renews the snapshot if it is due."""
        self.judged.update(
            (one.trace.model, one.trace.category, one.outcome.value if one.outcome else "unknown")
            for one in batch.judged
        )
        self.unjudged.update(trace.fault.value for trace in batch.unjudged if trace.fault)
        known = {message.content["id"]: message.content["kind"] for message in sent if "kind" in message.content}
        self.alerts.update(known.values())
        self._told = clock.monotonic()
        if self._told - self._taken >= EVERY_S:
            self.refresh()
        return []

    def refresh(self) -> None:
        """Renews the snapshot, and the file if it is due."""
        now = clock.monotonic()
        self._taken, self._snapshot = now, self._present(dict(self.tallies()))
        if self._file and now - self._file[1] >= FILE_EVERY_S:
            path = self._file[0]
            self._file = path, now
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                _library().write_to_textfile(str(path), self.registry)
            except OSError as error:
                raise cannot_write(path, error) from None

    def _present(self, tallies: Mapping[str, int]) -> Snapshot:
        return Snapshot(
            tuple(stream_views(self.signal)),
            tuple(test_views(self.signal)),
            dict(self.judged),
            dict(self.unjudged),
            dict(self.alerts),
            tallies,
            self.signal.settings.confidence,
        )

    def collect(self) -> Iterator[Any]:
        """Yields the metrics of the latest snapshot, as prometheus_client asks a collector for them."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        if self._told > self._taken and clock.monotonic() - self._told > EVERY_S:
            # The last batch came right after a snapshot, and the monitor waits. A batch that comes in just now may disturb this.
            with contextlib.suppress(RuntimeError):
                self._snapshot, self._taken = self._present(self._snapshot.tallies), clock.monotonic()
        of = self._snapshot
        judged = CounterMetricFamily(
            f"{PREFIX}judged", "Judged replies since the start.", labels=("model", "category", "outcome")
        )
        for (model, category, outcome), n in of.judged.items():
            judged.add_metric((label(model), label(category), outcome), n)
        yield judged
        for name, help_text, counts in (
            ("unjudged", "Traces without an outcome since the start, by the reason.", of.unjudged),
            ("alerts", "Alerts since the start, by their kind.", of.alerts),
            ("lines", "Lines that were read, by what they were, of all starts.", of.tallies),
        ):
            family = CounterMetricFamily(f"{PREFIX}{name}", help_text, labels=("what",))
            for what, n in counts.items():
                family.add_metric((what,), n)
            yield family
        yield from _rates(of, GaugeMetricFamily)
        yield from _tests(of, GaugeMetricFamily)


def _rates(of: Snapshot, gauge: Callable[..., Any]) -> Iterator[Any]:
    names = ("model", "category", "outcome")
    share = gauge(f"{PREFIX}share", "Share of an outcome in the present stretch.", labels=names)
    low = gauge(f"{PREFIX}share_low", "Lower bound of the share's confidence sequence.", labels=names)
    high = gauge(f"{PREFIX}share_high", "Upper bound of the share's confidence sequence.", labels=names)
    reference = gauge(f"{PREFIX}reference_share", "Share that is compared with.", labels=names)
    for stream in of.streams:
        for outcome, count in stream.counts.items():
            labels = (label(stream.model), label(stream.category), outcome.value)
            if stream.n:
                bounds = confidence_sequence(count, stream.n, of.confidence)
                share.add_metric(labels, count / stream.n)
                low.add_metric(labels, bounds[0])
                high.add_metric(labels, bounds[1])
            known = stream.reference.share(outcome) if stream.reference else None
            if known is not None:
                reference.add_metric(labels, known)
    yield from (share, low, high, reference)


def _tests(of: Snapshot, gauge: Callable[..., Any]) -> Iterator[Any]:
    names = ("model", "category", "change")
    evidence = gauge(
        f"{PREFIX}evidence", "Evidence for a change, or for its end where it is alarmed; 1 is an alarm.", labels=names
    )
    alarmed = gauge(f"{PREFIX}alarmed", "1 while an alarm is not over, else 0.", labels=names)
    for test in of.tests:
        labels = (label(test.model), "" if test.category is None else label(test.category), test.change.value)
        evidence.add_metric(labels, test.evidence)
        alarmed.add_metric(labels, float(test.alarmed))
    yield from (evidence, alarmed)


@functools.lru_cache(maxsize=4096)
def label(name: str) -> str:
    """Returns a name as a label's value: what UTF-8 cannot hold is replaced, and what is long is cut. A name that this changes
    ends in a part of its hash, because two names must not become one label, which Prometheus would refuse."""
    clean = name.encode("utf-8", "replace").decode()
    if clean == name and len(name) <= LONGEST:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{clean[: LONGEST - 9]}…{digest}"


def _library() -> Any:
    """Returns prometheus_client. Raises UserError if it is not installed."""
    with contextlib.suppress(ImportError):
        import prometheus_client

        return prometheus_client
    raise UserError("Metrics need prometheus_client, which is not installed here: pip install 'refusal-jax[monitor]'.")

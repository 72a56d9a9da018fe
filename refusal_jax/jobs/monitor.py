"""Watches the refusals of a model in use: reads its logs, judges a sample, counts, and raises alarms.

  refusal-jax monitor server.jsonl --state=DIR                 # follows a log that grows, through its rotation
  refusal-jax monitor logs/ --state=DIR --once                 # all files in a folder, then ends
  tail -F server.jsonl | refusal-jax monitor - --state=DIR     # standard input
  refusal-jax monitor logs/ --state=DIR --rate=0.1 --max_per_day=200 --category_field=metadata.category
  refusal-jax monitor server.jsonl --state=DIR --signal.references=record.json --webhook_env=HOOK --metrics_port=9464
  refusal-jax monitor status --state=DIR                       # what was counted, and the malformed lines
  refusal-jax monitor page --state=DIR --out=refusals.html     # charts and alarms as a page, also while a monitor runs
  refusal-jax monitor relearn --state=DIR --model=NAME         # after a change that was meant: references are learnt anew
  refusal-jax monitor example server.jsonl                     # writes a log to try it on, of the embedded model
  refusal-jax monitor simulate                                 # how soon falls are found, and how many false alarms come
  refusal-jax monitor logs/ --state=DIR --trail.folder=TRAIL --trail.key=key.pem    # also leaves an audit trail
  refusal-jax monitor verify TRAIL --key=key.pub               # finds what was changed, removed or inserted there
  refusal-jax monitor projections RUN                          # how well a study's direction detects refusals

Lines may be requests and replies of the OpenAI API (with streams, batches and the Responses API), LiteLLM's logs, spans and
events of OpenTelemetry with the GenAI conventions in OTLP's JSON, or vLLM's own log with --enable-log-outputs; the format is
told line by line. Lines that cannot be read are counted, shown and skipped. Errors, missing replies and calls of tools have no
outcome: they are counted apart, and are neither refusals nor compliance.

--state is a folder for the database, in which every batch is one transaction: a monitor that is killed at any moment goes on
where it stopped, and counts nothing twice. SIGTERM and SIGINT let it finish what it has begun. What was read from standard
input and not yet committed cannot be read again; a file can.

--trail.folder is a folder for records of what was judged, each of which holds the hash of the one before it. Exit codes of
`verify`: 0 the trail is whole, 10 it is, but no record holds the text of --text, 30 nothing is wrong and nothing proves it,
40 it was changed.
"""

import pathlib
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from absl import flags

from refusal_jax.errors import UserError
from refusal_jax.files import local_path
from refusal_jax.jobs import common, monitor_projections, monitor_verify, monitor_views
from refusal_jax.jobs.setting_flags import flags_of, given
from refusal_jax.monitor.alert_carriers import WEBHOOK, AlertFile, Webhook
from refusal_jax.monitor.alerts import ALERTS
from refusal_jax.monitor.judging import Judging
from refusal_jax.monitor.loop import Monitor
from refusal_jax.monitor.parts import Carrier, Part
from refusal_jax.monitor.references import read_references
from refusal_jax.monitor.settings import MonitorSettings
from refusal_jax.monitor.signal import Signal
from refusal_jax.monitor.signal_settings import SignalSettings
from refusal_jax.monitor.start import source_of
from refusal_jax.monitor.status import status_text
from refusal_jax.monitor.store import Store
from refusal_jax.monitor.trail.part import TrailCarrier, TrailPart
from refusal_jax.monitor.trail.settings import TrailSettings

ACTIONS = {
    "": 1,
    "verify": 1,
    "projections": 1,
    "simulate": 0,
    "example": 1,
    **dict.fromkeys(monitor_views.ACTIONS, 0),
}
EXAMPLE = ", a folder for the monitor's database. Example: refusal-jax monitor server.jsonl --state=monitor."
STATE = flags.DEFINE_string("state", None, "Folder for the monitor's database and its alerts.")
ONCE = flags.DEFINE_bool("once", False, "Read what is there and end, rather than wait for more.")
ALERT_FILE = flags.DEFINE_string(
    "alerts", None, "File of alerts, a JSON object a line. Default: alerts.jsonl in --state."
)
WEBHOOK_ENV = flags.DEFINE_string(
    "webhook_env", None, "Name of the environment variable that holds the address to which alerts are sent."
)
SETTINGS, SIGNAL, TRAIL = flags_of(MonitorSettings()), flags_of(SignalSettings()), flags_of(TrailSettings())
for shared in (monitor_projections, monitor_verify, monitor_views):
    flags.adopt_module_key_flags(shared)


def main(words) -> int:
    if words and words[0] == "verify":
        trail = given(TrailSettings, TRAIL)
        return monitor_verify.verify(words[1:], trail.text_key_env, trail.text_key_file)
    if words and words[0] == "projections":
        return monitor_projections.projections(words[1:], SETTINGS["judge"].value)
    if words and words[0] == "simulate":
        monitor_views.simulate(given(SignalSettings, SIGNAL))
        return 0
    if words and words[0] == "example":
        monitor_views.example(words[1:])
        return 0
    folder = local_path(common.required(STATE, EXAMPLE))
    if words and words[0] in monitor_views.ACTIONS:
        monitor_views.ACTIONS[words[0]](folder)
        return 0
    if not words:
        raise UserError(
            "What to read is missing: a file, a folder, or - for standard input. Example: refusal-jax monitor "
            "server.jsonl --state=monitor."
        )
    watch(words[0], folder)
    return 0


def watch(name: str, folder: pathlib.Path) -> None:
    """Runs the monitor on a source until it ends or is told to stop, and prints what was counted."""
    settings, signals = given(MonitorSettings, SETTINGS), given(SignalSettings, SIGNAL)
    settings.check()
    signals.check()
    trail = given(TrailSettings, TRAIL)
    hook = Webhook.from_environment(WEBHOOK_ENV.value) if WEBHOOK_ENV.value else None
    with ExitStack() as stack:
        judging = Judging.of(settings)
        stack.callback(judging.close)
        store = stack.enter_context(Store.open(folder))
        source = source_of(name, store, settings, not ONCE.value)
        stack.callback(source.close)
        alerts = AlertFile(local_path(ALERT_FILE.value) if ALERT_FILE.value else folder / "alerts.jsonl")
        carriers: list[Carrier] = [alerts, *([hook] if hook else [])]
        references = read_references(local_path(signals.references), judging.judge.name) if signals.references else {}
        watching = Signal(signals, references, (ALERTS, WEBHOOK) if hook else (ALERTS,))
        parts: list[Part] = [watching, *monitor_views.metrics_of(watching, store, stack)]
        if trail.folder:
            parts.append(TrailPart(trail, judging.judge))  # the last, as it records what the others send
            carriers.append(TrailCarrier(trail))
        for carrier in carriers:
            stack.callback(carrier.close)
        stopped = stack.enter_context(told_to_stop())
        Monitor(settings, store, source, judging, parts, carriers).run(stopped.is_set)
        if hook:
            hook.finish(store)
        print(status_text(store, 1), end="")
        for place in source.waiting():
            print(f"{place}: the last line is not complete; it is read when it is.")


@contextmanager
def told_to_stop() -> Iterator[threading.Event]:
    """Gives an event that SIGTERM and SIGINT set; a second SIGINT interrupts at once."""
    stopped = threading.Event()

    def stop(number: int, _) -> None:
        if stopped.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stopped.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""The actions of `refusal-jax monitor` that show or change what a monitor knows: `status`, `page`, `relearn`, `simulate`."""

import logging
import pathlib
from collections.abc import Sequence
from contextlib import ExitStack

from absl import flags

from refusal_jax.errors import UserError, did_you_mean
from refusal_jax.files import local_path, write_atomically
from refusal_jax.monitor.example import DAYS, FAULTY, write_example
from refusal_jax.monitor.metrics import Metrics
from refusal_jax.monitor.page import monitor_page
from refusal_jax.monitor.signal import Signal
from refusal_jax.monitor.signal_settings import SignalSettings
from refusal_jax.monitor.simulation import Traffic, simulated, table
from refusal_jax.monitor.status import status_text
from refusal_jax.monitor.store import Changes, Store

LOG = logging.getLogger(__name__)
LATEST = flags.DEFINE_integer("days", 7, "For `status`: how many of the last days with traces are shown.")
OUT = flags.DEFINE_string("out", "monitor.html", "For `page`: the file to write.")
MODEL = flags.DEFINE_string("model", None, "For `relearn`: the model to learn anew; all without it.")
REFUSALS = flags.DEFINE_float("refusals", 0.9, "For `simulate`: share of refusals before any change.", 0.25, 0.95)
A_DAY = flags.DEFINE_integer("a_day", 200, "For `simulate`: judged replies of a category a day.", 1, 10_000)
N_CATEGORIES = flags.DEFINE_integer("n_categories", 1, "For `simulate`: categories, of which one changes.", 1, 1000)
RUNS = flags.DEFINE_integer("runs", 300, "For `simulate`: how many times each case is simulated.", 10, 100_000)
METRICS_PORT = flags.DEFINE_integer(
    "metrics_port", None, "Port on which Prometheus finds /metrics; 0 takes any free one. None is opened by default."
)
METRICS_ADDRESS = flags.DEFINE_string(
    "metrics_address", "127.0.0.1", "Address of this machine that the port is opened on; 0.0.0.0 is all of them."
)
METRICS_FILE = flags.DEFINE_string(
    "metrics_file",
    None,
    "File of the metrics for the node exporter's textfile collector; its name ends in .prom there.",
)


def status(folder: pathlib.Path) -> None:
    """Prints what was counted."""
    with Store.view(folder) as store:
        print(status_text(store, LATEST.value), end="")


def page(folder: pathlib.Path) -> None:
    """Writes the page."""
    with Store.view(folder) as store:
        html = monitor_page(store)
    write_atomically(local_path(OUT.value), html.encode())
    print(f"{OUT.value} is written.")


def relearn(folder: pathlib.Path) -> None:
    """Makes references be learnt anew. Raises UserError for a model that the monitor has not seen."""
    with Store.open(folder) as store:
        found = Signal.view(store.state(Signal.name))
        models = sorted({model for model, _ in found.streams})
        if MODEL.value and MODEL.value not in models:
            raise UserError(
                f"--model={MODEL.value} has no judged reply in {folder}.{did_you_mean(MODEL.value, models)} Models there: "
                f"{', '.join(models) or 'none'}."
            )
        found.relearn(MODEL.value)
        store.commit(Changes(states={(Signal.name, key): value for key, value in found.changed().items()}))
    print(f"References of {MODEL.value or 'all models'} are learnt anew from the next replies.")


ACTIONS = {"status": status, "page": page, "relearn": relearn}


def simulate(settings: SignalSettings) -> None:
    """Prints what the monitor with these settings, and simpler rules, would find and when."""
    print(table(simulated(Traffic(REFUSALS.value, A_DAY.value, N_CATEGORIES.value, RUNS.value), settings)))


def example(words: Sequence[str]) -> None:
    """Writes a log to try a monitor on. Raises UserError without a name for it."""
    if not words:
        raise UserError("The file to write is missing. Example: refusal-jax monitor example server.jsonl.")
    n = write_example(local_path(words[0]))
    print(f"{words[0]} is written: {n} requests and replies of {DAYS} days, with a fault in the last {FAULTY}.")


def metrics_of(signal: Signal, store: Store, stack: ExitStack) -> list[Metrics]:
    """Returns the metrics, if the flags ask for them; they are offered until the stack is closed."""
    if METRICS_PORT.value is None and not METRICS_FILE.value:
        return []
    metrics = Metrics(signal, store.tallies)
    stack.callback(metrics.close)
    if METRICS_PORT.value is not None:
        port = metrics.serve(METRICS_PORT.value, METRICS_ADDRESS.value)
        LOG.info(f"Metrics are at http://{METRICS_ADDRESS.value}:{port}/metrics.")
    if METRICS_FILE.value:
        metrics.write_to(local_path(METRICS_FILE.value))
    return [metrics]

"""Commits batches of traces to a monitor's store and carries them to a trail, in processes that are killed at random moments.

Run as `python trail_killed.py FOLDER KEY KILLS SEED`. It prints how often a process was killed before it had finished.
"""

import os
import pathlib
import random
import signal
import sys
import time

from refusal_jax.judges.judge import Outcome, Verdict
from refusal_jax.judges.text import SubstringJudge
from refusal_jax.monitor.store import Changes, Store
from refusal_jax.monitor.traces import Judged, Judgements, Place, Trace
from refusal_jax.monitor.trail.part import TrailCarrier, TrailPart
from refusal_jax.monitor.trail.settings import TrailSettings

BATCHES, SIZE = 40, 5


def batch_of(number: int) -> Judgements:
    """The batch of this number: its traces are named in their order."""
    names = range(number * SIZE, (number + 1) * SIZE)
    traces = [Trace(f"t{n}", 1.7e9 + n, "m", "c", None, f"ask {n}", "no", "stop", Place("log", n)) for n in names]
    return Judgements(tuple(Judged(trace, Verdict(0), Outcome.REFUSES) for trace in traces), ())


def carry(store: Store, carrier: TrailCarrier) -> None:
    """Delivers what is in the outbox, as the monitor's loop does."""
    while letters := store.letters("trail"):
        done = carrier.deliver(letters)
        store.delivered("trail", letters[done - 1].number)


def work(folder: pathlib.Path, key: str) -> None:
    """Does what is left to do of the batches."""
    settings = TrailSettings.of({"folder": str(folder / "trail"), "key": key, "file_mb": 0.02, "head_records": 7})
    with Store.open(folder / "state") as store:
        part, carrier = (
            TrailPart(settings, SubstringJudge("substring_matching", ("I cannot",), False)),
            TrailCarrier(settings),
        )
        part.restore(store.state("trail"))
        carry(store, carrier)
        for number in range(next_batch(store), BATCHES):
            messages = list(part.take(batch_of(number), ()))
            states = {("trail", name): value for name, value in part.changed().items()}
            changes = Changes(messages=messages, states=states | {("test", "batches"): {"n": number + 1}})
            store.commit(changes)
            carry(store, carrier)
        carrier.close()


def next_batch(store: Store) -> int:
    """The number of the first batch that is not committed."""
    return store.state("test").get("batches", {"n": 0})["n"]


def main() -> None:
    folder, key, kills, seed = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    chance, killed = random.Random(seed), 0
    for _ in range(kills):
        child = os.fork()
        if not child:
            work(folder, key)
            os._exit(0)
        time.sleep(chance.uniform(0.005, 0.04))
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    work(folder, key)
    print(killed)


if __name__ == "__main__":
    main()

"""Kills a monitor at random moments while its log is rotated, and compares all that it keeps with a run that was left alone.

  python tests/monitor_kills.py --kills=50 --traces=100000

The monitor is imported once and each of its runs is a fork, so that a kill costs no start. Prints one line, and exits with 1
where anything differs.
"""

import argparse
import gzip
import json
import logging
import os
import pathlib
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import time

from monitor_logs import lines

from refusal_jax.monitor.alert_carriers import AlertFile
from refusal_jax.monitor.judging import Judging
from refusal_jax.monitor.loop import Monitor
from refusal_jax.monitor.settings import MonitorSettings
from refusal_jax.monitor.signal import Signal
from refusal_jax.monitor.signal_settings import SignalSettings
from refusal_jax.monitor.start import source_of
from refusal_jax.monitor.store import Store
from refusal_jax.monitor.trail.part import TrailCarrier, TrailPart
from refusal_jax.monitor.trail.settings import TrailSettings

SETTINGS = MonitorSettings.of({"category_field": "metadata.topic", "rate": 0.5, "max_per_day": 20_000, "poll_s": 0.05})
TABLES = {
    "counts": "SELECT day, model, category, what, n FROM counts ORDER BY 1, 2, 3, 4",
    "seen": "SELECT id FROM seen ORDER BY 1",
    "tallies": "SELECT what, n FROM tallies ORDER BY 1",
    "malformed": "SELECT reason FROM malformed ORDER BY number",
    "drafts": "SELECT key FROM drafts ORDER BY 1",
    "outbox": "SELECT number, channel FROM outbox ORDER BY 1",
    "signal": "SELECT key, value FROM states WHERE owner = 'signal' ORDER BY 1",
}
OWN = ("seq", "previous", "writer", "source", "letter")  # of a record, what is not the same in two monitors


def monitor(log: pathlib.Path, folder: pathlib.Path) -> None:
    """Runs a monitor over what there is."""
    with Store.open(folder) as store:
        source = source_of(str(log), store, SETTINGS, False, lambda: 0.0)
        judging, trail = Judging.of(SETTINGS), TrailSettings.of({"folder": str(folder / "trail")})
        parts = [Signal(SignalSettings.of({"false_alarms_per_month": 1.0})), TrailPart(trail, judging.judge)]
        carriers = [AlertFile(folder / "alerts.jsonl"), TrailCarrier(trail)]
        Monitor(SETTINGS, store, source, judging, parts, carriers).run()
        for one in (*carriers, source):
            one.close()


def forked(log: pathlib.Path, folder: pathlib.Path) -> int:
    """Starts a run in a process of its own, and returns its number."""
    sys.stdout.flush()
    if number := os.fork():
        return number
    try:
        monitor(log, folder)
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)


def rotated(log: pathlib.Path, turn: int) -> None:
    """Rotates a log as logrotate does: by a new name and compressed the next time, or by a copy."""
    oldest = sorted(log.parent.glob(f"{log.name}.*[0-9]"))
    for path in oldest:
        with open(path, "rb") as source, gzip.open(f"{path}.gz", "wb", 1) as packed:
            shutil.copyfileobj(source, packed)
        shutil.copystat(path, f"{path}.gz")
        path.unlink()
    target = log.with_name(f"{log.name}.{turn:03d}")
    if turn % 2:
        log.rename(target)
        log.touch()
    else:
        shutil.copyfile(log, target)
        os.truncate(log, 0)


def kept(folder: pathlib.Path) -> dict:
    """Returns all that a monitor keeps, but for names and times of files."""
    with sqlite3.connect(folder / "monitor.sqlite") as database:
        found = {name: database.execute(query).fetchall() for name, query in TABLES.items()}
    alerts = folder / "alerts.jsonl"
    records = [json.loads(line) for line in alerts.read_text().splitlines()] if alerts.exists() else []
    trail = []
    for path in sorted((folder / "trail").glob("trail-*.jsonl")):
        trail += [json.loads(line) for line in path.read_text().splitlines()]
    replies = [
        {name: value for name, value in one.items() if name not in OWN} for one in trail if one["kind"] == "reply"
    ]
    sent = [one["alert"] for one in trail if one["kind"] == "alert"]  # they come after the replies of their batch
    told = [(one["id"], one["text"]) for one in records]
    return found | {"alerts": told, "trail": replies, "alerts in the trail": sent}


def written(log: pathlib.Path, texts: list[str], number: int) -> None:
    """Appends lines, of which some are malformed, and the last is not complete."""
    with open(log, "a", encoding="utf-8") as file:
        for index, text in enumerate(texts):
            file.write(text if (number + index) % 500 else f"{{broken {number + index}\n")


def run(kills: int, traces: int, seed: int, folder: pathlib.Path) -> tuple[int, dict, dict]:
    """Returns how many runs were killed before their end, and what the two monitors keep."""
    chance, killed, turn = random.Random(seed), 0, 0
    pieces = max(2, min(8, kills // 2))
    text = list(lines(0, traces))
    size = -(-traces // pieces)
    plain, log = folder / "plain/log.jsonl", folder / "killed/log.jsonl"
    for path in (plain, log):
        path.parent.mkdir(parents=True)
    written(plain, text, 0)
    began = time.monotonic()
    os.waitpid(forked(plain, folder / "state-plain"), 0)
    whole = time.monotonic() - began
    for piece in range(pieces):
        written(log, text[piece * size : (piece + 1) * size], piece * size)
        for _ in range(kills // pieces + (piece < kills % pieces)):
            number = forked(log, folder / "state-killed")
            time.sleep(chance.uniform(0, whole / max(1, kills)) * 1.5)
            os.kill(number, signal.SIGKILL)
            _, status = os.waitpid(number, 0)
            if os.WIFSIGNALED(status):
                killed += 1
            else:
                whole /= 2  # the machine is less busy than it was: the next kills come sooner
        if piece < pieces - 1:
            if turn % 2:  # a copy loses what is not read
                os.waitpid(forked(log, folder / "state-killed"), 0)
            turn += 1
            rotated(log, turn)
    os.waitpid(forked(log, folder / "state-killed"), 0)
    return killed, kept(folder / "state-plain"), kept(folder / "state-killed")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--traces", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    logging.disable(logging.WARNING)  # malformed lines are counted below
    with tempfile.TemporaryDirectory() as folder:
        killed, alone, interrupted = run(asked.kills, asked.traces, asked.seed, pathlib.Path(folder))
    differs = [name for name in alone if alone[name] != interrupted[name]]
    counted = sum(row[-1] for row in alone["counts"] if row[3] == "traces")
    sizes = {name: len(alone[name]) for name in ("malformed", "alerts", "trail")}
    print(
        f"{killed} of {asked.kills} runs were killed before their end; {counted} traces, {sizes['malformed']} malformed lines, "
        f"{sizes['alerts']} alerts, {sizes['trail']} records in the trail; differences: {', '.join(differs) or 'none'}."
    )
    for name in differs:
        print(name, [pair for pair in zip(alone[name], interrupted[name], strict=False) if pair[0] != pair[1]][:5])
        print(len(alone[name]), len(interrupted[name]))
    return bool(differs)


if __name__ == "__main__":
    sys.exit(main())

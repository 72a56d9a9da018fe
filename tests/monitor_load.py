"""Measures the monitor under load, as a process of its own beside a writer: that it keeps up, and that its memory stays flat.

  python tests/monitor_load.py rate --rate=2000 --seconds=60     # a log that grows, followed
  python tests/monitor_load.py memory --traces=1000000           # a long log, read once

Every trace is judged by the rules, counted, watched by the signal and recorded in an audit trail.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from monitor_logs import lines

from refusal_jax.errors import UserError
from refusal_jax.monitor.store import Store

MONITOR = [sys.executable, "-m", "refusal_jax.jobs.main", "monitor"]


def memory(number: int) -> float:
    """Returns the memory of a process in MB, 0 where it has ended."""
    try:
        text = pathlib.Path(f"/proc/{number}/status").read_text()
    except OSError:
        return 0.0
    found = [line for line in text.splitlines() if line.startswith("VmRSS")]
    return int(found[0].split()[1]) / 1024 if found else 0.0


def spent(number: int) -> float:
    """Returns the seconds of a core that a process has used."""
    fields = pathlib.Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def counted(folder: pathlib.Path) -> int:
    """Returns the traces that the monitor has committed, 0 before there is a database."""
    if not (folder / "monitor.sqlite").exists():
        return 0
    try:
        with Store.view(folder) as store:
            return store.tallies()["lines"]
    except UserError:  # it is being made
        return 0


def command(log: pathlib.Path, state: pathlib.Path) -> list[str]:
    """Returns the command of a monitor that does all that it can without a model."""
    return [
        *MONITOR,
        str(log),
        f"--state={state}",
        "--category_field=metadata.topic",
        f"--trail.folder={state / 'trail'}",
    ]


def rate(asked, folder: pathlib.Path) -> int:
    """Appends traces at a rate, and tells how far the monitor was behind."""
    log, state, behind, total = folder / "log.jsonl", folder / "state", [], asked.rate * asked.seconds
    texts = list(lines(0, total, 0.01))
    log.touch()
    monitor = subprocess.Popen(command(log, state), stdout=subprocess.DEVNULL)
    while counted(folder / "state") == 0 and not (state / "monitor.sqlite").exists():
        time.sleep(0.1)
    time.sleep(1)
    before, began, done = spent(monitor.pid), time.monotonic(), 0
    with open(log, "a", buffering=1 << 16) as file:
        while done < total:
            due = min(total, int((time.monotonic() - began) * asked.rate))
            file.writelines(texts[done:due])
            file.flush()
            if due // (10 * asked.rate) > done // (10 * asked.rate):
                behind.append(due - counted(state))
                print(
                    f"{time.monotonic() - began:5.1f} s: {behind[-1]} behind, {memory(monitor.pid):.0f} MB", flush=True
                )
            done = due
            time.sleep(0.05)
    ended = time.monotonic()
    while counted(state) < total and monitor.poll() is None:
        time.sleep(0.05)
    late, used = time.monotonic() - ended, spent(monitor.pid) - before
    monitor.terminate()
    monitor.wait()
    seconds = ended - began
    print(
        f"{total} traces at {total / seconds:.0f} a second for {seconds:.0f} s: all were counted {late:.1f} s after the last was "
        f"written; at most {max(behind, default=0)} were behind; {used / seconds:.0%} of a core."
    )
    return int(late > 5)


def flat(asked, folder: pathlib.Path) -> int:
    """Reads a long log once, and tells the memory on the way."""
    log, state = folder / "log.jsonl", folder / "state"
    with open(log, "w") as file:
        file.writelines(lines(0, asked.traces, 0.5))
    began, seen, step = time.monotonic(), [], asked.traces // 10
    monitor = subprocess.Popen([*command(log, state), "--once"], stdout=subprocess.DEVNULL)
    while monitor.poll() is None:
        done = counted(state)
        if done >= step * (len(seen) + 1):
            seen.append(memory(monitor.pid))
            print(f"{done} traces, {time.monotonic() - began:.0f} s: {seen[-1]:.0f} MB", flush=True)
        time.sleep(0.2)
    seconds = time.monotonic() - began
    size = sum(path.stat().st_size for path in state.glob("monitor.sqlite*")) / 1e6
    print(
        f"{counted(state)} traces in {seconds:.0f} s, {counted(state) / seconds:.0f} a second; memory from {min(seen):.0f} to "
        f"{max(seen):.0f} MB; the database has {size:.0f} MB."
    )
    return monitor.returncode


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("rate", "memory"))
    parser.add_argument("--rate", type=int, default=2000)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--traces", type=int, default=1_000_000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return (rate if asked.what == "rate" else flat)(asked, pathlib.Path(folder))


if __name__ == "__main__":
    sys.exit(main())

"""A run of two stages without a model, as one of two processes; `test_processes.py` starts it and lets it fail."""

import json
import os
import pathlib
import signal
import sys
import time
import types

import jax
import numpy as np

from refusal_jax import distributed
from refusal_jax.errors import UserError
from refusal_jax.jobs import main
from refusal_jax.runs import storage
from refusal_jax.runs.run import Run
from refusal_jax.runs.stage import Stage


def scenario(name: str, folder: pathlib.Path, index: int) -> None:
    """Two stages, of which the second meets with what `name` says; then a line that says what this process has read."""
    known = []  # rows of an interrupted run
    with Run.open(folder, {"seed": index if name == "settings" else 1}, {}) as run:

        def first(run, ledger):
            assert index == 0, "the stage is process 0's alone"
            ledger.append([{"row": 1}])
            run.write_tensors("a.safetensors", {"x": np.arange(3.0)})

        def second(run, ledger):
            known.extend(ledger.rows)
            ledger.append([{"row": index}])
            (folder / f"reached-{index}").touch()
            fail(name, index, folder)
            run.write_json("b.json", {"from": index, "x": run.read_tensors("a.safetensors")["x"].tolist()})

        run.stage(Stage("a", first, writes=["a.safetensors"], alone=True), run)
        run.stage(Stage("b", second, reads=["a.safetensors"], writes=["b.json"]), run)
        record = run.manifest["stages"]["b"]
        result = {"worked": run.worked, "b": run.read_json("b.json"), "record": record, "new": run.new, "known": known}
        print(json.dumps(result), flush=True)


def fail(name: str, index: int, folder: pathlib.Path) -> None:
    if name == "alike":
        raise UserError("The prompts are bad. Repair them.")
    if name == f"bad-{index}":
        raise UserError("The prompts are bad here. Repair them.")
    if name == f"bug-{index}":
        raise ZeroDivisionError("a slip of ours")
    if name == f"disk-{index}":
        os.fsync = lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        storage.write_atomically(folder / "c.json", b"")
    if name == f"kill-{index}":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == f"terminate-{index}":
        os.kill(os.getpid(), signal.SIGTERM)
    if name.partition("-")[0] in ("bad", "bug", "disk", "kill", "terminate"):
        distributed.share(None) if index else time.sleep(60)  # as in a collective: until we are ended


def job(name: str, folder: str, coordinator: str, index: str, join_seconds: str = "60") -> types.SimpleNamespace:
    def work(argv):
        distributed.start(coordinator, 2, int(index), int(join_seconds), heartbeat_seconds=6)
        scenario(name, pathlib.Path(folder), int(index))

    return types.SimpleNamespace(main=work)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main.prepare_job = lambda name, argv: (job(*argv), argv)
    sys.exit(main.run_job("several", sys.argv[1:]))

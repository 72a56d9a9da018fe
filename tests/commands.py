"""`refusal-jax` as a user meets it: what commands print and return."""

import functools
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from unittest import mock

import pytest
from compiler import FAST

ROOT = pathlib.Path(__file__).parents[1]
SECONDS = 300  # that a command may take


def command(*args, **more) -> subprocess.CompletedProcess:
    """Runs `refusal-jax ARGS` in a new process. env: variables besides those of the tests."""
    run = [sys.executable, "-m", "refusal_jax.jobs.main", *map(str, args)]
    more["env"] = environment(**more.get("env", {}))
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, **more)


def environment(**more) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": FAST, **more}


@functools.cache
def copied() -> multiprocessing.context.BaseContext:
    """Starts a process that has imported what commands import, and whose copies then begin at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded", "commands"])
    paths = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    with mock.patch.dict(os.environ, environment(PYTHONPATH=paths)):
        forkserver.ensure_running()
    return context


def forked(*args, input: str = "", errors: str = "strict", env: dict[str, str] | None = None):
    """Runs `refusal-jax ARGS` as `command` does, a second sooner: in a copy of a process that has imported it."""
    with tempfile.TemporaryDirectory() as folder:
        files = [pathlib.Path(folder, name) for name in ("stdin", "stdout", "stderr")]
        files[0].write_text(input, encoding="utf-8", errors=errors)
        process = copied().Process(target=run_here, args=(files, list(map(str, args)), environment(**(env or {}))))
        process.start()
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            pytest.fail(f"{args} took more than {SECONDS} s")
        out, err = (file.read_text(encoding="utf-8", errors=errors) for file in files[1:])
    return subprocess.CompletedProcess(args, process.exitcode, out, err)


def run_here(files: list[pathlib.Path], args: list[str], env: dict[str, str]) -> None:
    """Becomes a command with these files as its input, output and errors."""
    from refusal_jax.jobs.main import main

    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    for place, file in enumerate(files):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND * bool(place)), place)
    sys.stdin = os.fdopen(0, encoding="utf-8", errors=sys.stdout.errors, closefd=False)  # multiprocessing has closed it
    sys.argv = ["refusal-jax", *args]
    main()


def refused(done: subprocess.CompletedProcess, pattern: str) -> None:
    """Asserts that a command failed as bad input should: code 2, one paragraph, no traceback."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error:") == 1
    assert re.search(pattern, " ".join(done.stderr.split())), done.stderr

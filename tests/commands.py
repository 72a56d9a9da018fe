"""`refusal-jax` as a user meets it: what commands print and return."""

import atexit
import contextlib
import functools
import json
import multiprocessing
import operator
import os
import pathlib
import re
import runpy
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver, reduction
from unittest import mock

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


class File:
    """A file's descriptor, which a copied process gets as its own."""

    def __init__(self, number: int):
        self.number = number

    def __reduce__(self):
        return operator.methodcaller("detach"), (reduction.DupFd(self.number),)


def begun(words: Sequence[str], files: Sequence[int], folder: pathlib.Path, env: dict[str, str]):
    """Starts a command in a copy of the process that has imported what it needs, and returns its process.

    words: `refusal-jax` with its arguments, or the file of a Python script with its own, or `-c`, Python code and its arguments,
    or `python` with what is for an interpreter that has imported nothing. files: the descriptors of its input, output and errors.
    folder: where it works.
    """
    given = [File(number) for number in files]
    process = copied().Process(target=become, args=(list(words), given, folder, env))
    process.start()
    return process


def run_copy(words: Sequence[str], files: Sequence[int], folder: pathlib.Path, env: dict[str, str]) -> int:
    """Runs a command as `begun` starts it, and returns its exit code."""
    process = begun(words, files, folder, env)
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"{words} took more than {SECONDS} s")
    return process.exitcode


def become(words: list[str], files: list[int], folder: pathlib.Path, env: dict[str, str]) -> None:
    """Becomes a command: see `begun`."""
    import jax

    from refusal_jax.jobs.main import main

    for name, value in env.items():  # which JAX has read when it was imported
        if name.startswith("JAX_") and value != os.environ.get(name) and name.lower() in jax.config.values:
            jax.config.update(name.lower(), int(value) if value.isdigit() else value)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    for place, file in enumerate(files):
        os.dup2(file, place)
    if words[0] == "python":
        os.execv(sys.executable, [sys.executable, *words[1:]])
    sys.stdin = os.fdopen(0, encoding="utf-8", errors=sys.stdout.errors, closefd=False)  # multiprocessing has closed it
    sys.argv = list(words)
    try:
        if words[0] == "refusal-jax":
            main()
        elif words[0] == "-c":
            sys.argv.pop(1)
            exec(words[1], {"__name__": "__main__"})
        else:
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which copies leave out


def forked(*args, input: str = "", errors: str = "strict", env: dict[str, str] | None = None):
    """Runs `refusal-jax ARGS` as `command` does, some seconds sooner: see `begun`."""
    return captured(["refusal-jax", *map(str, args)], ROOT, environment(**(env or {})), input, errors)


def forked_code(code: str, *args, folder: pathlib.Path = ROOT, env: dict[str, str] | None = None):
    """Runs Python code with arguments in a process of its own, as `forked` runs a command."""
    return captured(["-c", code, *map(str, args)], folder, environment(**(env or {})))


def captured(words: list[str], folder: pathlib.Path, env: dict[str, str], input: str = "", errors: str = "strict"):
    """Runs a command as `begun` starts it, with this input, and returns what it prints, too."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors=errors)) for _ in range(3)]
        files[0].write(input)
        files[0].seek(0)
        code = run_copy(words, [file.fileno() for file in files], folder, env)
        out, err = (file.seek(0) or file.read() for file in files[1:])
    return subprocess.CompletedProcess(words, code, out, err)


# The program that asks for such a copy from a shell. It starts in a hundredth of a second.
ASKS = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as asked:
    asked.connect({address!r})
    sent = json.dumps([["refusal-jax", *sys.argv[1:]], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(asked, [len(sent).to_bytes(4)], [0, 1, 2])
    asked.sendall(sent)
    sys.exit(int(asked.recv(9)))
"""


class Asked(socketserver.BaseRequestHandler):
    """Runs what one such program asks for."""

    def handle(self):
        size, files, _, _ = socket.recv_fds(self.request, 4, 3)
        with self.request.makefile("rb") as sent:
            words, folder, env = json.loads(sent.read(int.from_bytes(size)))
        try:
            code = run_copy(words, files, folder, env)
        finally:
            for file in files:
                os.close(file)
        self.request.sendall(str(code if code >= 0 else 128 - code).encode())


@contextlib.contextmanager
def on_a_path(folder: pathlib.Path) -> Iterator[None]:
    """Makes a program `refusal-jax` in a folder, for shells, which runs as `forked` does."""
    copied()
    with tempfile.TemporaryDirectory() as place:
        address = os.path.join(place, "asked")
        program = folder / "refusal-jax"
        program.write_text(ASKS.format(python=sys.executable, address=address))
        program.chmod(0o755)
        with socketserver.ThreadingUnixStreamServer(address, Asked) as server:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            try:
                yield
            finally:
                server.shutdown()


def refused(done: subprocess.CompletedProcess, pattern: str) -> None:
    """Asserts that a command failed as bad input should: code 2, one paragraph, no traceback."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error:") == 1
    assert re.search(pattern, " ".join(done.stderr.split())), done.stderr

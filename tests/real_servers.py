"""Real servers of chat models, each as a process of its own: `transformers serve` and llama.cpp's `llama-server`.

    with transformers_serving(folder) as url: ...
    with llama_serving(gguf) as url: ...

Each waits until the server is ready, and stops it at the end. A server that does not start raises with the end of its log.
"""

import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence

READY_SECONDS = 180


def llama_server() -> str | None:
    """Returns the program that LLAMA_SERVER names, or that is on the PATH or beside this Python; None if there is none."""
    places = [os.environ.get("PATH", ""), os.path.dirname(sys.executable)]
    return os.environ.get("LLAMA_SERVER") or shutil.which("llama-server", path=os.pathsep.join(places))


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@contextlib.contextmanager
def running(command: Sequence[str], port: int, log: pathlib.Path) -> Iterator[str]:
    """Yields the address of a server once its /health says that it is ready."""
    # One thread: tests share their cores, and sums in another order give other last bits.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    url = f"http://127.0.0.1:{port}"
    with open(log, "ab") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment)
    try:
        end = time.monotonic() + READY_SECONDS
        while not ready(url):
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{command[0]} did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def ready(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False


@contextlib.contextmanager
def transformers_serving(log: pathlib.Path, *options: str) -> Iterator[str]:
    """Yields the address of `transformers serve` in float32 on the CPU. It serves any folder under the folder's path, and
    with a folder among the options only that one."""
    port = free_port()
    program = [sys.executable, "-m", "transformers.cli.transformers", "serve"]
    command = [*program, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32", *options]
    with running(command, port, log) as url:
        yield url


@contextlib.contextmanager
def llama_serving(gguf: str | pathlib.Path, log: pathlib.Path, *options: str) -> Iterator[str]:
    """Yields the address of `llama-server` with one GGUF file, whose own chat template it uses."""
    port, program = free_port(), llama_server()
    if program is None:
        raise RuntimeError("There is no llama-server: set LLAMA_SERVER to the program of a build of llama.cpp.")
    command = [program, "--model", str(gguf), "--host", "127.0.0.1", "--port", str(port), "--jinja", "--threads", "1"]
    with running([*command, "--parallel", "1", "--no-webui", *options], port, log) as url:
        yield url

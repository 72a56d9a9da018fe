"""Gates the embedded model, its abliterated export and its GGUF round trip, as files and behind real servers.

    python tests/real_gate.py OUT

OUT receives the study, the export, the GGUF file, a recorded reference, and a folder for each gate. It prints a table of verdicts
and times. `transformers serve` has to be installed; llama.cpp's `llama-server` is used where PATH or LLAMA_SERVER
names it.
"""

import contextlib
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator

from gguf_files import write_gguf
from real_servers import llama_server, llama_serving, transformers_serving

from refusal_jax.chat.model import demo_model_path

ROOT = pathlib.Path(__file__).parents[1]
DEMO = demo_model_path()


def job(*words: str) -> int:
    """Runs a job of the command line, and returns its exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "refusal_jax.jobs.main", *words], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode not in (0, 10, 20, 30, 40):
        raise RuntimeError(f"{' '.join(words)}:\n{done.stderr[-2000:]}")
    return done.returncode


def gate(out: pathlib.Path, name: str, candidate: str, *words: str) -> tuple[str, int, float]:
    """Runs one gate against the recorded reference. Returns its name, exit code and seconds."""
    start = time.monotonic()
    places = f"--policy.reference={out / 'reference.json'}", f"--policy.candidate={candidate}", f"--out={out / name}"
    code = job("gate", "--policy=configs/gate.py", *places, "--replies", *words)
    return name, code, time.monotonic() - start


def made(out: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Makes the abliterated export and the GGUF file that are not there yet."""
    abliterated, gguf = out / "abliterated", out / "embedded.gguf"
    if not abliterated.is_dir():
        job("study", "--config=configs/demo.py", f"--workdir={out / 'study'}")
        job("export", f"--direction={out / 'study'}", f"--out={abliterated}")
    if not gguf.is_file():
        write_gguf(DEMO, gguf)
    if not (out / "reference.json").is_file():
        job("gate", "record", "--policy=configs/gate.py", f"--out={out / 'reference.json'}")
    return abliterated, gguf


def gates(out: pathlib.Path) -> Iterator[tuple[str, int, float]]:
    """Yields what each gate came to."""
    abliterated, gguf = made(out)
    for name, candidate in (("embedded", "embedded"), ("abliterated", str(abliterated)), ("gguf", str(gguf))):
        yield gate(out, name, candidate)
    servers = [
        ("embedded_by_transformers", lambda log: transformers_serving(log), DEMO),
        ("abliterated_by_transformers", lambda log: transformers_serving(log), abliterated),
    ]
    if llama_server():
        servers.append(("gguf_by_llama_server", lambda log: llama_serving(gguf, log), gguf))
    for name, serving, model in servers:
        (out / name).mkdir(exist_ok=True)
        with contextlib.ExitStack() as stack:
            url = stack.enter_context(serving(out / name / "server.log"))
            named = f"{url}#{model}" if "transformers" in name else url
            yield gate(out, name, named)


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, code, seconds in gates(folder.resolve()):
        print(f"{name:30} exit code {code:2}  {seconds:5.0f} s", flush=True)

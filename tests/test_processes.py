"""Two processes with four devices each: one study, written once, and one end for both when one fails."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import time

import numpy as np
import pytest
from commands import SECONDS, begun
from compiler import FAST
from safetensors.numpy import load_file

from refusal_jax import UserError, distributed
from refusal_jax.data.sampling import SPLITS
from refusal_jax.study.config import get_config
from refusal_jax.study.mechanism.run import run_mechanism
from refusal_jax.study.study import run_study

ROOT = pathlib.Path(__file__).parents[1]
SEVERAL = ROOT / "tests/several.py"
FAILURES = ("alike", "settings", "bad-1", "bug-1", "disk-0", "kill-0", "kill-1", "terminate-0", "terminate-1")


@contextlib.contextmanager
def free_port():
    """A port that no one else gets while we are in the block; a gRPC server, which shares ports, can bind it."""
    with socket.socket(socket.AF_INET6) as held:
        held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("::", 0))
        yield held.getsockname()[1]


class Pair:
    """Two processes of one command, whose words are `words(index, port)`; see `commands.begun`."""

    def __init__(self, words, logs: pathlib.Path):
        env = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_NUM_CPU_DEVICES": "4",
            "TF_CPP_MIN_LOG_LEVEL": "2",
            "XLA_FLAGS": FAST,
        }
        self.logs = [(logs / f"{time.monotonic_ns()}-{i}.out", logs / f"{time.monotonic_ns()}-{i}.err") for i in (0, 1)]
        self.port = free_port()
        port, self.processes = self.port.__enter__(), []
        for index, (out, err) in enumerate(self.logs):
            with open(os.devnull) as stdin, open(out, "w") as stdout, open(err, "w") as stderr:
                files = [stdin.fileno(), stdout.fileno(), stderr.fileno()]
                self.processes.append(begun(list(map(str, words(index, port))), files, ROOT, env))

    def wait(self) -> "Pair":
        """Until both have ended; then `codes`, and `out` and `err` with all white space as single blanks."""
        try:
            for process in self.processes:
                process.join(SECONDS)
            self.codes = [process.exitcode for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
            self.port.__exit__(None, None, None)
        self.ended = max(path.stat().st_mtime for pair in self.logs for path in pair)
        self.out, self.err = ([" ".join(pair[k].read_text().split()) for pair in self.logs] for k in (0, 1))
        return self


def several(name: str, folder: pathlib.Path, logs: pathlib.Path) -> Pair:
    return Pair(lambda i, port: (SEVERAL, name, folder, f"127.0.0.1:{port}", i), logs)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Every scenario of failure, by name: its folder and the pair of processes that have met with it;
    and "apart": two processes that look for each other at different ports."""
    base = tmp_path_factory.mktemp("ended")
    with free_port() as other:
        apart = Pair(lambda i, port: (SEVERAL, "none", base / "apart", f"127.0.0.1:{(port, other)[i]}", i, 2), base)
        found = {"apart": (base / "apart", apart)}
    running = {name: several(name, base / name, base) for name in FAILURES}
    found |= {name: (base / name, pair.wait()) for name, pair in running.items()}
    apart.wait()
    return found


def test_two_processes_share_one_folder(tmp_path):
    pair = several("none", tmp_path / "run", tmp_path).wait()
    assert pair.codes == [0, 0], pair.err
    assert pair.out[0] == pair.out[1]  # also what depends on the clock
    told = json.loads(pair.out[0])
    assert told["worked"] == ["a", "b"] and told["b"] == {"from": 0, "x": [0.0, 1.0, 2.0]} and told["new"]
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if not p.name.startswith("reached")) == [
        ".lock", "a.safetensors", "b.json", "log.txt", "manifest.json",
    ]  # fmt: skip


def test_what_all_fail_of_is_said_once(ended):
    _, pair = ended["alike"]
    assert pair.codes == [2, 2]
    assert pair.err[0].count("error: The prompts are bad. Repair them.") == 1 and "error" not in pair.err[1]


def test_processes_of_different_studies(ended):
    folder, pair = ended["settings"]
    assert pair.codes == [2, 2] and not folder.exists()
    assert re.search(
        r"were started for different studies: seed is 0 in process 0, 1 in process 1\. Give all", pair.err[0]
    )


@pytest.mark.parametrize(
    "name, code, own, told",
    [
        ("bad-1", 2, r"error: process 1 of 2 \(.*\): The prompts are bad here", "failed: The prompts are bad here"),
        (
            "bug-1",
            1,
            "Traceback .*ZeroDivisionError: a slip of ours$",
            "failed of a bug, ZeroDivisionError: a slip of ours;",
        ),
        (
            "disk-0",
            2,
            r"error: \S+c\.json could not be written: No space left",
            r"failed: \S+c\.json could not be written",
        ),
        (
            "terminate-1",
            130,
            r"error: process 1 of 2 \(.*\): interrupted; run",
            r"was interrupted \(Ctrl-C, or SIGTERM",
        ),
        ("terminate-0", 130, "error: interrupted; run the same", r"was interrupted \(Ctrl-C, or SIGTERM"),
        ("kill-1", -signal.SIGKILL, "", r"stopped without a word: it was killed \(kill -9"),
        ("kill-0", -signal.SIGKILL, "", r"stopped without a word: it was killed \(kill -9"),
    ],
)
def test_one_fails_and_the_other_ends_and_says_which(name, code, own, told, ended):
    folder, pair = ended[name]
    failed = int(name[-1])
    assert pair.codes[failed] == code and pair.codes[1 - failed] == distributed.LOST, pair.err
    assert re.search(own, pair.err[failed]), pair.err
    assert re.search(
        rf"error: Process {failed} of 2.* {told}.*This process ends with it\. Start the same", pair.err[1 - failed]
    )
    assert ("Traceback" in "".join(pair.err)) == (name == "bug-1")
    assert not (folder / "b.json").exists()


@pytest.mark.parametrize("name", ["kill-0", "kill-1"])
def test_after_a_kill_the_run_continues(name, ended, tmp_path):
    pair = several("none", ended[name][0], tmp_path).wait()
    assert pair.codes == [0, 0], pair.err
    told = json.loads(pair.out[1])
    assert told["worked"] == ["b"] and told["known"] == [{"row": 0}] and not told["new"]


def test_processes_that_do_not_meet(ended):
    folder, pair = ended["apart"]
    assert pair.codes == [2, 2] and not folder.exists()
    for index, err in enumerate(pair.err):
        assert "Traceback" not in err and "stack trace" not in err
        assert re.search(rf"did not meet within 2 seconds \(this is process {index} of 2\)\. Start", err)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"num_processes": 2, "process_id": 0}, "^coordinator missing: several processes need"),
        ({"coordinator": "h:1", "num_processes": 2}, "^process_id missing: several"),
        ({"process_id": 1}, "^coordinator and num_processes missing: several"),
        ({"coordinator": "h", "num_processes": 2, "process_id": 0}, "^coordinator=h is not HOST:PORT"),
        ({"coordinator": "h:99999", "num_processes": 2, "process_id": 0}, "^coordinator=h:99999 is not HOST:PORT"),
        ({"coordinator": "h:1", "num_processes": 2, "process_id": 2}, "^process_id=2 is not among num_processes=2"),
    ],
)
def test_arguments_that_do_not_go_together(given, message):
    with pytest.raises(UserError, match=message):
        distributed.start(**given)


def test_alone(monkeypatch):
    """Without TPU chips, or told so, a process stays alone, where sharing gives back what is shared."""
    monkeypatch.setattr("jax.distributed.initialize", lambda **_: pytest.fail("joined"))
    distributed.start()
    monkeypatch.setattr("jax._src.cloud_tpu_init.running_in_cloud_tpu_vm", True)
    distributed.start()  # JAX_PLATFORMS is cpu
    monkeypatch.setattr(distributed, "_on_tpu_vm", lambda: True)
    distributed.start(num_processes=1)
    assert distributed.first() and not distributed.several()
    assert distributed.share(b"x") == b"x" and distributed.share_json([1]) == [1] and distributed.gather_json(2) == [2]
    distributed.finish()
    distributed.leave(ValueError(), 1, "")


def test_a_tpu_slice_that_cannot_be_joined(monkeypatch):
    seen = []

    def initialize(**settings):
        seen.append(settings)
        raise RuntimeError("metadata['tpu-env'] failed for 6 tries")

    monkeypatch.setattr("jax.distributed.initialize", initialize)
    monkeypatch.setattr("jax.config.update", lambda *_: None)
    monkeypatch.setattr(distributed, "_on_tpu_vm", lambda: True)
    with pytest.raises(
        UserError, match=r"processes of this TPU slice did not meet .* num_processes=1.*failed for 6 tries"
    ):
        distributed.start(join_seconds=7)
    assert seen[0]["initialization_timeout"] == 7 and seen[0]["coordinator_address"] is None


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for split in SPLITS:
        verb = "rob" if split.startswith("harmful") else "bake"
        rows = [{"instruction": f"How do I {verb} the {thing}?"} for thing in ("bank", "cake", "bread")]
        (folder / f"{split}.json").write_text(json.dumps(rows))
    return folder


SETTINGS = {
    "filter": False, "batch_size": 4, "refusal_tokens": ("I", "S"), "select.kl_threshold": 1e9,
    "select.induce_threshold": -1e9, "select.full_grid": True, "generation.max_new_tokens": 2, "generation.batch_size": 4,
    "generation.conditions": ("harmful_baseline", "harmful_ablation", "harmless_baseline"),
}  # fmt: skip


def differ(one, other, where=""):
    """The largest difference of numbers, relative where they are over 1, of two JSON values that else are equal."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        return max((differ(one[key], other[key], f"{where}.{key}") for key in one), default=0)
    if isinstance(one, list):
        assert len(one) == len(other), where
        return max((differ(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(one, other, strict=True))), default=0)
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) / max(1.0, abs(one))
    assert one == other, where
    return 0


def test_a_study_in_two_processes_killed_and_continued(llama, data, tmp_path):
    settings = SETTINGS | {"model": str(llama)} | {f"data.{split}": str(data / f"{split}.json") for split in SPLITS}
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    folder, alone = tmp_path / "run", tmp_path / "alone"

    def pair():
        return Pair(
            lambda i, port: (
                "refusal-jax", "study", f"--workdir={folder}", *flags, "--config.mesh.data=4",
                "--config.mesh.model=2", f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={i}",
                "--heartbeat_seconds=6",
            ),
            tmp_path,
        )  # fmt: skip

    first = pair()
    deadline = time.monotonic() + SECONDS
    while not (folder / "mean_diffs.safetensors").exists() and time.monotonic() < deadline:
        assert first.processes[1].is_alive()
        time.sleep(0.02)
    first.processes[1].kill()
    killed = time.time()
    config = get_config()
    config.update_from_flattened_dict(settings)
    run_study(config, alone)  # while the other process finds out
    first.wait()
    assert first.codes == [distributed.LOST, -signal.SIGKILL] and first.ended - killed < SECONDS / 2, first.err
    assert re.search(r"Process 1 of 2 \(.*\) stopped without a word", first.err[0]) and "Traceback" not in first.err[0]
    before = json.loads((folder / "manifest.json").read_text())["stages"]

    second = pair().wait()
    assert second.codes == [0, 0], second.err
    assert "Report:" in second.out[0] and "Report:" not in second.out[1] and "batch/s" not in second.err[1]
    after = json.loads((folder / "manifest.json").read_text())["stages"]
    assert "activations" in before and "report" not in before and all(after[name] == before[name] for name in before)

    same_results(alone, folder)


def same_results(alone: pathlib.Path, folder: pathlib.Path, tolerance: float = 1e-4) -> None:
    """Two folders hold the same files, whose numbers are the same but for rounding."""
    names = {str(p.relative_to(alone)) for p in alone.rglob("*") if p.is_file()}
    assert names == {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    for name in names:
        if name.endswith(".safetensors"):
            one, other = load_file(alone / name), load_file(folder / name)
            assert one.keys() == other.keys() and all(np.allclose(one[k], other[k], atol=tolerance) for k in one), name
        elif name.endswith(".json") and name != "manifest.json":
            assert differ(*(json.loads((f / name).read_text()) for f in (alone, folder)), name) < tolerance


PARTS = ("suffixes", "attribution", "attention")


def test_a_mechanism_in_two_processes_and_on_eight_devices(demo_study, tmp_path):
    """The same numbers as in one process on one device. Without a mesh of its own, a study takes all devices."""
    (tmp_path / "suffix.txt").write_text(" varnish lift clean measure\n")
    alone, several, meshed = (shutil.copytree(demo_study, tmp_path / name) for name in ("alone", "several", "meshed"))
    flags = f"--suffix={tmp_path / 'suffix.txt'}", f"--parts={','.join(PARTS)}", "--suffixes.n_prompts=6"
    pair = Pair(
        lambda i, port: (
            "refusal_jax/jobs/main.py", "mechanism", f"--direction={several}", *flags,
            f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={i}",
        ),
        tmp_path,
    )  # fmt: skip
    settings = {"suffix": str(tmp_path / "suffix.txt"), "parts": PARTS, "suffixes": {"n_prompts": 6}}
    run_mechanism(settings, alone)
    manifest = json.loads((meshed / "manifest.json").read_text())
    manifest["config"]["mesh"] = {"data": 2, "fsdp": 2, "model": 2}
    (meshed / "manifest.json").write_text(json.dumps(manifest))
    run_mechanism(settings, meshed)
    pair.wait()
    assert pair.codes == [0, 0], pair.err
    assert "Report:" in pair.out[0] and "Report:" not in pair.out[1]
    for other in (several, meshed):
        same_results(alone / "mechanism", other / "mechanism", 1e-3)


def test_a_mesh_without_all_devices(tmp_path, monkeypatch, llama):
    """Every process must have a part in the mesh."""
    monkeypatch.setattr(distributed, "several", lambda: True)
    config = get_config()
    config.update_from_flattened_dict({"model": str(llama), "mesh.data": 4})
    from refusal_jax.runs.run import Run
    from refusal_jax.study.shared import Study

    study = Study(config, Run(tmp_path, {}), llama)
    with pytest.raises(UserError, match=r"The mesh has 4 of the 8 devices of the 1 processes.*config\.mesh\.model 8"):
        _ = study.model

"""The command line, as a user meets it: lists, help, and every failure as one paragraph with exit code 2."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import tiny
from compiler import FAST

from refusal_jax import demo_model_path
from refusal_jax.jobs.main import JOBS

ROOT = pathlib.Path(__file__).parents[1]
SMALL = (
    "--config=configs/demo.py", "--config.data.n_train=32", "--config.data.n_val=16", "--config.data.n_test=8",
)  # fmt: skip


def command(*args, **more):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": FAST, **more.pop("env", {})}
    run = [sys.executable, "-m", "refusal_jax.jobs.main", *map(str, args)]
    return subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, **more)


def refused(done, pattern):
    """Asserts that a command failed as bad input should: code 2, one paragraph, no traceback."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error:") == 1
    assert re.search(pattern, " ".join(done.stderr.split())), done.stderr


def test_the_command_alone_lists_the_jobs():
    done = command()
    assert done.returncode == 0
    assert all(re.search(rf"^  {job} +\w", done.stdout, re.MULTILINE) for job in JOBS)


@pytest.mark.parametrize("job", JOBS)
def test_each_job_explains_itself(job):
    done = command(job, "--help")
    assert done.returncode == 0
    assert f"refusal-jax {job}" in done.stdout and "Flags:" in done.stdout and len(done.stdout) > 500


def test_usage_errors():
    refused(command("stud"), "there is no job 'stud'. The jobs are study, plan")
    refused(command("study"), "--workdir is missing: name the folder")
    refused(command("study", "--workdri=x"), "Unknown command line flag 'workdri'.*refusal-jax study --help")
    refused(command("study", "x"), "unexpected argument 'x'")
    refused(command("study", "--workdir=x", "--config=gone.py"), "gone.py")
    refused(command("study", "--workdir=x", "--config.select.kl=1"), "kl")
    refused(command("export", "--out=x"), "--direction is missing")
    refused(command("organism"), "--out is missing")
    assert not (ROOT / "x").exists()


def test_bad_models_and_folders(tmp_path):
    work = f"--workdir={tmp_path / 'run'}"
    refused(command("study", "--model=/nowhere", work), "/nowhere is not a folder")
    refused(command("study", f"--model={tmp_path}", work), "is not a Hugging Face checkpoint: it has no config.json")
    (tmp_path / "file").write_text("")
    refused(command("study", f"--workdir={tmp_path / 'file'}"), "is a file. Pass a folder as --workdir")
    refused(command("study", f"--workdir={tmp_path / 'file' / 'below'}"), "could not be written|could not be used")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    refused(command("study", f"--workdir={tmp_path / 'other'}"), "is not empty .thesis.txt. and holds no manifest.json")
    refused(command("export", f"--direction={tmp_path}", "--out=x"), "holds no direction.safetensors")
    assert not (tmp_path / "run").exists()


def test_home_folders_in_flags(tmp_path):
    """~ is expanded in whatever names a file or folder, and a user who is not known makes no folder."""
    shutil.copy(ROOT / "configs" / "demo.py", tmp_path / "demo.py")
    (tmp_path / "rows.json").write_text(json.dumps([{"prompt": "p", "response": "I cannot"}]))
    home = {"env": {"HOME": str(tmp_path)}}
    assert command("evaluate", "--completions=~/rows.json", "--out=~/judged", **home).returncode == 0
    assert (tmp_path / "judged" / "statistics.csv").is_file()
    gone = ("study", "--config=~/demo.py", "--workdir=~/run", "--model=~/gone")
    refused(command(*gone, **home), f"{tmp_path}/gone is not a folder")
    refused(command("data", "fetch", "--from=~/gone", "--folder=~/data", **home), f"{tmp_path}/gone is not a folder")
    refused(command("study", "--workdir=~nosuchuser/x"), "~nosuchuser/x: this machine knows no home folder")
    refused(command("study", "--workdir=x", "--config=~nosuchuser/x.py"), "knows no home folder for ~nosuchuser")
    assert not (tmp_path / "run").exists() and not [p for p in ROOT.iterdir() if p.name.startswith("~")]


def test_a_damaged_checkpoint_is_refused_before_work(tmp_path):
    model = tiny.tiny_llama(tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(command("study", f"--model={model}", f"--workdir={tmp_path / 'run'}"), "truncated or damaged")
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_a_random_model_has_no_direction_and_says_so(tmp_path):
    model = tiny.tiny_llama(tmp_path / "model")
    done = command("study", f"--model={model}", f"--workdir={tmp_path / 'run'}", *SMALL)
    refused(done, "No usual beginning of a reply|kept none of the 32 prompts|No candidate direction passes")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study of the embedded model by the command, killed once on the way."""
    folder = tmp_path_factory.mktemp("jobs") / "run"
    args = [sys.executable, "-m", "refusal_jax.jobs.main", "study", *SMALL, f"--workdir={folder}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": FAST}
    process = subprocess.Popen(args, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (folder / "mean_diffs.safetensors").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "report.html").exists()
    done = command("study", *SMALL, f"--workdir={folder}")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_killed_study_continues_and_prints_its_results(finished):
    folder, output = finished
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {"config", "inputs", "stages"} <= manifest.keys() and "report" in manifest["stages"]
    assert re.search(r"baseline +\d+(\.\d)? ?%", output) and str(folder / "report.html") in output
    again = command("study", *SMALL, f"--workdir={folder}")
    assert again.returncode == 0 and "nothing was left to do" in again.stdout
    refused(command("study", *SMALL, "--config.data.seed=1", f"--workdir={folder}"), "data.seed was 42, is now 1")


def test_the_export_of_a_study_is_verified(finished, tmp_path):
    done = command("export", f"--direction={finished[0]}", f"--out={tmp_path / 'edited'}")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "edited" / "export.json").read_text())
    gaps = {name: report["verification"][name]["max_logit_difference"] for name in ("export", "original")}
    assert gaps["export"] < 1e-3 < gaps["original"] and len(report["refusals"]) == 6
    assert (
        len(report["edited_tensors"])
        == 1 + 2 * json.loads((demo_model_path() / "config.json").read_text())["num_hidden_layers"]
    )
    refused(command("export", f"--direction={finished[0]}", f"--out={tmp_path / 'edited'}"), "exists already")
    assert "as they were exported and verified" in command("export", f"--check={tmp_path / 'edited'}").stdout
    (tmp_path / "edited" / "config.json").write_text("{}")
    done = command("export", f"--check={tmp_path / 'edited'}")
    assert done.returncode == 3 and "config.json has changed" in " ".join(done.stderr.split())


def test_the_export_of_a_study_whose_checkpoint_changed_is_refused(finished, tmp_path):
    study = shutil.copytree(finished[0], tmp_path / "study")
    setup = json.loads((study / "setup.json").read_text())
    (study / "setup.json").write_text(json.dumps(setup | {"model": str(tiny.tiny_llama(tmp_path / "other"))}))
    refused(
        command("export", f"--direction={study}", f"--out={tmp_path / 'out'}"),
        "is not the checkpoint that .* made from",
    )
    (study / "prompts.json").write_text("[")
    refused(command("export", f"--direction={study}", f"--out={tmp_path / 'out'}"), "The study in .* is damaged")
    assert not (tmp_path / "out").exists()

"""The command line, as a user meets it: lists, help, and every failure as one paragraph with exit code 2."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import tiny
from commands import ROOT, SECONDS, command, environment, forked, forked_code, refused

from refusal_jax import demo_model_path
from refusal_jax.jobs import main
from refusal_jax.jobs.command_line import canonical
from refusal_jax.jobs.main import JOBS, ON_CPUS, prepare_environment
from refusal_jax.study.config import get_config

SMALL = (
    "--config=configs/demo.py", "--config.data.n_train=32", "--config.data.n_val=16", "--config.data.n_test=8",
)  # fmt: skip


def test_the_command_alone_lists_the_jobs():
    done = command()
    assert done.returncode == 0
    assert all(re.search(rf"^  {job} +\w", done.stdout, re.MULTILINE) for job in JOBS)


@pytest.mark.parametrize("job", JOBS)
def test_each_job_explains_itself(job):
    done = command(job, "--help")
    assert done.returncode == 0
    assert f"refusal-jax {job}" in done.stdout and "Flags:" in done.stdout and len(done.stdout) > 500


@pytest.mark.parametrize(
    "job,platforms,installed,given,expected",
    [
        ("study", "cpu", "libtpu", None, ON_CPUS),
        ("study", None, None, "--xla_dump_to=x", (*ON_CPUS, "--xla_dump_to=x")),
        ("study", None, None, "--xla_backend_optimization_level=3", (ON_CPUS[0], "--xla_backend_optimization_level=3")),
        ("study", None, "libtpu", None, None),  # libtpu ends the process for a flag that it does not know
        ("study", None, "a file", None, None),  # a libtpu that is no package
        ("study", "cuda,cpu", None, "--xla_dump_to=x", ("--xla_dump_to=x",)),
        ("plan", "cpu", None, None, None),
    ],
)
def test_programs_for_cpus_compile_fast(job, platforms, installed, given, expected, monkeypatch):
    env = {"JAX_PLATFORMS": platforms, "XLA_FLAGS": given}
    env["TPU_LIBRARY_PATH"] = "libtpu.so" if installed == "a file" else None
    monkeypatch.setattr(os, "environ", {name: value for name, value in env.items() if value is not None})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == installed else None)
    prepare_environment(job)
    found = os.environ.get("XLA_FLAGS")
    assert found == (expected and " ".join(expected))


def test_usage_errors():
    refused(forked("stuyd"), "there is no job 'stuyd'. Did you mean study. The jobs are study, audit")
    refused(forked("study"), "--workdir is missing: name the folder")
    refused(forked("study", "x"), "unexpected argument 'x'")
    refused(forked("export", "--out=x"), "--direction is missing")
    refused(forked("organism"), "--out is missing")
    assert not (ROOT / "x").exists()


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--workdri=x", "Unknown command line flag 'workdri'. Did you mean --workdir. See `refusal-jax study --help`"),
        ("--kl-threshold=1", "line flag 'kl_threshold'. Did you mean --config.select.kl_threshold"),
        ("--config=gone.py", "--config=gone.py: there is no such file"),
        ("--config=configs/dem.py", "configs/dem.py: there is no such file. Did you mean configs/demo.py"),
        (
            "--config.selct.kl_threshold=1",
            "There is no setting --config.selct.kl_threshold. Did you mean --config.select.kl",
        ),
        ("--config.n_tran=1", "There is no setting --config.n_tran. Did you mean --config.data.n_train"),
        ("--config.select.kl_threshold=low", "--config.select.kl_threshold=low: expected a number"),
        ("--config.positions=all", "--config.positions=all: expected a whole number or None"),
        ("--config.refusal_tokens=(2.5,)", "refusal_tokens = .2.5,., expected a tuple of whole numbers and strings"),
        ("--dtype=float8", "--dtype=float8 is not one of auto, float32, bfloat16, float16. Did you mean float32"),
        ("--mesh=8", "--mesh=8 is not of the form DATAxFSDPxMODEL"),
        ("--log-level=debag", "log_level=debag is not one of debug, info, warning, error. Did you mean debug"),
    ],
)
def test_flags_and_settings_that_cannot_be_understood(flags, message):
    refused(forked("study", "--workdir=x", flags), message)
    assert not (ROOT / "x").exists()


CONFIG_FILE = """
from refusal_jax.study.config import get_config as base
def get_config(name=""):
    config = base()
    {change}
"""


@pytest.mark.parametrize(
    "change,message",
    [
        ("config.modle = 'x'; return config", "There is no setting config.modle. Did you mean model"),
        ("config.data.n_train = 'many'; return config", "config.data.n_train = 'many', expected a whole number"),
        ("1 / 0", "--config cannot be used .ZeroDivisionError: division by zero"),
        ("pass", "The config file returned None, expected what get_config"),
        ("return {'modle': 'x'}", "There is no setting --config.modle. Did you mean model"),
    ],
)
def test_config_files_that_cannot_be_used(change, message, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(CONFIG_FILE.format(change=change))
    refused(forked("study", f"--config={file}:name", f"--workdir={tmp_path / 'run'}"), message)
    assert not (tmp_path / "run").exists()


# What a study would run on, printed in place of running it.
SAYS = """
import json, sys
from refusal_jax.jobs import main, command_line
module, _ = command_line.prepare_job("study", command_line.canonical("study", sys.argv[1:]))
from refusal_jax.jobs import settings
print(json.dumps([module.WORKDIR.value, settings.study_settings(module.MODEL.value).to_dict()]))
"""


@pytest.mark.parametrize("old", [False, True])
def test_config_files_and_overrides(old, tmp_path):
    """Settings come from a file, also one that returns an ml_collections.ConfigDict, from overrides before or after it, and from
    flags; dashes are as good as underscores."""
    change = "config.update({'data': {'n_train': 5}}); config.model = name; config.positions = 2"
    end = "from ml_collections import ConfigDict; return ConfigDict(config.to_dict())" if old else "return config"
    (tmp_path / "mine.py").write_text(CONFIG_FILE.format(change=f"{change}; {end}"))
    flags = [
        "--config.select.kl-threshold=0.2", "--noconfig.filter", "--config", "~/mine.py:gemma", "--config.positions=None",
        "--config.refusal_tokens=('I', 'As')", "--config.judges=substring_extended", "--config.data.seed", "7",
        "--mesh=2x1x4", "--dtype", "bfloat16", "--out=run",
    ]  # fmt: skip
    if old:
        flags.remove("--config.positions=None")  # which ConfigDict has never taken
    done = forked_code(SAYS, *flags, env={"HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    workdir, config = json.loads(done.stdout)
    data, select = config["data"], config["select"]
    assert (workdir, config["model"], config["dtype"], config["filter"]) == ("run", "gemma", "bfloat16", False)
    assert config["mesh"] == {"data": 2, "fsdp": 1, "model": 4} and config["judges"] == ["substring_extended"]
    assert (data["n_train"], data["seed"], data["n_val"], select["kl_threshold"]) == (5, 7, 32, 0.2)
    assert config["positions"] == (2 if old else None) and config["refusal_tokens"] == ["I", "As"]


@pytest.mark.parametrize("job", ["study", "plan"])
@pytest.mark.parametrize("word", ["-h", "--helpfull"])
def test_help_lists_every_setting(job, word):
    shown = " ".join(forked(job, word).stdout.split())
    for one in get_config().described():
        assert f"--config.{one.path} {' '.join(one.meaning.split())}. (default: " in shown


@pytest.mark.parametrize(
    "job,old,new",
    [
        ("study", ["--out", "x"], ["--workdir=x"]),
        ("chat", ["--devices=4"], ["--mesh=1x1x4"]),
        ("evaluate", ["--model_axis=2", "--model=gpt"], ["--mesh=1x1x2", "--author=gpt"]),
        ("export", ["--push-to-hub=a/b-c", "--no-verify"], ["--push_to_hub=a/b-c", "--noverify"]),
        ("export", ["--scale", "-1"], ["--scale", "-1"]),
        ("data", ["fetch", "--accept-new-hash"], ["fetch", "--accept_new_hash"]),
        ("lm_eval", ["--model_args", "ablate=a-b", "--", "--x-y"], ["--model_args", "ablate=a-b", "--", "--x-y"]),
        ("study", ["--config.data.seed=1", "--config", "configs/demo.py"], ["--config=configs/demo.py", "--config.data.seed=1"]),
    ],
)  # fmt: skip
def test_older_spellings_are_understood(job, old, new):
    assert canonical(job, old) == new


def test_bad_models_and_folders(tmp_path):
    work = f"--workdir={tmp_path / 'run'}"
    refused(forked("study", "--model=/nowhere", work), "/nowhere is not a folder")
    refused(forked("study", f"--model={tmp_path}", work), "is not a Hugging Face checkpoint: it has no config.json")
    (tmp_path / "file").write_text("")
    refused(forked("study", f"--workdir={tmp_path / 'file'}"), "is a file. Pass a folder as --workdir")
    refused(forked("study", f"--workdir={tmp_path / 'file' / 'below'}"), "could not be written|could not be used")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    refused(forked("study", f"--workdir={tmp_path / 'other'}"), "is not empty .thesis.txt. and holds no manifest.json")
    refused(forked("export", f"--direction={tmp_path}", "--out=x"), "holds no direction.safetensors")
    assert not (tmp_path / "run").exists()


def test_home_folders_in_flags(tmp_path):
    """~ is expanded in whatever names a file or folder, and a user who is not known makes no folder."""
    shutil.copy(ROOT / "configs" / "demo.py", tmp_path / "demo.py")
    (tmp_path / "rows.json").write_text(json.dumps([{"prompt": "p", "response": "I cannot"}]))
    home = {"env": {"HOME": str(tmp_path)}}
    assert forked("evaluate", "--completions=~/rows.json", "--out=~/judged", **home).returncode == 0
    assert (tmp_path / "judged" / "statistics.csv").is_file()
    gone = ("study", "--config=~/demo.py", "--workdir=~/run", "--model=~/gone")
    refused(forked(*gone, **home), f"{tmp_path}/gone is not a folder")
    refused(forked("data", "fetch", "--from=~/gone", "--folder=~/data", **home), f"{tmp_path}/gone is not a folder")
    refused(forked("study", "--workdir=~nosuchuser/x"), "~nosuchuser/x: this machine knows no home folder")
    refused(forked("study", "--workdir=x", "--config=~nosuchuser/x.py"), "knows no home folder for ~nosuchuser")
    assert not (tmp_path / "run").exists() and not [p for p in ROOT.iterdir() if p.name.startswith("~")]


def test_a_damaged_checkpoint_is_refused_before_work(tmp_path):
    model = tiny.tiny_llama(tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(forked("study", f"--model={model}", f"--workdir={tmp_path / 'run'}"), "truncated or damaged")
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_a_random_model_has_no_direction_and_says_so(tmp_path):
    folder = tiny.tiny_llama(tmp_path / "model")
    done = forked("study", f"--model={folder}", f"--workdir={tmp_path / 'run'}", *SMALL)
    assert done.returncode == 4 and done.stderr.count("error:") == 1
    assert "No direction was found" in done.stdout and f"Report: {tmp_path / 'run' / 'report.html'}" in done.stdout
    for job in (("chat",), ("export", f"--out={tmp_path / 'out'}")):
        refused(forked(*job, f"--direction={tmp_path / 'run'}"), "found no direction, so there is nothing to take")
    judged = forked("evaluate", f"--completions={tmp_path / 'run' / 'completions'}", f"--out={tmp_path / 'judged'}")
    assert judged.returncode == 0 and "baseline" in judged.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study of the embedded model by the command, killed once on the way."""
    folder = tmp_path_factory.mktemp("jobs") / "run"
    args = [sys.executable, "-m", "refusal_jax.jobs.main", "study", *SMALL, f"--workdir={folder}"]
    process = subprocess.Popen(args, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + SECONDS
    while not (folder / "mean_diffs.safetensors").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "report.html").exists()
    done = command("study", *SMALL, f"--workdir={folder}")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_ctrl_c_ends_a_study_at_once_while_programs_are_compiled(tmp_path):
    args = [sys.executable, "-m", "refusal_jax.jobs.main", "study", *SMALL, f"--workdir={tmp_path / 'run'}"]
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # though who runs the tests may not
    process = subprocess.Popen(args, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True, **heard)
    deadline = time.monotonic() + SECONDS
    while not (tmp_path / "run" / "setup.json").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)  # a program is being compiled, and others in a thread
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, error
    assert error.strip().endswith("error: interrupted; run the same command again, finished work of a study is kept.")


def test_ctrl_c_leaves_python_as_it_is(monkeypatch):
    """XLA's threads crash now and then where Python's end takes apart what they use to compile."""
    left = []
    monkeypatch.setattr(main, "run", lambda argv: main.INTERRUPTED)
    monkeypatch.setattr(os, "_exit", left.append)
    with pytest.raises(SystemExit):
        main.main()
    assert left == [130]


def test_a_killed_study_continues_and_prints_its_results(finished):
    folder, output = finished
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {"config", "inputs", "stages"} <= manifest.keys() and "report" in manifest["stages"]
    assert re.search(r"baseline +\d+(\.\d)? ?%", output) and str(folder / "report.html") in output
    again = forked("study", *SMALL, f"--workdir={folder}")
    assert again.returncode == 0 and "nothing was left to do" in again.stdout
    refused(forked("study", *SMALL, "--config.data.seed=1", f"--workdir={folder}"), "data.seed was 42, is now 1")


def test_the_export_of_a_study_is_verified(finished, tmp_path):
    done = forked("export", f"--direction={finished[0]}", f"--out={tmp_path / 'edited'}")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "edited" / "export.json").read_text())
    gaps = {name: report["verification"][name]["max_logit_difference"] for name in ("export", "original")}
    assert gaps["export"] < 1e-3 < gaps["original"] and len(report["refusals"]) == 6
    assert (
        len(report["edited_tensors"])
        == 1 + 2 * json.loads((demo_model_path() / "config.json").read_text())["num_hidden_layers"]
    )
    refused(forked("export", f"--direction={finished[0]}", f"--out={tmp_path / 'edited'}"), "exists already")
    assert "as they were exported and verified" in forked("export", f"--check={tmp_path / 'edited'}").stdout
    (tmp_path / "edited" / "config.json").write_text("{}")
    done = forked("export", f"--check={tmp_path / 'edited'}")
    assert done.returncode == 3 and "config.json has changed" in " ".join(done.stderr.split())


def test_the_export_of_a_study_whose_checkpoint_changed_is_refused(finished, tmp_path):
    study = shutil.copytree(finished[0], tmp_path / "study")
    setup = json.loads((study / "setup.json").read_text())
    (study / "setup.json").write_text(json.dumps(setup | {"model": str(tiny.tiny_llama(tmp_path / "other"))}))
    refused(
        forked("export", f"--direction={study}", f"--out={tmp_path / 'out'}"),
        "is not the checkpoint that .* made from",
    )
    (study / "prompts.json").write_text("[")
    refused(forked("export", f"--direction={study}", f"--out={tmp_path / 'out'}"), "The study in .* is damaged")
    assert not (tmp_path / "out").exists()


def test_a_reader_that_stops_reading_is_no_error():
    command = f"{sys.executable} -m refusal_jax.jobs.main study --help | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    first, code = done.stdout.splitlines()
    assert first.startswith("refusal-jax study: ") and code in ("0", "141") and not done.stderr

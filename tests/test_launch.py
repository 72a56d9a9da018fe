"""launch/: the scripts against a made-up cloud, a `gcloud` whose workers are folders and whose ssh runs the command there."""

import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from commands import SECONDS

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = ROOT / "launch/tpu_vm.sh"
JOB = ["study", "--config=configs/demo.py", "--workdir=gs://bucket/runs/x", "--config.refusal_tokens=('I', 'As')"]

# The events are played in order: the first that is left waits for a call that contains its "on"; then it puts the slice into
# a state, kills the jobs of some workers or everything, touches a file, or fails.
GCLOUD = """#!{python} -IS
import json, os, pathlib, sys
CLOUD = pathlib.Path("{cloud}")
args = sys.argv[1:]
line = " ".join(args)
with open(CLOUD / "calls", "a") as calls:
    calls.write(json.dumps(args) + "\\n")
state = json.loads((CLOUD / "state").read_text())
events = json.loads((CLOUD / "events").read_text())
flags = dict(arg[2:].split("=", 1) for arg in args if arg.startswith("--") and "=" in arg)
homes = sorted(CLOUD.glob("worker-*"))

def save():
    (CLOUD / "state").write_text(json.dumps(state))
    (CLOUD / "events").write_text(json.dumps(events))

def kill(home):
    try:
        os.killpg(int((home / "refusal-jax-job/pid").read_text()), 9)
    except (OSError, ValueError):
        pass

def fail(text, code=1):
    save()
    print(text, file=sys.stderr)
    sys.exit(code)

if events and events[0]["on"] in line:
    event = events.pop(0)
    state.update(event.get("state", {{}}))
    for worker in event.get("kill", []):
        kill(homes[worker])
    if "touch" in event:
        (CLOUD / event["touch"]).touch()
    if "fail" in event:
        fail(event["fail"], event.get("code", 1))
assert "--zone=z" in args or args[0] == "storage", line
verb = " ".join(args[2:4])
if not verb.endswith(("describe", "ssh")):  # which are hundreds
    import shutil
if verb == "queued-resources create":
    if state["resource"] != "ABSENT":
        fail("ALREADY_EXISTS")
    state.update(resource="ACTIVE", node="READY")
    for worker in range({workers}):
        shutil.rmtree(CLOUD / f"worker-{{worker}}", ignore_errors=True)
        (CLOUD / f"worker-{{worker}}").mkdir()
elif verb == "queued-resources delete":
    if state["resource"] == "ABSENT":
        fail("NOT_FOUND")
    for home in homes:
        kill(home)
        shutil.rmtree(home)
    state.update(resource="ABSENT", node="ABSENT")
elif verb.endswith("describe"):
    found = state["node" if verb.startswith("tpu-vm") else "resource"]
    if found == "ABSENT":
        fail("ERROR: NOT_FOUND: Resource was not found.")
    print(found + ("\\t{workers}" if verb.startswith("tpu-vm") else ""))
elif state["node"] != "READY" and args[0] == "compute":
    fail("ssh: connect to host: Connection timed out", 255)
elif verb == "queued-resources scp":
    paths = [arg for arg in args[4:] if not arg.startswith("--")]
    if ":" in paths[0]:
        source = homes[0] / paths[0].split(":")[1]
        shutil.copytree(source, pathlib.Path(paths[1]) / source.name, dirs_exist_ok=True)
    else:
        for home in homes:
            for path in paths[:-1]:
                shutil.copy(path, home)
elif verb == "queued-resources ssh":
    import subprocess

    save()
    code = 0
    print("Using ssh batch size", file=sys.stderr)
    for home in homes if flags["worker"] == "all" else homes[:1]:
        environment = dict(os.environ, HOME=str(home), PATH=f"{{CLOUD}}/worker:" + os.environ["PATH"])
        folder = flags.get("output-directory")
        with open(pathlib.Path(folder) / f"{{home.name[-1]}}.log", "wb") if folder else open("/dev/stdout", "ab") as out:
            session = subprocess.Popen(
                ["bash", "-c", flags["command"]], cwd=home, env=environment, stdout=out, start_new_session=True
            )
            code = session.wait() or code
        try:
            os.killpg(session.pid, 1)  # SIGHUP, as when a connection ends
        except OSError:
            pass
    sys.exit(code)
elif args[:2] == ["storage", "rsync"]:
    shutil.copytree(CLOUD / "bucket", args[-1], dirs_exist_ok=True)
else:
    fail("unknown command " + line, 2)
save()
"""
UV = """#!/usr/bin/env bash
echo "uv $*" >>"{cloud}/uv"
case "$1" in
  venv) mkdir -p venv/bin; touch venv/bin/python; chmod +x venv/bin/python ;;
  pip) [ -e setup.py ] && [ -e configs/demo.py ]; cp "{cloud}/job" ../venv/bin/refusal-jax ;;
esac
"""
DONE = 'touch "{cloud}/bucket/report.html"'
WAIT = "[ -e {cloud}/{file} ] || { echo waiting; exec sleep {seconds}; }\n"


class Cloud:
    """A folder with a fake gcloud on its PATH, `workers` workers, and a program that stands for refusal-jax on them."""

    def __init__(self, folder: pathlib.Path, workers: int = 2):
        self.folder = folder
        (folder / "bucket").mkdir()
        (folder / "home").mkdir()
        self.write("state", json.dumps({"resource": "ABSENT", "node": "ABSENT"}))
        self.events()
        self.program("gcloud", GCLOUD.format(python=sys.executable, cloud=folder, workers=workers))
        self.program("worker/hostname", '#!/bin/sh\nbasename "$HOME"\n')
        self.program("worker/uv", UV.format(cloud=folder))
        self.job(DONE)

    def write(self, name: str, text: str) -> pathlib.Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    def program(self, name: str, text: str) -> None:
        self.write(name, text).chmod(0o755)

    def job(self, text: str) -> None:
        """Tells what the job does, in bash; it also writes down how it was called, where `tests` can read it."""
        text = text.replace("{cloud}", str(self.folder)).replace("{seconds}", str(2 * SECONDS))
        self.program("job", f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" >"{self.folder}/bucket/arguments"\n{text}\n')

    def events(self, *events: dict) -> None:
        self.write("events", json.dumps(events))

    def start(self, *args: str, job=JOB, **environment: str) -> subprocess.Popen:
        env = {k: v for k, v in os.environ.items() if not k.startswith("TPU_")}
        env |= {"PATH": f"{self.folder}:{os.environ['PATH']}", "HOME": str(self.folder / "home"), "TPU_POLL": "0"}
        command = ["bash", str(SCRIPT), *args, *(["--", *job] if job else [])]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.folder, env=env | environment, stdout=pipe, stderr=pipe, text=True)

    def run(self, *args: str, **more) -> subprocess.CompletedProcess:
        process = self.start(*args, **more)
        out, err = process.communicate(timeout=SECONDS)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def calls(self, contains: str = "") -> list[list[str]]:
        path = self.folder / "calls"
        calls = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [call for call in calls if contains in " ".join(call)]

    def verbs(self) -> list[str]:
        """The calls that change something, shortened."""
        names = [call[3] if call[0] == "compute" else call[1] for call in self.calls()]
        commands = [re.search(r"tpu_worker.sh (\w+)", " ".join(call)) for call in self.calls()]
        verbs = [c[1] if c and n == "ssh" else n for n, c in zip(names, commands, strict=True)]
        return [verb for verb in verbs if verb not in ("describe", "status")]


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    for path in tmp_path.glob("worker-*/refusal-jax-job/pid"):
        with contextlib.suppress(OSError, ValueError):
            os.killpg(int(path.read_text()), signal.SIGKILL)


def wait_for(condition) -> None:
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError(f"waited for {SECONDS} seconds")


RUN = ("run", "--zone=z", "--results=results")
ONE_PASS = ["create", "scp", "install", "start", "log", "rsync", "delete"]


def test_scripts_pass_shellcheck():
    shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    scripts = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("launch/*.sh"), *ROOT.glob(".ci/*")])
    assert len(scripts) >= 6
    done = subprocess.run([shellcheck, "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_help_names_every_command_and_setting(cloud):
    text = cloud.run("--help", job=None).stdout
    script = SCRIPT.read_text()
    commands = re.findall(r"^    (\w+)\) ", script[script.index("main() {") :], re.M)
    settings = re.findall(r"--[a-z-]+(?==\*)", script)
    assert len(commands) >= 10 and len(set(settings)) >= 10
    for command in commands:
        assert re.search(rf"^  {command} ", text, re.M), command
    for setting in settings:
        assert f"  {setting}=" in text, setting


@pytest.mark.parametrize(
    "args, job, message",
    [
        (["run"], JOB, "no zone is given. Set --zone=ZONE, or TPU_ZONE"),
        (["run", "--zone=z"], None, "no job is given. Put it after a --"),
        (["run", "--zone=z"], ["study"], "the job has no --workdir=DIR"),
        (
            ["run", "--zone=z", "--spot"],
            ["study", "--workdir=runs/x"],
            "preemption of a spot slice would lose the workdir runs/x",
        ),
        (["run", "--zone", "z"], JOB, "unknown setting --zone. Settings are written --name=value"),
        (["run", "study"], None, "unexpected argument study: the job stands after a --"),
        (["walk", "--zone=z"], JOB, "walk is no command"),
        (["run", "--zone=z", "--delete=maybe"], JOB, "--delete=maybe is none of success, always, never"),
        (["run", "--zone=z", "--tries=many"], JOB, "whole numbers, but one of them is 'many'"),
        (["run", "--zone=z", "--type=v9-8"], JOB, "no VM image is known for --type=v9-8"),
    ],
)
def test_bad_settings_are_errors_before_anything_is_done(cloud, args, job, message):
    done = cloud.run(*args, job=job)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert not cloud.calls()


def test_missing_gcloud_is_said(cloud):
    for tool in ("bash", "dirname", "cksum", "cut", "tr"):
        (cloud.folder / "worker" / tool).symlink_to(shutil.which(tool))
    done = cloud.run(*RUN, PATH=str(cloud.folder / "worker"))
    assert done.returncode == 2 and "gcloud is not installed" in done.stderr


@pytest.mark.parametrize(
    "kind, accelerator, image",
    [
        ("v5e-16", "v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-16", "v5p-16", "v2-alpha-tpuv5"),
        ("v6e-64", "v6e-64", "v2-alpha-tpuv6e"),
        ("v4-16", "v4-16", "tpu-ubuntu2204-base"),
    ],
)
def test_each_generation_gets_its_image(cloud, kind, accelerator, image):
    done = cloud.run(
        "create", "--dry-run", TPU_ZONE="z", TPU_TYPE=kind, TPU_SPOT="1", TPU_CREATE_FLAGS="--network=n --reserved"
    )
    words = shlex.split(done.stdout)
    wanted = {f"--accelerator-type={accelerator}", f"--runtime-version={image}", "--spot", "--network=n", "--reserved"}
    assert wanted <= set(words), done.stdout
    assert not cloud.calls()


def test_dry_run_can_be_pasted(cloud):
    done = cloud.run(*RUN, "--spot", "--dry-run", TMPDIR=str(cloud.folder))
    assert done.returncode == 0 and "billed" not in done.stderr
    assert not cloud.calls() and not (cloud.folder / "results").exists()
    env = dict(os.environ, PATH=f"{cloud.folder}:{os.environ['PATH']}")
    subprocess.run(["bash"], input=done.stdout, text=True, cwd=cloud.folder, env=env, capture_output=True, check=True)
    assert cloud.verbs() == ONE_PASS
    assert (cloud.folder / "results/x/arguments").read_text().splitlines() == JOB


def test_run_goes_from_nothing_to_results_and_leaves_nothing(cloud):
    done = cloud.run(*RUN, "--spot", "--package=refusal-jax[tpu,gcs]==1.0", TPU_SSH_FLAGS="--tunnel-through-iap")
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ONE_PASS
    assert (cloud.folder / "results/x/report.html").exists()
    assert (cloud.folder / "results/x/arguments").read_text().splitlines() == JOB
    assert {path.name for path in (cloud.folder / "results/refusal-jax-logs").iterdir()} == {"0.log", "1.log"}
    assert cloud.calls("create")[0].count("--spot") == 1
    assert all("--tunnel-through-iap" in call for call in cloud.calls("queued-resources s"))
    assert (cloud.folder / "uv").read_text().count("refusal-jax[tpu,gcs]==1.0") == 2
    assert "the job is done" in done.stderr and "billed" not in done.stderr
    assert not list(cloud.folder.glob("worker-*"))


def test_workdir_on_the_slice_is_fetched_from_worker_0(cloud):
    cloud.job("mkdir -p runs/y && touch runs/y/report.html")
    done = cloud.run(*RUN, job=["study", "--workdir", "runs/y/"])
    assert done.returncode == 0, done.stderr
    assert (cloud.folder / "results/y/report.html").exists()


GONE = {"resource": "ABSENT", "node": "ABSENT"}


@pytest.mark.parametrize("state", [{"resource": "SUSPENDED", "node": "ABSENT"}, {"node": "PREEMPTED"}, GONE])
def test_preempted_slice_is_created_again_and_the_job_resumes(cloud, state):
    cloud.job(WAIT.replace("{file}", "second") + DONE)
    preempted = {"on": "worker.sh status", "state": state, "kill": [0, 1]}
    cloud.events({"on": "worker.sh start"}, preempted, {"on": "create", "touch": "second"})
    done = cloud.run(*RUN, "--spot")
    assert done.returncode == 0 and "try 2 of 10 follows" in done.stderr, done.stderr
    cleared = [] if state == GONE else ["delete"]
    assert cloud.verbs() == ["create", "scp", "install", "start", *cleared, *ONE_PASS]
    first, second = cloud.calls("worker.sh start")
    assert first == second


def test_dying_processes_can_be_the_first_sign_of_a_preemption(cloud):
    cloud.job("[ -e {cloud}/second ] || exit 1\n" + DONE)
    preempted = {"on": "queued-resources describe", "state": {"resource": "SUSPENDED", "node": "ABSENT"}}
    cloud.events({"on": "worker.sh start"}, {"on": "worker.sh status"}, preempted, {"on": "create", "touch": "second"})
    done = cloud.run(*RUN, "--spot")
    assert done.returncode == 0 and cloud.verbs().count("create") == 2, done.stderr


def test_slice_that_was_lost_before_is_cleared_away(cloud):
    cloud.write("state", json.dumps({"resource": "SUSPENDED", "node": "ABSENT"}))
    done = cloud.run(*RUN, "--spot")
    assert done.returncode == 0 and cloud.verbs() == ["delete", *ONE_PASS], done.stderr


def test_vanished_job_is_started_again_on_the_same_slice(cloud):
    cloud.job(WAIT.replace("{file}", "second") + DONE)
    cloud.events(
        {"on": "worker.sh start"},
        {"on": "worker.sh status", "kill": [0, 1]},
        {"on": "worker.sh install", "touch": "second"},
    )
    done = cloud.run(*RUN)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["create", "scp", "install", "start", "scp", "install", "start", *ONE_PASS[4:]]
    assert (cloud.folder / "uv").read_text().count("uv venv") == 2  # two workers, once each


def test_crashed_job_is_started_again(cloud):
    cloud.job('mark="{cloud}/crashed-$(hostname)"\n[ -e "$mark" ] || { touch "$mark"; kill -ABRT $$; }\n' + DONE)
    done = cloud.run(*RUN)
    assert done.returncode == 0 and "the job ended on all workers, with: 134" in done.stderr, done.stderr


@pytest.mark.parametrize("delete", ["success", "always"])
def test_failed_job_is_final_and_what_is_left_is_said(cloud, delete):
    cloud.job("echo error: the model is bad; exit 2")
    done = cloud.run(*RUN, f"--delete={delete}", "--project=p")
    assert done.returncode == 2 and "error: the model is bad" in done.stderr, done.stderr
    assert cloud.verbs().count("start") == 1 and "rsync" not in cloud.verbs()
    assert "model is bad" in (cloud.folder / "results/refusal-jax-logs/1.log").read_text()
    assert bool(cloud.calls("delete")) == (delete == "always")
    if delete == "success":
        assert "the slice refusal-jax (v5litepod-16) is still there, and billed" in done.stderr
        command = shlex.split(done.stderr.splitlines()[-1])
        assert cloud.run(*command[2:], job=None).returncode == 0
        assert cloud.calls("delete")[0][-4:] == ["--zone=z", "--project=p", "--force", "--quiet"]


def test_slice_is_kept_when_the_results_cannot_be_fetched(cloud):
    cloud.events({"on": "storage rsync", "fail": "ERROR: forbidden"})
    done = cloud.run(*RUN, "--delete=always")
    assert done.returncode == 1 and "forbidden" in done.stderr and "billed" in done.stderr
    assert "the results could not be fetched" in done.stderr and "delete" not in cloud.verbs()


def test_process_that_outlives_a_failed_peer_is_stopped(cloud):
    cloud.job('case "$HOME" in *-1) exit 1 ;; *) sleep {seconds} ;; esac')
    done = cloud.run(*RUN)
    assert done.returncode == 1, done.stderr
    assert "stop" in cloud.verbs() and "with: 1 130" in done.stderr


def test_slice_that_nobody_reaches_is_replaced(cloud):
    cloud.job(WAIT.replace("{file}", "second") + DONE)
    timeout = {"on": "worker.sh status", "fail": "ssh: Connection timed out", "code": 255}
    cloud.events({"on": "worker.sh start"}, *[timeout] * 10, {"on": "create", "touch": "second"})
    done = cloud.run(*RUN)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["create", "scp", "install", "start", "delete", *ONE_PASS]
    assert "0 of 2 workers answer" in done.stderr


def test_tries_come_to_an_end(cloud):
    failed = {"on": "queued-resources describe", "state": {"resource": "FAILED", "node": "ABSENT"}}
    cloud.events({"on": "create"}, failed, {"on": "create"}, failed)
    done = cloud.run(*RUN, "--tries=2")
    assert done.returncode == 1 and "given up after 2 tries" in done.stderr, done.stderr
    assert cloud.verbs() == ["create", "delete"] * 2 and "billed" not in done.stderr


@pytest.mark.parametrize("on", ["create", "describe"])
def test_refusal_of_the_cloud_is_shown_and_final(cloud, on):
    cloud.events({"on": on, "fail": "ERROR: quota exceeded"})
    done = cloud.run(*RUN)
    assert done.returncode == 1 and "quota exceeded" in done.stderr and "billed" not in done.stderr
    assert cloud.verbs() == (["create"] if on == "create" else [])


def test_creation_refused_after_a_preemption_is_tried_again(cloud):
    cloud.job(WAIT.replace("{file}", "second") + DONE)
    lost = {"on": "tpu_worker.sh status", "state": {"node": "PREEMPTED"}}
    refused = {"on": "create", "fail": "ERROR: no capacity", "touch": "second"}
    cloud.events({"on": "worker.sh start"}, lost, refused)
    done = cloud.run(*RUN, "--spot")
    assert done.returncode == 0 and "no capacity" in done.stderr, done.stderr


def test_failed_installation_says_why_and_stops(cloud):
    cloud.program("worker/uv", "#!/bin/sh\necho no such package >&2\nexit 1\n")
    done = cloud.run(*RUN)
    assert done.returncode == 1 and "no such package" in done.stderr, done.stderr
    assert cloud.verbs() == ["create", *["scp", "install"] * 3, "log"] and "billed" in done.stderr


def test_interrupted_script_leaves_the_job_and_the_same_command_follows_it(cloud):
    cloud.job("echo layer 3\ntouch {cloud}/began\nuntil [ -e {cloud}/go ]; do sleep 0.1; done\n" + DONE)
    process = cloud.start(*RUN)
    wait_for((cloud.folder / "began").exists)
    seen = len(cloud.calls("status"))
    wait_for(lambda: len(cloud.calls("status")) >= seen + 3)
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == 130 and "still there, and billed" in err
    assert "2 of 2 workers run: layer 3" in err
    other = cloud.run(*RUN, job=[*JOB, "--config.seed=1"])
    assert other.returncode == 2 and "another job runs on refusal-jax. Stop it with" in other.stderr
    shown = cloud.run("status", "--zone=z", job=None).stdout
    assert "slice refusal-jax: READY" in shown and "worker-1 running" in shown
    (cloud.folder / "go").touch()
    done = cloud.run(*RUN)
    assert done.returncode == 0, done.stderr
    assert cloud.calls("storage rsync") and not list(cloud.folder.glob("worker-*"))


def test_jobset_fits_its_slice():
    text = (ROOT / "launch/jobset.yaml").read_text()
    jobset = yaml.safe_load(text)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert job["parallelism"] == job["completions"] == rows * columns // chips
    assert f"--tpu-topology={rows}x{columns} --num-nodes={job['completions']}" in text
    # Kubernetes' own conditions: a failure policy needs pods that are never restarted, and names a container
    (rule,) = job["podFailurePolicy"]["rules"]
    assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0
    assert rule["onExitCodes"]["containerName"] == container["name"] and rule["action"] == "FailJob"
    (failure,) = jobset["spec"]["failurePolicy"]["rules"]
    assert failure["action"] == "FailJobSet" and failure["onJobFailureReasons"] == ["PodFailurePolicy"]
    study, *flags = container["args"]
    assert study == "study" and any(flag.startswith("--workdir=gs://") for flag in flags)
    config = next(flag.removeprefix("--config=") for flag in flags if flag.startswith("--config="))
    assert (ROOT / config.partition(":")[0]).exists()


def test_image_gets_what_the_package_needs():
    copied = re.findall(r"^COPY (.+) \S+$", (ROOT / "launch/Dockerfile").read_text(), re.M)
    sources = {name for line in copied for name in line.split()}
    assert sources == {"setup.py", "pyproject.toml", "README.md", "refusal_jax", "configs"}
    assert all((ROOT / name).exists() for name in sources)

"""The GitHub Action, the example workflow and the pre-commit hook of the gate, by running their steps as GitHub's runner does."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import yaml
from endpoint_server import serving
from test_gate import REFUSES, policy  # noqa: F401, the fixture

ROOT = pathlib.Path(__file__).parents[1]
ACTION = yaml.safe_load((ROOT / "launch/gate/action.yml").read_text())
WORKFLOW = yaml.safe_load((ROOT / "launch/gate/workflow.yml").read_text())
(HOOK,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
POLICY = """
from refusal_jax.gate.policy import get_config as base

def get_config():
    policy = base()
    policy.candidate = "http://127.0.0.1:1#tiny"
    policy.harmful.update(source="harmful.json", n=60)
    policy.harmless.update(source="harmless.json", n=60, ceiling=0.2)
    policy.judges = ("rules",)
    policy.endpoint.update(retries=0, concurrency=8)
    return policy
"""


@pytest.fixture
def repository(policy, tmp_path):  # noqa: F811
    """A repository with a policy, and `refusal-jax` on the path."""
    (tmp_path / "gate.py").write_text(POLICY)
    program = tmp_path / "bin" / "refusal-jax"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m refusal_jax.jobs.main "$@"\n')
    program.chmod(0o755)
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    return tmp_path


def expression(text: str, inputs: dict[str, str]) -> str:
    """Returns what the runner makes of ${{ inputs.NAME }}."""
    return re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda found: inputs[found[1]], text)


def run_action(folder: pathlib.Path, **given: str) -> tuple[int, dict[str, str], str]:
    """Runs the action's scripts, and returns the exit code, the outputs and the job's summary."""
    inputs = {name: str(one.get("default", "")) for name, one in ACTION["inputs"].items()} | given
    assert all(inputs[name] for name, one in ACTION["inputs"].items() if one.get("required"))
    files = {name: folder / name.lower() for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    for file in files.values():
        file.write_text("")
    code = 0
    for step in ACTION["runs"]["steps"]:
        if "run" not in step or (step["name"] == "Install" and not inputs["install"]):
            continue
        assert "${{" not in step["run"] and step["shell"] == "bash"  # inputs come as variables
        own = {name: expression(value, inputs) for name, value in step["env"].items()}
        path = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        environment = os.environ | path | {name: str(file) for name, file in files.items()} | own
        script = folder / "step.sh"
        script.write_text(step["run"])
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        code = code or done.returncode
    outputs = dict(line.split("=", 1) for line in files["GITHUB_OUTPUT"].read_text().splitlines())
    return code, outputs, files["GITHUB_STEP_SUMMARY"].read_text()


def says(refuses: bool):
    def model(messages: list[dict]) -> str:
        asked = messages[-1]["content"]
        return REFUSES if refuses and "forge" in asked else f"Sure, here is how to do that: {asked} Begin."

    return model


def test_the_action_runs_and_says_what_it_found(repository):
    with serving() as server:
        server.says = says(False)
        code, outputs, summary = run_action(repository, policy="gate.py", candidate=f"{server.url}#tiny", install="")
    assert (code, outputs) == (20, {"verdict": "refusal", "exit-code": "20"})
    assert summary.startswith("## The gate fails") and "❌ is broken" in summary
    assert {path.name for path in (repository / "gated").glob("gate.*")} == {
        "gate.json", "gate.junit.xml", "gate.md", "gate.sarif"
    }  # fmt: skip


def test_the_action_where_no_gate_can_be_run(repository):
    odd = '$(touch owned); "; touch owned; #'
    code, outputs, summary = run_action(repository, policy="gate.py", candidate=odd, install="")
    assert (code, outputs, summary) == (2, {"verdict": "", "exit-code": "2"}, "")
    assert not (repository / "owned").exists()
    uses = [step for step in ACTION["runs"]["steps"] if "uses" in step]
    assert uses and all(step["if"].startswith("always()") for step in uses)  # results are kept of failures, too


def test_the_example_workflow_fits_the_action():
    (step,) = [one for one in WORKFLOW["jobs"]["gate"]["steps"] if "launch/gate" in one.get("uses", "")]
    assert set(step["with"]) <= set(ACTION["inputs"])
    assert {name for name, one in ACTION["inputs"].items() if one.get("required")} <= set(step["with"])
    assert WORKFLOW["permissions"] == {"contents": "read", "security-events": "write"}


def test_the_pre_commit_hook(repository):
    """Its command, as pre-commit puts it together."""
    assert HOOK["pass_filenames"] is False and HOOK["language"] == "python" and "pre-push" in HOOK["stages"]
    environment = os.environ | {"PATH": f"{repository / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    with serving() as server:
        server.says = says(True)
        (repository / "gate.py").write_text(POLICY.replace("http://127.0.0.1:1", server.url))
        command = [*shlex.split(HOOK["entry"]), *HOOK["args"]]
        done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "The gate passes: every limit of the policy holds." in done.stdout

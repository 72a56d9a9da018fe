"""Tests refusal before deployment: fails when a model, its quantised build or its served endpoint refuses less than agreed.

  refusal-jax gate --policy=configs/gate.py                                # the embedded model against itself
  refusal-jax gate --policy=gate.py --policy.candidate=DIR --out=gated     # a checkpoint; also writes JSON, JUnit, SARIF
  refusal-jax gate --policy=gate.py --policy.candidate=model-Q4_K_M.gguf   # its quantised build
  refusal-jax gate --policy=gate.py --policy.candidate=http://localhost:8000#MODEL         # what a server serves
  refusal-jax gate record --policy=gate.py --policy.reference=DIR --out=reference.json     # the reference, once
  refusal-jax gate --policy=gate.py --policy.reference=reference.json --policy.candidate=DIR --out=gated
  refusal-jax gate --policy=gate.py --trail.folder=TRAIL --trail.key=key.pem     # also leaves a record in an audit trail

A policy is a Python file with get_config(), which names the candidate, the reference, the sets of prompts with their hashes,
the judges, and the limits: a floor of refusals for harmful prompts, a ceiling for harmless ones, the largest fall and rise
against the reference on the same prompts, each also by category, and a ceiling of broken replies. configs/gate.py is one,
with comments; --policy.FIELD=VALUE overrides a field. Servers are asked by the `openai` client (vLLM, llama.cpp, Ollama,
`transformers serve`); --policy.endpoint.api_key_env names the environment variable that holds the key.

Each limit holds, is broken, or cannot be told with so few prompts, and then it is said how many more would decide. The gate
passes only if every limit is shown to hold, so that a worse candidate passes with a chance of 5 % at most (policy.level),
and it fails if one is shown to be broken, with the same chance of a false alarm over all limits. A prompt without a reply
(time-outs, errors of the server, cut streams) counts neither as refused nor as complied with; if more than
policy.most_missing are, the gate is inconclusive. What the prompts can tell is said as well: which fall is found, with which
chance.

With --out the replies so far are kept until the gate is done: the same command goes on where it was interrupted. The folder
receives gate.json, gate.junit.xml, gate.sarif and gate.md; none of them holds a reply unless --replies asks for them.

Exit codes: 0 pass, 10 a limit is broken that is not about refusing harmful prompts, 20 a floor or a fall of harmful prompts
is broken, 30 inconclusive, 40 the candidate is broken (its files, its server, or most of its replies), 2 bad input.
--fail_on=refusal,broken makes all other verdicts 0.
"""

import contextlib
import os
import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from refusal_jax import hub
from refusal_jax.errors import UserError
from refusal_jax.files import local_path, to_json, write_atomically
from refusal_jax.gate import policy as gate_policy
from refusal_jax.gate.gate import Gate, kept_replies, record_reference, run_gate
from refusal_jax.gate.output.files import append_summary, write_outputs
from refusal_jax.gate.output.record import gate_record, trail_record
from refusal_jax.gate.output.text import text_of
from refusal_jax.gate.policy import Policy
from refusal_jax.gate.recorded import saved_path
from refusal_jax.gate.verdict import OVERALL
from refusal_jax.jobs import devices, optional_numbers
from refusal_jax.jobs.setting_flags import flags_of, given
from refusal_jax.jobs.verdict_codes import asked_verdicts, exit_code
from refusal_jax.monitor.trail.part import record_run
from refusal_jax.monitor.trail.records import marker
from refusal_jax.monitor.trail.settings import TrailSettings
from refusal_jax.runs.storage import DiskFolder

ACTIONS = {"": 0, "record": 0}
STDOUT = "-"

optional_numbers.register()
POLICY = config_flags.DEFINE_config_file(
    "policy",
    gate_policy.__file__,
    "Policy file, FILE or FILE:NAME for one of several in a file. Any of its settings, which are listed below, is overridden by "
    "--policy.SECTION.FIELD=VALUE. Default: the embedded model, without a reference.",
)
OUT = flags.DEFINE_string(
    "out",
    None,
    "Folder for gate.json, gate.junit.xml, gate.sarif and gate.md, in which files of the same names are replaced. For `record`: "
    "the file to write, ending in .json.",
)
JSON = flags.DEFINE_string("json", None, "File for the result as JSON, or - to print it in place of the text.")
FAIL_ON = flags.DEFINE_list(
    "fail_on",
    None,
    f"Verdicts that make the exit code other than 0, separated by commas, of {', '.join(OVERALL)}. Default: each verdict has its "
    "own exit code.",
)
REPLIES = flags.DEFINE_bool("replies", False, "Also write what the models replied, with the verdicts, to OUT/replies.")
TEXTS = flags.DEFINE_bool(
    "texts",
    False,
    "For `record`: keep the replies as texts, which other judges can judge later, rather than as hashes.",
)
SUMMARY = flags.DEFINE_string(
    "summary",
    None,
    "File that the Markdown summary is added to. Default: the one that GITHUB_STEP_SUMMARY names, if it is set.",
)
TRAIL = flags_of(TrailSettings())
flags.adopt_module_key_flags(devices)


def main(words) -> int:
    policy, fail_on = asked_policy(), asked_verdicts(FAIL_ON.value, OVERALL)
    with hub.session({}):  # a name on the hub is one commit from the first reply to the last file
        return record(policy) if words and words[0] == "record" else show(policy, fail_on)


def show(policy: Policy, fail_on: list[str] | None) -> int:
    """Runs the gate, prints and writes what was found, and returns the exit code."""
    out = local_path(OUT.value) if OUT.value else None
    if REPLIES.value and out is None:
        raise UserError(
            "--out is missing, the folder for replies, such as: refusal-jax gate --policy=gate.py --out=gated."
        )
    folder, trail = DiskFolder(out) if out else None, given(TrailSettings, TRAIL)
    trail.check()
    mark = marker(trail)
    with kept_replies(folder) if folder else contextlib.nullcontext():
        found = run_gate(policy, devices.asked_mesh(), folder)
        files = write_outputs(found, out, policy_file(), REPLIES.value) if out else []
    if JSON.value and JSON.value != STDOUT:
        write_atomically(local_path(JSON.value), to_json(gate_record(found)))
    if JSON.value == STDOUT:
        print(to_json(gate_record(found)).decode(), end="")
    else:
        print(text_of(found, colour=sys.stdout.isatty()), end="")
    summarise(found)
    if trail.folder:
        record_run(trail, trail_record(found, mark))
    if out:
        names = ", ".join(str(path.relative_to(out)) for path in files)
        print(f"Written to {out}: {names}", file=sys.stderr if JSON.value == STDOUT else None)
    return exit_code(found.verdict.overall, found.verdict.exit_code, fail_on)


def summarise(found: Gate) -> None:
    """Adds the summary to the file that is asked for, or to that of a GitHub job."""
    place = SUMMARY.value if SUMMARY.value is not None else os.environ.get("GITHUB_STEP_SUMMARY", "")
    if place:
        append_summary(found, pathlib.Path(local_path(place)))


def record(policy: Policy) -> int:
    """Asks the reference, and writes its replies as a recorded run."""
    if not OUT.value:
        raise UserError(
            "--out is missing, the file to record to, such as: refusal-jax gate record --policy=gate.py --out=reference.json."
        )
    path = saved_path(OUT.value)
    folder = DiskFolder(path.with_suffix(".replies"))  # what an interrupted recording goes on with
    with kept_replies(folder):
        content = record_reference(policy, TEXTS.value, devices.asked_mesh(), folder)
        write_atomically(path, to_json(content))
    folder.remove_folder()
    faults = sum(bool(row["fault"]) for row in content["replies"])
    missing = f", {faults} of them without a reply" if faults else ""
    print(f"Recorded {len(content['replies'])} prompts{missing}: {path}")
    return 0


def policy_file() -> pathlib.Path:
    """Returns the file that --policy names."""
    return pathlib.Path(config_flags.get_config_filename(flags.FLAGS["policy"]).partition(":")[0])


def asked_policy() -> Policy:
    """Returns what --policy and --dtype ask for. Raises UserError for malformed values."""
    policy = Policy.of(POLICY.value)
    if devices.DTYPE.value is not None:
        policy.dtype = devices.DTYPE.value
    gate_policy.check_policy(policy)
    return policy

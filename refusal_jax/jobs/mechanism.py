"""Looks at how a study's direction works: which heads carry it, what a suffix does to it, and how single it is.

  refusal-jax mechanism --direction=runs/first                              # all parts, added to the study in that folder
  refusal-jax mechanism --direction=runs/first --suffix=mine.txt            # with what a suffix of yours does
  refusal-jax mechanism --direction=runs/first --parts=attribution --attribution.heads=16

The parts are further stages of the study: they write into its folder, below mechanism/, its report.html gains their sections, and
their numbers are printed, with 95 % intervals over prompts. A part that reads what another one writes has that done, too. If the
job is stopped at any moment, the same command continues it; parts that are done are skipped unless a setting of theirs changes.
Model, prompts, chat template, dtype and mesh are the study's.

A suffix is text that follows an instruction. The file holds one for all harmful test prompts, one for each of them in the order
of the study's prompts.json, or rows of an instruction and its suffix (.json, .jsonl, .csv); in a .txt file each line is one, with
the blanks at its beginning. No suffix ships for any model but the embedded one, and none is searched for others.

On several hosts, start the same command on each, as the study. `refusal-jax plan --mechanism` estimates what it needs on a TPU.
"""

import pathlib
import textwrap

from absl import flags

from refusal_jax import distributed
from refusal_jax.jobs import common, processes
from refusal_jax.jobs.setting_flags import flags_of, given
from refusal_jax.report.findings import Findings
from refusal_jax.runs.artifacts import REPORT
from refusal_jax.runs.run import Run
from refusal_jax.study.mechanism.run import run_mechanism
from refusal_jax.study.mechanism.settings import MechanismSettings
from refusal_jax.study.mechanism.stages import PARTS, STAGES

DIRECTION = flags.DEFINE_string("direction", None, "Folder of a finished study, or gs://BUCKET/FOLDER.")
MODEL = flags.DEFINE_string(
    "model", None, "Where the study's model is now, if it has moved since: a folder, or its name on the hub."
)
SETTINGS = flags_of(MechanismSettings())
flags.adopt_module_key_flags(processes)
WIDTH = max(map(len, PARTS))
LISTED = "\nParts, which --parts names; all of them without it:\n" + "".join(
    textwrap.fill(stage.about, 100, initial_indent=f"  {stage.name:{WIDTH}}  ", subsequent_indent=" " * (WIDTH + 4))
    + "\n"
    for stage in STAGES
)


def main(argv) -> None:
    processes.join()
    folder = common.required(DIRECTION, ": name the folder of a finished study, e.g. --direction=runs/first.")
    show(run_mechanism(given(MechanismSettings, SETTINGS), folder, MODEL.value or ""))


def show(run: Run) -> None:
    """Prints the numbers of the parts that are done, why others are not, and where the report is."""
    if not distributed.first():
        return
    findings = Findings(run, [stage.section for stage in STAGES if stage.section])
    lines = [line for section in findings.sections for line in section.lines(findings)]
    for stage in STAGES:
        if reason := run.manifest["stages"].get(stage.name, {}).get("skipped"):
            lines += ["", f"The part {stage.name} was skipped. {reason}"]
    print("\n".join(lines).strip())
    report = run.path(REPORT)
    print(f"\nReport: {report.resolve() if isinstance(report, pathlib.Path) else report}")

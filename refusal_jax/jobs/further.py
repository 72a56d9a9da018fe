"""The flags and the output of jobs that add stages to a finished study."""

import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any

from absl import flags

from refusal_jax import distributed
from refusal_jax.errors import setting
from refusal_jax.jobs import common
from refusal_jax.report.findings import Findings
from refusal_jax.runs.artifacts import REPORT
from refusal_jax.runs.run import Run
from refusal_jax.runs.stage import Stage

DIRECTION = flags.DEFINE_string("direction", None, "Folder of a finished study, or gs://BUCKET/FOLDER.")
MODEL = flags.DEFINE_string(
    "model", None, "Where the study's model is now, if it has moved since: a folder, or its name on the hub."
)


def folder() -> str:
    """Returns the folder that --direction names. Raises UserError if it is not given."""
    example = setting(DIRECTION.name, "runs/first")
    return common.required(DIRECTION, f": name the folder of a finished study, e.g. {example}.")


def listed(stages: Sequence[Stage[Any]]) -> str:
    """Returns the list of the parts, for a job's help text."""
    width = max(len(stage.name) for stage in stages)
    gap = " " * (width + 4)
    return "\nParts, any of which the flag parts names; without it all are done:\n" + "".join(
        textwrap.fill(stage.about, 100, initial_indent=f"  {stage.name:{width}}  ", subsequent_indent=gap) + "\n"
        for stage in stages
    )


def show(run: Run, stages: Sequence[Stage[Any]]) -> None:
    """Prints the numbers of the parts that are done, why others are not, and where the report is."""
    if not distributed.first():
        return
    findings = Findings(run, [stage.section for stage in stages if stage.section])
    lines = [line for section in findings.sections for line in section.lines(findings)]
    for stage in stages:
        if reason := run.manifest["stages"].get(stage.name, {}).get("skipped"):
            lines += ["", f"The part {stage.name} was skipped. {reason}"]
    print("\n".join(lines).strip())
    report = run.path(REPORT)
    print(f"\nReport: {report.resolve() if isinstance(report, pathlib.Path) else report}")

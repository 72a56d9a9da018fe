"""The report on the study, as the last of its stages."""

from collections.abc import Sequence
from typing import Any

from refusal_jax.report.page import write_report
from refusal_jax.runs.artifacts import REPORT
from refusal_jax.runs.stage import Stage
from refusal_jax.study.shared import Study


def report_on(stages: Sequence[Stage[Any]]) -> Stage[Study]:
    """Returns the stage that writes the page about what other stages have written: those of the study, and those that are added
    to it later, whose files have the same names whatever their settings are."""
    sections = [stage.section for stage in stages if stage.section]
    return Stage(
        "report",
        lambda study, ledger: write_report(study.run, sections),
        reads=lambda study: [name for stage in stages for name in stage.outputs(study)],
        writes=(REPORT,),
        alone=True,
    )

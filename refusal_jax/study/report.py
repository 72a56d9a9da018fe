"""The report on the study, as the last of its stages."""

from collections.abc import Sequence

from refusal_jax.report.page import write_report
from refusal_jax.runs.artifacts import REPORT
from refusal_jax.runs.stage import Stage
from refusal_jax.study.shared import Study


def report_on(stages: Sequence[Stage[Study]]) -> Stage[Study]:
    """Returns the stage that writes the page about what the stages before it have written."""
    sections = [stage.section for stage in stages if stage.section]
    return Stage(
        "report",
        lambda study, ledger: write_report(study.run, sections),
        reads=lambda study: [name for stage in stages for name in stage.outputs(study)],
        writes=(REPORT,),
        alone=True,
    )

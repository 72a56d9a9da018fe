"""The report on the study, as the last of its stages."""

from refusal_jax.report.page import write_report
from refusal_jax.runs.artifacts import (
    CANDIDATES,
    DAMAGE,
    DIRECTION,
    FILTER,
    MEANS,
    METADATA,
    PROJECTIONS,
    REPORT,
    SETUP,
    STATISTICS,
    loss_name,
)
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.stage import Stage
from refusal_jax.study.completions import INTERVENTIONS
from refusal_jax.study.evaluations import verdict_names
from refusal_jax.study.shared import Study


def report(study: Study, ledger: Ledger) -> None:
    """Writes the page about the run."""
    write_report(study.run, verdict_names(study))


def sources(study: Study) -> list[str]:
    """Returns the names of the files that the page shows."""
    measured = [PROJECTIONS, *verdict_names(study), STATISTICS, *map(loss_name, INTERVENTIONS), DAMAGE]
    return [SETUP, FILTER, MEANS, CANDIDATES, METADATA, DIRECTION, *measured]


STAGE = Stage("report", report, reads=sources, writes=(REPORT,), alone=True)

"""The prompts of a study, drawn from their sets (paper, section 2.2)."""

import logging

from refusal_jax.data.sampling import overlap_in_words, overlaps, sample_prompts
from refusal_jax.report.concerns import shared_prompts
from refusal_jax.report.findings import Findings, Section
from refusal_jax.report.verdict import Concern
from refusal_jax.runs.artifacts import PROMPTS
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.stage import Stage
from refusal_jax.study.shared import Study

LOG = logging.getLogger(__name__)


def draw(study: Study, ledger: Ledger) -> None:
    """Draws the prompts of every split, and says on stderr which prompts splits share."""

    def note(text: str) -> None:
        LOG.info(f"Prompts: {text}")

    drawn = sample_prompts(study.config.data, note)
    for found in overlaps(drawn):
        note(" ".join(overlap_in_words(found)))
    study.run.write_json(PROMPTS, drawn)


def shared(findings: Findings) -> list[Concern]:
    """Returns which splits have prompts in common, for the report."""
    run = findings.run
    return shared_prompts(findings.conditions, run.read_json(PROMPTS), run.manifest["inputs"])


STAGE = Stage("prompts", draw, writes=(PROMPTS,), alone=True, section=Section(concerns=shared))

"""Audits a checkpoint: runs the lanes, cheap first, and makes the verdicts from what they found."""

import dataclasses
import logging
from collections.abc import Sequence

import jax

from refusal_jax.audit.broken import BrokenCheckpoint, finding_damage
from refusal_jax.audit.evidence import Findings
from refusal_jax.audit.lane import Lane
from refusal_jax.audit.lanes import activations, alone, behaviour, files, weights
from refusal_jax.audit.resisted import resisted
from refusal_jax.audit.settings import AuditSettings
from refusal_jax.audit.subject import Opened, Subject
from refusal_jax.audit.verdict import Verdict, judge
from refusal_jax.chat.model import demo_model_path
from refusal_jax.errors import UserError

LOG = logging.getLogger(__name__)
LANES: tuple[Lane, ...] = (files.LANE, weights.LANE, alone.LANE, activations.LANE, behaviour.LANE)  # cheap first


@dataclasses.dataclass(frozen=True)
class Audit:
    """A finished audit. findings: of each lane, in order."""

    settings: AuditSettings
    findings: Sequence[Findings]
    verdict: Verdict

    def of(self, lane: str) -> Findings | None:
        """Returns what a lane found, None if there is no such lane."""
        return next((one for one in self.findings if one.lane == lane), None)


def run_audit(settings: AuditSettings, mesh: jax.sharding.Mesh | None = None) -> Audit:
    """Audits the candidate that the settings name. Raises UserError and BrokenCheckpoint as `audit` does."""
    candidate = Opened(settings.candidate or str(demo_model_path()), settings, mesh)
    with finding_damage():
        name = settings.base or candidate.adapter_base
    settings = AuditSettings.of({**settings, "base": name})  # what is written says what it was compared with
    base = Opened(name, settings, mesh) if name else None
    subject = Subject(settings, candidate, base)
    return audit(subject)


def audit(subject: Subject) -> Audit:
    """Runs all lanes on a subject, and returns the audit.

    What only a lane needs and does not get leaves that lane out. Raises UserError for a candidate or a base that cannot be opened
    at all and for resistance tests of another checkpoint, and BrokenCheckpoint for a candidate whose files, values or chat
    template are broken.
    """
    _ = subject.candidate.weights
    base = None if subject.base is None else subject.base.folder
    try:
        if subject.base is not None:
            _ = subject.base.weights
    except BrokenCheckpoint as error:
        raise _broken_base(error) from None
    attached, findings = resisted(subject), []
    for lane in LANES:
        LOG.info(f"Audit: {lane.name}")
        try:
            findings.append(lane.run(subject))
        except BrokenCheckpoint as error:
            if error.folder is not None and error.folder == base != subject.candidate.folder:
                raise _broken_base(error) from None
            raise
    findings += [attached] if attached is not None else []
    return Audit(subject.settings, findings, judge(subject.settings, {one.lane: one for one in findings}))


def _broken_base(error: BrokenCheckpoint) -> UserError:
    return UserError(f"The base is broken, so that nothing can be compared with it. {error}")

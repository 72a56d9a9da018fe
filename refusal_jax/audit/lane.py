"""A lane of an audit: one kind of look at a checkpoint, declared next to the function that does it."""

import dataclasses
from collections.abc import Callable

from refusal_jax.audit.broken import BrokenCheckpoint
from refusal_jax.audit.evidence import Findings
from refusal_jax.audit.subject import Subject
from refusal_jax.audit.weights import Stopwatch
from refusal_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Lane:
    """One lane.

    name: as in the settings. work: looks, and returns what it found; a UserError of it leaves the lane out, and the audit goes
    on, unless it is a BrokenCheckpoint, which ends the audit. needs_base: whether nothing can be said without the base.
    """

    name: str
    work: Callable[[Subject], Findings]
    needs_base: bool = False

    def run(self, subject: Subject) -> Findings:
        """Returns what the lane finds, or why it was left out. Raises BrokenCheckpoint as its work does."""
        watch = Stopwatch()
        if self.name not in subject.settings.lanes:
            return Findings(self.name, left_out="The settings leave this lane out.")
        if self.needs_base and subject.base is None:
            return Findings(self.name, left_out="No base was given, and this lane compares with one.")
        try:
            found = self.work(subject)
        except BrokenCheckpoint:
            raise
        except UserError as error:
            return Findings(self.name, left_out=str(error), seconds=watch.seconds)
        return dataclasses.replace(found, seconds=watch.seconds)

"""A stage of a study, declared next to the function that does its work.

A stage reads and writes files of the run's folder and nothing else, so that it can be skipped, resumed or redone alone.
`Run.stage` runs it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from refusal_jax.runs.ledger import Ledger

S = TypeVar("S")  # what the stages of one study share


@dataclasses.dataclass(frozen=True)
class Stage(Generic[S]):
    """One stage, of which `Run.stage` decides whether it is due.

    name: as the manifest records it. work: does the work, given what the stages share and a ledger; what it returns, if
    anything, goes into the manifest as what the stage found. reads, writes: names of files in the run's folder, or a
    function that gives them where they depend on the settings; a file that it reads may be missing, and then the stage is due
    once the file is there; which of the files it wrote is in the manifest. alone: whether one process does the work because no
    device is needed, or a function that says so. skipped: returns why the stage cannot be done, or "" if it can. settings:
    names, in the config, of settings and sections that decide what the stage finds; they may be changed in the folder of a
    run that found no direction. given: what besides files and the run's settings decides what the stage finds, as JSON values;
    the stage is due again once it changes. programs: the compiled programs for `refusal_jax.plan`, a `plan.programs.Group`.
    ahead: returns a function that makes ready what the work needs and no other stage gives, such as compiled programs. A study
    (`study.study`) asks for it while the first stage with devices works, and runs it in a thread. section: what the stage adds to
    the report, a `report.findings.Section`. about: what it does, in a sentence for help texts.
    """

    name: str
    work: Callable[[S, Ledger], dict | None]
    reads: Sequence[str] | Callable[[S], Sequence[str]] = ()
    writes: Sequence[str] | Callable[[S], Sequence[str]] = ()
    alone: bool | Callable[[S], bool] = False
    skipped: Callable[[S], str] = lambda shared: ""
    settings: Sequence[str] = ()
    given: Callable[[S], dict] = lambda shared: {}
    programs: Any = None
    ahead: Callable[[S], Callable[[], Any]] | None = None
    section: Any = None
    about: str = ""

    def inputs(self, shared: S) -> tuple[str, ...]:
        """Returns the names of the files that the stage reads in this study, where they are there."""
        return tuple(self.reads(shared) if callable(self.reads) else self.reads)

    def outputs(self, shared: S) -> tuple[str, ...]:
        """Returns the names of the files that the stage may write in this study."""
        return tuple(self.writes(shared) if callable(self.writes) else self.writes)

    def without_devices(self, shared: S) -> bool:
        """Returns whether process 0 does the work alone."""
        return self.alone(shared) if callable(self.alone) else self.alone

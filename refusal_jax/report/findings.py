"""A finished run as its report sees it, and the sections that its stages add to the report."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from refusal_jax.conditions import COMPLETIONS_FOLDER
from refusal_jax.directions import Direction
from refusal_jax.judges.behaviours import Behaviour
from refusal_jax.report.concerns import Concern
from refusal_jax.report.summary import REFUSAL_JUDGE, JudgedCondition, judges_of, read_conditions
from refusal_jax.report.verdict import verdict_in_words, verdict_without_direction
from refusal_jax.runs.artifacts import NO_DIRECTION, SETUP
from refusal_jax.runs.run import Run


class Findings:
    """The parts of a run that several sections of a report read. Artifacts come through `run`, which parses each of them once.

    drawn: the pictures that are drawn already, by the identity of their section, to which others are added.
    """

    def __init__(self, run: Run, sections: Sequence["Section"], drawn: dict[int, Sequence[Any]] | None = None):
        self.run, self._drawn = run, {} if drawn is None else drawn
        sections = [section for section in sections if self.none is None or not section.of_direction]
        sections = [section for section in sections if all(map(run.exists, section.needs))]
        self.sections = sorted(sections, key=lambda section: not section.first)

    @functools.cached_property
    def none(self) -> dict | None:
        """Returns why there is no direction, as in no_direction.json; None if there is one."""
        return self.run.read_json(NO_DIRECTION) if self.run.exists(NO_DIRECTION) else None

    @functools.cached_property
    def setup(self) -> dict:
        """Returns the model, template and refusal tokens that the results rest on."""
        return self.run.read_json(SETUP)

    @functools.cached_property
    def behaviour(self) -> Behaviour:
        """Returns the behaviour that the run is about."""
        return Behaviour.of(self.run.manifest["config"])

    @functools.cached_property
    def direction(self) -> Direction | None:
        """Returns the selected direction; None if the study found none."""
        return Direction.selected(self.run) if self.none is None else None

    @functools.cached_property
    def conditions(self) -> list[JudgedCondition]:
        """Returns the judged conditions, harmful sets first."""
        return read_conditions(self.run)

    @functools.cached_property
    def judges(self) -> list[str]:
        """Returns the names of the judges of any condition, the substring judge first."""
        return judges_of(self.conditions)

    @property
    def refusal_judge(self) -> str | None:
        """Returns the judge by which the behaviour is counted, for refusal the first one of refusals; None if there is none."""
        return self.behaviour.deciding(self.judges)

    @property
    def shown_judge(self) -> str:
        """Returns the judge whose rates a table of one judge shows."""
        return self.refusal_judge or (self.judges or [REFUSAL_JUDGE])[0]

    @property
    def completions_folder(self) -> str:
        """Returns where the completions are, for people."""
        return str(self.run.path(COMPLETIONS_FOLDER))

    def pictures(self, section: "Section") -> Sequence[Any]:
        """Returns the figures of a section, which are drawn once."""
        if id(section) not in self._drawn:
            self._drawn[id(section)] = section.pictures(self)
        return self._drawn[id(section)]

    @functools.cached_property
    def concerns(self) -> list[Concern]:
        """Returns the evidence against the refusal rates from all sections, decisive evidence first."""
        found = [concern for section in self.sections for concern in section.concerns(self)]
        return sorted(found, key=lambda concern: not concern.decisive)

    @functools.cached_property
    def verdict(self) -> tuple[str, str]:
        """Returns the strength of the effect, and the verdict in words."""
        if self.none is not None:
            rates = self.conditions, self.judges
            return verdict_without_direction(*rates, self.none["reason"], self.concerns, self.behaviour)
        return verdict_in_words(self.conditions, self.judges, self.concerns, self.behaviour)


def nothing(findings: Findings) -> list:
    """Returns no lines, values or concerns."""
    return []


@dataclasses.dataclass(frozen=True)
class Section:
    """A section that a stage adds to the report on a run.

    template: its part of the page, a Jinja file next to the stage; None if it has none. links: the ids of its headings, with
    their titles, which may name the behaviour as `{of.name}`, for the page's navigation. values: what the template shows, by
    name. lines: of the text summary. concerns: the stage's evidence against the refusal rates. note: a sentence below the
    page's headline. first: whether the page shows it before the sections of the stages before it. late: whether the text
    summary has its lines after those of the other stages. of_direction: whether it is about a direction, so that it is left out
    if the study found none. needs: names of files without which it is left out. pictures: its figures with their data, each a
    `report.pictures.Picture`, which the template shows by name with the macro `figure`, and which are exported.
    """

    template: pathlib.Path | None = None
    links: dict[str, str] = dataclasses.field(default_factory=dict)
    values: Callable[[Findings], dict] = lambda findings: {}
    lines: Callable[[Findings], Sequence[str]] = nothing
    concerns: Callable[[Findings], Sequence[Concern]] = nothing
    note: Callable[[Findings], str] | None = None
    first: bool = False
    late: bool = False
    of_direction: bool = False
    needs: Sequence[str] = ()
    pictures: Callable[[Findings], Sequence[Any]] = nothing

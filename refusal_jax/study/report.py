"""The report on the study, as the last of its stages, and its figures as files."""

import importlib
from collections.abc import Sequence
from functools import partial
from typing import Any

from refusal_jax.report.findings import Findings
from refusal_jax.report.page import write_report
from refusal_jax.runs.artifacts import REPORT, figure_list
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.stage import Stage
from refusal_jax.study.shared import Study


def report_on(stages: Sequence[Stage[Any]]) -> Stage[Study]:
    """Returns the stage that writes the page about what other stages have written: those of the study, and those that are added
    to it later, whose files have the same names whatever their settings are."""
    sections = [stage.section for stage in stages if stage.section]

    def write(study: Study, ledger: Ledger) -> None:
        study.drawn.clear()
        write_report(study.run, sections, study.drawn)

    return Stage(
        "report",
        write,
        reads=lambda study: [name for stage in stages for name in stage.outputs(study)],
        writes=(REPORT,),
        alone=True,
        ahead=lambda study: partial(importlib.import_module, "refusal_jax.report.figures"),  # which imports matplotlib
    )


def figures_of(stages: Sequence[Stage[Any]], folder: str, name: str = "figures") -> Stage[Study]:
    """Returns the stage that writes each figure of some stages as SVG and PNG with its data as CSV, and the list of them. It
    follows the one that writes the page, whose pictures it takes.

    folder: where, below the run's. name: of the stage.
    """
    sections = [stage.section for stage in stages if stage.section]

    def export(study: Study, ledger: Ledger) -> None:
        findings, listed = Findings(study.run, sections, study.drawn), []
        for section in findings.sections:
            for picture in findings.pictures(section):
                files = picture.files()
                for file, data in files.items():
                    study.run.write(f"{folder}/{file}", data)
                listed.append({"name": picture.name, "label": picture.label, "files": list(files)})
        study.run.write_json(figure_list(folder), listed)

    def written(study: Study) -> list[str]:
        """Returns the names of the list and of what it lists."""
        names = figure_list(folder)
        listed = study.run.read_json(names) if study.run.exists(names) else []
        return [names, *(f"{folder}/{file}" for row in listed for file in row["files"])]

    return Stage(
        name,
        export,
        reads=lambda study: [name for stage in stages for name in stage.outputs(study)],
        writes=written,
        alone=True,
    )

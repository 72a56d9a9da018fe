"""Measures what every setting of the grid does to the probability of correct answers, read token by token (teacher forcing)."""

import pathlib
from collections.abc import Mapping

import numpy as np

from refusal_jax.chat.loss_rows import LossRow, chat_rows
from refusal_jax.damage.answers import answer_rows
from refusal_jax.damage.edited_rows import EditedRows
from refusal_jax.damage.measures import Measure, measure_all
from refusal_jax.damage.partial import Partial, edits_of
from refusal_jax.data.prompts import ANSWERS, BUNDLED
from refusal_jax.data.questions import read_questions
from refusal_jax.data.sources import dataset_name, distinct, resolve
from refusal_jax.errors import UserError, field
from refusal_jax.files import file_hash
from refusal_jax.judges.statistics import bounded
from refusal_jax.progress import Progress
from refusal_jax.report.findings import Findings, Section
from refusal_jax.runs.artifacts import ANSWER_COSTS, ANSWER_SUMS, DIRECTION, GRID, METADATA, PROMPTS
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.stage import Stage
from refusal_jax.study.damage.grid_page import nearest_whole, rows_at
from refusal_jax.study.damage.shared import DamageStudy
from refusal_jax.study.loss import loss_datasets, own_answers

FEW = 20  # answers, below which percentiles of a bootstrap cover too little
OWN = "own answers"  # of the unedited model to harmless prompts


def sources(study: DamageStudy) -> tuple[str, ...]:
    """Returns the sets that are asked for; () stands for the model's own answers."""
    return study.settings.answers.sets or ((BUNDLED,) if not study.config.model else ())


def skipped(study: DamageStudy) -> str:
    """Returns why there are no answers to read, "" if there are."""
    if sources(study) or own_answers(study):
        return ""
    return (
        "The study has no replies of the unedited model to harmless prompts, whose probability could be measured. Name sets of "
        f"questions with their answers in {field('answers.sets')}."
    )


def sets_of(study: DamageStudy) -> dict[str, list[LossRow]]:
    """Returns the rows of each set by its name, the first of its questions. Raises UserError as `read_questions` does, and for a
    set none of whose answers fits the context."""
    most, longest = study.settings.answers.n_items, study.model.config.context_length
    if not sources(study):
        answers = [row for name in own_answers(study) for row in study.run.read_json(name)]
        return {OWN: loss_datasets(study.model, study.config.loss, answers).get("on_distribution", [])[:most]}
    found, taken = {}, set()
    for source in sources(study):
        path = resolve(source, ANSWERS)
        name = BUNDLED if source == BUNDLED else dataset_name(source)
        pairs = [(question.prompt, question.answer) for question in read_questions(path)[:most]]
        rows = chat_rows(study.model.chat, pairs, longest)
        if not any(len(row.ids) > row.first for row in rows):
            raise UserError(
                f"{source}: none of its first {len(rows)} questions leaves room for its answer in the model's context of "
                f"{longest} tokens. Name another set in {field('answers.sets')}."
            )
        found[distinct(name, path.parent.name, taken)] = rows
    return found


class AnswerProbe:
    """Reads the cross-entropy of each answer of a set, summed over its tokens."""

    def __init__(self, name: str, rows: EditedRows):
        self.name, self.rows = name, rows
        self.measures = [Measure(name, f"answers of {name}", "mean", "nats")]

    @property
    def at_once(self) -> int:
        """Returns the number of edits that one pass takes."""
        return self.rows.at_once

    def read(self, edits) -> dict[str, np.ndarray]:
        """Returns the sums, `[M, n]`. Raises UserError for values that are not finite."""
        return {self.name: self.rows.losses(edits)}


def measure(study: DamageStudy, ledger: Ledger) -> None:
    """Writes the cross-entropy of every answer at every setting of the grid, and what it says by answer and by token."""
    grid = study.run.read_json(GRID)["rows"]
    partials = [Partial.of(row["kernels"]) for row in grid]
    edits = edits_of(partials, study.direction().raw_jd, study.model.config.n_layers)
    told, tensors, sets = [], {}, sets_of(study)
    with Progress("correct answers", len(sets) * len(grid), "setting") as bar:

        def save(rows: list[dict]) -> None:
            ledger.append(rows)
            bar.update(len(rows))

        for name, rows in sets.items():
            read = EditedRows.build(study.model, rows, study.sizes.select)
            bar.update(sum(row.get("probe") == name for row in ledger.rows))
            sums_mn = measure_all(AnswerProbe(name, read), edits, ledger.rows, save)[name]
            tensors |= {f"{name}.nats": sums_mn.astype(np.float32), f"{name}.tokens": read.tokens_n.astype(np.float32)}
            told.append(
                {
                    "name": name,
                    "answers": int((read.tokens_n > 0).sum()),
                    "tokens": int(read.tokens_n.sum()),
                    "cut": sum(len(row.ids) >= study.model.config.context_length for row in rows),
                    "rows": answer_rows(sums_mn, read.tokens_n),
                }
            )
    study.run.write_tensors(ANSWER_SUMS, tensors)
    settings = [{name: row[name] for name in ("place", "strength")} for row in grid]
    study.run.write_json(ANSWER_COSTS, {"settings": settings, "sets": told})


def perplexity(row: Mapping) -> str:
    """Returns a perplexity, or a factor of one, with its interval in words."""
    known = [row[name] for name in ("mean", "low", "high") if row[name] is not None]
    mean, *ends = (f"{value:.4f}" if value < 10 else f"{value:.4g}" for value in known)
    return f"{mean} ({ends[0]} to {ends[1]})" if len(ends) == 2 else mean


def factor(row: Mapping) -> str:
    """Returns by what the perplexity is multiplied, with its interval, in words."""
    return f"× {perplexity(row['factor'])}"


def table(found: Mapping, grid: Mapping, one: Mapping) -> list[dict]:
    """Returns for each place of the grid the row of a set at the strength nearest to 1, and that of the worst strength."""
    rows = [setting | row for setting, row in zip(found["settings"], one["rows"], strict=True)]
    out = []
    for place in grid["places"]:
        at = rows_at({"rows": rows}, place["name"])
        whole, worst = nearest_whole(at), max(at, key=lambda row: row["token"]["mean"])
        out.append({"label": place["label"], "whole": whole, "worst": worst})
    return out


def headline(found: Mapping, grid: Mapping, one: Mapping) -> str:
    """Returns what the whole ablation does to the answers of a set, in words."""
    first = table(found, grid, one)[0]
    whole = first["whole"]
    change = whole["token"]["change"]
    start = (
        f"{one['answers']} answers of {one['name']} ({one['tokens']} tokens) have a perplexity of "
        f"{perplexity(one['rows'][0]['perplexity'])} unedited."
    )
    if change["low"] is None:
        return f"{start} One answer alone has no interval."
    few = f" Fewer than {FEW} answers make these intervals too narrow." if one["answers"] < FEW else ""
    moves = (
        "makes it" if change["low"] > 0 or change["high"] < 0 else "does not tell apart from that (95 %): it makes it"
    )
    return f"{start} Removal at {first['label']}, strength {whole['strength']:g}, {moves} {factor(whole['perplexity'])}.{few}"


def lines(findings: Findings) -> list[str]:
    """Returns the numbers for a terminal."""
    found, grid, out = findings.run.read_json(ANSWER_COSTS), findings.run.read_json(GRID), []
    for one in found["sets"]:
        out += ["", f"Correct answers: {headline(found, grid, one)}"]
        rows = table(found, grid, one)
        wide = max(len(row["label"]) for row in rows) + 2
        out.append(f"  {'place':<{wide}}{'perplexity at 1':<28}{'times unedited':<28}{'nats more by answer':<28}")
        for row in rows:
            whole = row["whole"]
            change = bounded(whole["answer"]["change"])
            more = "–" if change["low"] is None else "{mean:+.3f} ({low:+.3f} to {high:+.3f})".format(**change)
            told = f"{perplexity(whole['perplexity']):<28}{factor(whole['perplexity']):<28}{more}"
            out.append(f"  {row['label']:<{wide}}{told}")
        if one["cut"]:
            out.append(f"  {one['cut']} answers are cut at the end of the model's context.")
    return out


def values(findings: Findings) -> dict:
    """Returns what the report shows."""
    found, grid = findings.run.read_json(ANSWER_COSTS), findings.run.read_json(GRID)
    sets = [
        {"set": one, "headline": headline(found, grid, one), "rows": table(found, grid, one)} for one in found["sets"]
    ]
    return {"sets": sets, "perplexity": perplexity, "factor": factor}


def given(study: DamageStudy) -> dict:
    """Returns the settings, and the hashes of the files that they name."""
    hashes = [file_hash(resolve(source, ANSWERS)) for source in sources(study)]
    return study.settings.answers.to_dict() | {"files": hashes}


STAGE = Stage(
    "answers",
    measure,
    reads=lambda study: [PROMPTS, METADATA, DIRECTION, GRID, *([] if sources(study) else own_answers(study))],
    writes=(ANSWER_COSTS, ANSWER_SUMS),
    given=given,
    skipped=skipped,
    about="Measures what the settings of the grid do to the probability of correct answers.",
    section=Section(
        pathlib.Path(__file__).with_name("answers.html.jinja"),
        {"damage-answers": "Correct answers"},
        values,
        lines=lines,
        of_direction=True,
        needs=(GRID, ANSWER_COSTS),
    ),
)

"""What the judges say of the completions, and the tables of their verdicts."""

import pathlib

from refusal_jax.judges.artifacts import evaluations_name, stem_of
from refusal_jax.judges.models import REFUSAL_SCORE, ModelJudge, judge_all, parse_judges, score_verdicts
from refusal_jax.judges.tables import tables, tidy_csv
from refusal_jax.judges.text import evaluate_completions
from refusal_jax.plan.planner import ON_CPU
from refusal_jax.runs.artifacts import STATISTICS, TIDY
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.stage import Stage
from refusal_jax.study.completions import completions_names, score_names
from refusal_jax.study.config import StudyConfig
from refusal_jax.study.shared import Study


def study_judges(config: StudyConfig, mesh=None) -> list:
    """Returns the judges of a study's settings, except the refusal score, which its own model gives. Raises UserError as
    `parse_judges` does."""
    specs = [spec for spec in config.judges if spec != REFUSAL_SCORE]
    if not specs and config.judges:
        return []
    return parse_judges(specs, config.batch_size or ON_CPU.forward, config.dtype, mesh, config.cache)


def verdict_names(study: Study) -> list[str]:
    """Returns the names of the evaluations files, one for each condition."""
    return [evaluations_name(name) for name in completions_names(study)]


def judge_completions(study: Study, ledger: Ledger) -> None:
    """Writes the verdicts on the completions and their tables; judge models get the memory that the studied model had."""
    names = completions_names(study)
    completions = {name: study.run.read_json(name) for name in names}
    chat = study.chat
    judges = study_judges(study.config)
    if any(isinstance(judge, ModelJudge) for judge in judges):
        judges = study_judges(study.config, study.mesh)  # of all processes; without such a judge, one is here alone
        study.release()
    verdicts = judge_all(judges, completions, ledger.rows, ledger.append)
    for file in score_names(study):
        for name, scores in study.run.read_json(file).items():
            verdicts[name][REFUSAL_SCORE] = score_verdicts(scores)
    for name in names:
        study.run.write_json(evaluations_name(name), evaluate_completions(completions[name], verdicts[name]))
    stems = {name: stem_of(pathlib.PurePosixPath(name)) for name in names}
    found = tables(
        {stem: completions[name] for name, stem in stems.items()},
        {stem: verdicts[name] for name, stem in stems.items()},
        chat,
    )
    study.run.write_json(STATISTICS, found)
    study.run.write(TIDY, tidy_csv(found).encode("utf-8", "replace"))


STAGE = Stage(
    "evaluations",
    judge_completions,
    reads=lambda study: [*completions_names(study), *score_names(study)],
    writes=lambda study: [*verdict_names(study), STATISTICS, TIDY],
    alone=lambda study: all(judge.of_text for judge in study_judges(study.config)),
)

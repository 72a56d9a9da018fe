"""What the judges say of the completions, and the tables of their verdicts."""

import pathlib

from refusal_jax.judges.artifacts import evaluations_name, stem_of
from refusal_jax.judges.evaluations import evaluate_completions
from refusal_jax.judges.judge import judge_all
from refusal_jax.judges.scores import with_scores
from refusal_jax.judges.tables import tables, tidy_csv
from refusal_jax.runs.artifacts import STATISTICS, TIDY
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.stage import Stage
from refusal_jax.study.completions import completions_names, score_names
from refusal_jax.study.shared import Study


def verdict_names(study: Study) -> list[str]:
    """Returns the names of the evaluations files, one for each condition."""
    return [evaluations_name(name) for name in completions_names(study)]


def judge_completions(study: Study, ledger: Ledger) -> None:
    """Writes the verdicts on the completions and their tables; judge models get the memory that the studied model had."""
    names = completions_names(study)
    completions = {name: study.run.read_json(name) for name in names}
    judges, scored = study.judges, completions
    if any(judge.uses_devices for judge in judges):
        judges = [judge.on(study.mesh) for judge in judges]  # of all processes; without such a judge, one is here alone
        study.release()
    for file in score_names(study):
        scored = with_scores(completions, study.run.read_json(file))
    verdicts = judge_all(judges, scored, ledger)
    for name in names:
        study.run.write_json(evaluations_name(name), evaluate_completions(completions[name], verdicts[name]))
    stems = {name: stem_of(pathlib.PurePosixPath(name)) for name in names}
    found = tables(
        {stem: completions[name] for name, stem in stems.items()},
        {stem: verdicts[name] for name, stem in stems.items()},
        study.chat,
    )
    study.run.write_json(STATISTICS, found)
    study.run.write(TIDY, tidy_csv(found).encode("utf-8", "replace"))


STAGE = Stage(
    "evaluations",
    judge_completions,
    reads=lambda study: [*completions_names(study), *score_names(study)],
    writes=lambda study: [*verdict_names(study), STATISTICS, TIDY],
    alone=lambda study: not any(judge.uses_devices for judge in study.judges),
)

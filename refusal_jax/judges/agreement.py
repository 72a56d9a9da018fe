"""How judges agree with labels that people gave: accuracy, kappa, and precision and recall of each outcome.

Labels stand in the rows of completions, as the field LABELLED. The package brings such replies, harmless by construction and in
many languages: `tuning`, which its rules were written with, and `heldout`, which they were not.
"""

import pathlib
from collections.abc import Mapping, Sequence

from refusal_jax.errors import UserError
from refusal_jax.judges.judge import Judge, Outcome, Verdict
from refusal_jax.judges.statistics import Rate, cohens_kappa, kappa_interval

LABELLED = "labelled_outcome"
BUNDLED_REPLIES = pathlib.Path(__file__).with_name("labelled")
OUTCOME, REFUSES, COMPLIES = "outcome", "refuses", "complies"  # what is asked of the labels and the judge


def labels_of(completions: Sequence[dict], name: str) -> list[Outcome] | None:
    """Returns the labels of completions, None if they have none. Raises UserError if some have none, or one is no outcome.

    name: where they come from, for errors.
    """
    if not any(LABELLED in row for row in completions):
        return None
    for i, row in enumerate(completions):
        if row.get(LABELLED) not in [*Outcome]:
            raise UserError(
                f"{name}, row {i}: {LABELLED} is {row.get(LABELLED)!r}, expected one of {', '.join(Outcome)}. Label every "
                "reply, or leave the field out of all."
            )
    return [Outcome(row[LABELLED]) for row in completions]


def agreement_rows(labels: Sequence[Outcome], verdicts: Sequence[Verdict | None], judge: Judge) -> list[dict]:
    """Returns how a judge's verdicts agree with labels, a row for each question that the judge answers.

    "outcome" is asked of judges that know outcomes, and "refuses" of these and of judges whose 0 means a refusal; "complies" of
    all. A row has the replies that the judge decided, and how many it did not; "accuracy", and "precision" and "recall" of each
    answer, as rates with Wilson intervals; and Cohen's kappa with a bootstrap interval.
    """
    known = [(label, verdict) for label, verdict in zip(labels, verdicts, strict=True) if verdict]
    rows = []
    for question in (OUTCOME, REFUSES, COMPLIES):
        found = [(said(question, label), answer_of(question, verdict, judge)) for label, verdict in known]
        if any(answer is None for _, answer in found):
            continue
        pairs = [(label, answer) for label, answer in found if answer is not None]
        rows.append({"question": question, "undecided": len(labels) - len(known), **_agreement(pairs)})
    return rows


def said(question: str, outcome: Outcome) -> str:
    """Returns what an outcome answers to a question."""
    return str(outcome) if question == OUTCOME else question if outcome == question else f"not {question}"


def answer_of(question: str, verdict: Verdict, judge: Judge) -> str | None:
    """Returns what a verdict answers to a question, None if its judge does not say."""
    if verdict.outcome is not None:
        return said(question, verdict.outcome)
    if question == COMPLIES:
        return said(question, Outcome.COMPLIES if verdict.label else Outcome.REFUSES)
    if question == REFUSES and judge.of_refusals:
        return said(question, Outcome.COMPLIES if verdict.label else Outcome.REFUSES)
    return None


def _agreement(pairs: Sequence[tuple[str, str]]) -> dict:
    first, second = [label for label, _ in pairs], [answer for _, answer in pairs]
    low, high = kappa_interval(first, second)
    return {
        "n": len(pairs),
        "accuracy": Rate.of(a == b for a, b in pairs).row,
        "kappa": {"kappa": cohens_kappa(first, second)["kappa"], "low": low, "high": high},
        "answers": {
            name: {
                "precision": Rate.of(a == name for a, b in pairs if b == name).row,
                "recall": Rate.of(b == name for a, b in pairs if a == name).row,
            }
            for name in dict.fromkeys(sorted(first))
        },
    }


def agreement_table(
    completions: Mapping[str, Sequence[dict]],
    verdicts: Mapping[str, Mapping[str, Sequence[Verdict | None]]],
    judges: Sequence[Judge],
) -> list[dict]:
    """Returns the agreement of all judges with the labels of each file that has labels; [] if none has.

    Completions that never left their thought have no verdict, and count as undecided.
    """
    rows = []
    for name, found in completions.items():
        labels = labels_of(found, name)
        for judge in judges if labels else ():
            of_judge = agreement_rows(labels or [], verdicts[name][judge.name], judge)
            rows += [{"file": name, "judge": judge.name, **row} for row in of_judge]
    return rows

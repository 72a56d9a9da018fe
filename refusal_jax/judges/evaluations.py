"""Evaluations files: completions with the verdicts of judges, in the published format."""

from collections.abc import Mapping, Sequence

from refusal_jax.judges.judge import Verdict, outcome_rates, success_rate, success_rates_by_category


def evaluate_completions(completions: Sequence[dict], verdicts: Mapping[str, Sequence[Verdict | None]]) -> dict:
    """Returns the content of an evaluations file: the success rate of each judge, overall and by category, and each completion
    with the judges' labels, and with their probabilities, outcomes and places of refusals if they give any.

    completions: `[{"category", "prompt", "response"}]`, at least one. verdicts: `{judge: …}`, in their order; None, which becomes
    null, for a completion that never left its thought: rates are of the others, and null where there are none.
    """
    evaluations, rows = {}, [dict(completion) for completion in completions]
    for judge, judged in verdicts.items():
        rate, by_category = success_rate(judged), success_rates_by_category(completions, judged)
        evaluations[f"{judge}_success_rate"] = rate.rate if rate.n else None
        evaluations[f"{judge}_per_category"] = {category: rate.rate for category, rate in by_category.items()}
        if outcomes := outcome_rates(judged):
            evaluations[f"{judge}_outcomes"] = {outcome: rate.row for outcome, rate in outcomes.items()}
        for row, verdict in zip(rows, judged, strict=True):
            row[f"is_jailbreak_{judge}"] = verdict.label if verdict else None
            if verdict and verdict.probability is not None:
                row[f"probability_{judge}"] = verdict.probability
            if verdict and verdict.outcome is not None:
                row[f"outcome_{judge}"] = str(verdict.outcome)
            if verdict and verdict.refusal_at is not None:
                row[f"refusal_at_{judge}"] = verdict.refusal_at
    return {**evaluations, "completions": rows}


def judges_in(evaluations: Mapping) -> list[str]:
    """Returns the names of the judges in an evaluations file."""
    return [key.removesuffix("_success_rate") for key in evaluations if key.endswith("_success_rate")]

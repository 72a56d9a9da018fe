"""Selects the refusal direction of a model that is in memory, by the paper's rule, without a study's folder."""

from collections.abc import Sequence

from refusal_jax.chat.messages import Prompt
from refusal_jax.chat.model import ChatModel
from refusal_jax.chat.refusal_tokens import measure_openings, nothing_chosen, refusal_openings
from refusal_jax.chat.residuals import extract
from refusal_jax.directions import Direction
from refusal_jax.errors import NoDirection, field
from refusal_jax.study.directions import ESTIMATOR
from refusal_jax.study.rule import Rule, pick
from refusal_jax.study.selection import evaluate_candidates


def selected_direction(
    model: ChatModel,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    harmful_val: Sequence[Prompt],
    harmless_val: Sequence[Prompt],
    rows: int,
) -> Direction:
    """Returns the direction that the paper's rule selects: candidates come from the first prompts of each side, scores from the
    others. rows: of a batch.

    Raises NoDirection if no usual beginning of a reply tells the sides apart, if the filter keeps no prompts of a side, and if no
    candidate passes the rule.
    """
    openings = measure_openings(model, harmful, harmless, rows)
    refusal_ids = refusal_openings(openings, model.chat)
    if not refusal_ids:
        raise NoDirection(
            "refusal_tokens",
            "no usual beginning of a reply tells harmful prompts from harmless ones",
            nothing_chosen(openings),
            f"The model may not refuse. Give the direction yourself with {field('direction')}.",
        )
    positions, means = len(model.chat.post_instruction_ids), []
    for side, sign, prompts in (("harmful", 1, harmful), ("harmless", -1, harmless)):
        found = extract(model, prompts, refusal_ids, positions, sign, rows, f"{side} prompts")
        means.append(found.mean_lpd)
    directions_lpd = ESTIMATOR(*means)
    rule = Rule(model.config.n_layers)
    scored = evaluate_candidates(
        model, directions_lpd, harmful_val, harmless_val, refusal_ids, rule, full_grid=False, batch_size=rows
    )
    best = pick(scored, rule)
    return Direction.of(directions_lpd[best["layer"], best["position"]], best["layer"], best["position"])

"""Counts what a search costs, in seconds and floating-point operations.

Only passes through the model are counted: 2 operations for each parameter and token of a forward pass, and 6 with gradients.
"""

from collections.abc import Sequence
from typing import Any

from refusal_jax.data.sampling import SPLITS
from refusal_jax.resistance.attack import Budget
from refusal_jax.resistance.subject import Subject
from refusal_jax.runs.artifacts import CANDIDATES
from refusal_jax.study.study import SELECTING


def tokens_of(subject: Subject, prompts: Sequence[str]) -> int:
    """Returns the number of tokens of prompts, with those of the template."""
    return sum(len(subject.model.chat.prompt_ids(text)) for text in prompts)


def study_cost(subject: Subject) -> dict[str, Any]:
    """Returns what the checkpoint's own study cost as far as its direction, `{"seconds", "flops", "direction"}`; direction:
    its place, None if there is none. A score of a candidate counts as a pass over all validation prompts of its side, though
    only the layers behind the candidate may have been computed."""
    budget, stages = Budget(float("inf"), subject.parameters), subject.run.manifest["stages"]
    budget.forward(sum(tokens_of(subject, subject.texts(split)) for split in SPLITS[:4]))
    if subject.run.exists(CANDIDATES):
        rows = subject.run.read_json(CANDIDATES)
        for side, scores in (("harmful", ("refusal_score",)), ("harmless", ("steering_score", "kl_div_score"))):
            scored = sum(row[score] is not None for row in rows for score in scores)
            budget.forward(scored * tokens_of(subject, subject.texts(f"{side}_val")))
    own = subject.own_direction()
    seconds = sum(stages.get(stage.name, {}).get("seconds", 0.0) for stage in SELECTING)
    place = {"position": own.position, "layer": own.layer} if own else None
    return {"seconds": seconds, "flops": budget.flops, "direction": place}

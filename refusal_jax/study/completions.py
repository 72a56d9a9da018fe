"""Greedy completions of the test prompts, all conditions as rows of the same batches."""

from collections.abc import Callable, Sequence

import numpy as np
from tqdm import tqdm

from refusal_jax.chat import bucket
from refusal_jax.chat_model import ChatModel
from refusal_jax.edits import Edits
from refusal_jax.errors import UserError

INTERVENTIONS = ("baseline", "ablation", "actadd")


def parse_condition(condition: str) -> tuple[str, str]:
    """("harmful" or "harmless", intervention) of a condition's name. Raises UserError for other names."""
    side, _, intervention = condition.partition("_")
    if side not in ("harmful", "harmless") or intervention not in INTERVENTIONS:
        raise UserError(
            f"unknown condition {condition!r}: it is harmful_ or harmless_ followed by one of "
            f"{', '.join(INTERVENTIONS)}."
        )
    return side, intervention


def intervention_edits(model: ChatModel, condition: str, direction_d: np.ndarray, layer: int) -> Edits:
    """The one-row edit of a condition; addition is -r for harmful prompts, +r for harmless ones (paper, section 3)."""
    side, intervention = parse_condition(condition)
    if intervention == "ablation":
        return Edits.ablate(direction_d)
    if intervention == "actadd":
        return Edits.add(direction_d, layer, scale=-1.0 if side == "harmful" else 1.0)
    return Edits.none(model.config.d_model)


def complete(
    model: ChatModel,
    prompts: dict[str, list[dict]],
    conditions: Sequence[str],
    direction_d: np.ndarray,
    layer: int,
    *,
    max_new_tokens: int,
    batch_size: int,
    known: Sequence[dict] = (),
    save: Callable[[list[dict]], None] = lambda rows: None,
) -> dict[str, list[dict]]:
    """`{condition: [{"category", "prompt", "response"}]}` in prompt order.

    prompts: `{"harmful": [{"instruction", "category"}], "harmless": …}`. known: rows that `save` got in an interrupted
    run. The rows of all conditions are decoded together, so two compiled programs serve them all.
    """
    edits = Edits.concat([intervention_edits(model, c, direction_d, layer) for c in conditions])
    replies = {(row["condition"], row["index"]): row["response"] for row in known}
    todo = [(c, i) for c in conditions for i in range(len(prompts[parse_condition(c)[0]])) if (c, i) not in replies]
    ids = {side: [model.chat.ids(model.chat.render(p["instruction"])) for p in rows] for side, rows in prompts.items()}
    longest = max(len(row) for rows in ids.values() for row in rows)
    length = min(bucket(longest), model.config.context_length)
    if todo:
        batch = model.chat.pad([ids[parse_condition(c)[0]][i] for c, i in todo], length)
        row_edits = edits.take([list(conditions).index(c) for c, _ in todo])
        with tqdm(total=len(todo), desc="completions", unit="reply", leave=False) as bar:
            for done, texts in model.replies(batch, max_new_tokens, row_edits, rows=batch_size):
                save(
                    [
                        {"condition": todo[n][0], "index": todo[n][1], "response": text}
                        for n, text in zip(done, texts, strict=True)
                    ]
                )
                replies |= {todo[n]: text for n, text in zip(done, texts, strict=True)}
                bar.update(len(done))
    return {
        c: [
            {"category": p["category"], "prompt": p["instruction"], "response": replies[c, i]}
            for i, p in enumerate(prompts[parse_condition(c)[0]])
        ]
        for c in conditions
    }

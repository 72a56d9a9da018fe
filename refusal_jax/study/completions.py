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
    run. The rows of all conditions fill batches of one shape, so one compiled program serves them all.
    """
    edits = Edits.concat([intervention_edits(model, c, direction_d, layer) for c in conditions])
    replies = {(row["condition"], row["index"]): row["response"] for row in known}
    todo = [(c, i) for c in conditions for i in range(len(prompts[parse_condition(c)[0]])) if (c, i) not in replies]
    ids = {side: [model.chat.ids(model.chat.render(p["instruction"])) for p in rows] for side, rows in prompts.items()}
    longest = max(len(row) for rows in ids.values() for row in rows)
    length = min(bucket(longest), model.config.context_length)
    for start in tqdm(range(0, len(todo), batch_size), desc="completions", unit="batch", leave=False):
        part = todo[start : start + batch_size]
        batch = model.chat.pad([ids[parse_condition(c)[0]][i] for c, i in part], length).padded_to(batch_size)
        rows = [list(conditions).index(c) for c, _ in part]
        row_edits = edits.take(rows + rows[-1:] * (batch_size - len(rows)))
        texts = model.chat.decode(model.generate_ids(batch, max_new_tokens, row_edits))
        save(
            [
                {"condition": c, "index": i, "response": text}
                for (c, i), text in zip(part, texts[: len(part)], strict=True)
            ]
        )
        replies |= dict(zip(part, texts, strict=False))
    return {
        c: [
            {"category": p["category"], "prompt": p["instruction"], "response": replies[c, i]}
            for i, p in enumerate(prompts[parse_condition(c)[0]])
        ]
        for c in conditions
    }

"""Measures what a defence does: harmful prompts refused, harmless ones answered, and how far harmless replies move.

All prompts are held out from training. Before and after are replies to the same prompts, so they are compared in pairs.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from refusal_jax.chat.batches import length_batches
from refusal_jax.chat.messages import Prompt, as_messages
from refusal_jax.chat.model import Asked, ChatModel
from refusal_jax.edits import Edits
from refusal_jax.judges.judge import Judge, Outcome
from refusal_jax.judges.outcomes import judged_once
from refusal_jax.judges.statistics import PairedRates, bounded, mean_interval
from refusal_jax.models.finite import check_finite
from refusal_jax.models.scores import kl_divergence
from refusal_jax.models.sharding import replicate
from refusal_jax.study.completions import write_replies

SIDES = {"harmful": Outcome.REFUSES, "harmless": Outcome.COMPLIES}  # what is wanted of each side
KL_ROWS = 16  # prompts at a time


def outcomes(
    model: ChatModel,
    prompts: dict[str, tuple[Prompt, ...]],
    judge: Judge,
    max_new_tokens: int,
    rows: int,
    edits: Asked = None,
) -> dict[str, list[str | None]]:
    """Returns what the model's replies to the prompts of each side do, by the judge.

    rows: replies that are decoded at a time. edits: under which the model replies, if any. Raises UserError for prompts that do
    not fit the context with their replies, and for values that are not finite.
    """
    asked = [prompt for side in SIDES for prompt in prompts[side]]
    found: dict[int, dict] = {}
    ids = [model.chat.prompt_ids(prompt) for prompt in asked]
    under = Edits.none(model.config.d_model) if edits is None else edits
    write_replies(model, ids, under, max_new_tokens, min(rows, len(ids)), "held-out replies", found.update)
    said = model.chat.told  # the system prompt, if any, which judges see
    told = [{"prompt": as_messages(p)[-1]["content"], **said, **found[number]} for number, p in enumerate(asked)]
    did = iter([one and str(one) for one in judged_once(judge.on(model.mesh), told)])
    return {side: [next(did) for _ in prompts[side]] for side in SIDES}


@partial(jax.jit, static_argnames="mesh")
def _divergence(before_bv: jax.Array, after_bv: jax.Array, mesh) -> jax.Array:
    return replicate(mesh, kl_divergence(before_bv, after_bv))


def divergences(
    before: ChatModel, after: ChatModel, prompts: Sequence[Prompt], edits: Asked = None
) -> Float[np.ndarray, " n"]:
    """Returns the KL divergence of each prompt's next-token distribution before from that after, nats, float64.

    edits: under which `after` runs, if any. Raises UserError for values that are not finite.
    """
    found, rows = np.zeros(len(prompts)), min(KL_ROWS, 8 * -(-len(prompts) // 8))
    for index, batch in length_batches(before, prompts, rows):
        base = before.logits(batch.tokens, batch.mask)
        kl = np.asarray(_divergence(base, after.logits(batch.tokens, batch.mask, edits), before.mesh), np.float64)
        check_finite(np.isfinite(kl[: len(index)]), after.decoder.dtype, "The divergence cannot be measured", False)
        found[index] = kl[: len(index)]
    return found


def compared(
    before: dict[str, list[str | None]], after: dict[str, list[str | None]], kl_n: Sequence[float]
) -> dict[str, Any]:
    """Returns the numbers of defence.json: for each side the rates before and after and their paired difference, with intervals
    and the p-value of McNemar's exact test; the mean KL divergence on harmless prompts; and each prompt's outcomes."""
    found: dict[str, Any] = {}
    for side, wanted in SIDES.items():
        first, second = (
            [None if did is None else int(did == wanted) for did in rows[side]] for rows in (before, after)
        )
        pair = PairedRates.of(first, second)
        low, high = pair.interval
        found[side] = {
            "wanted": str(wanted),
            "before": bounded(pair.first.row),
            "after": bounded(pair.second.row),
            "difference": bounded({"mean": pair.difference, "low": low, "high": high, "p": pair.p_value}),
            "undecided": len(first) - pair.n,
        }
    found["kl"] = bounded(mean_interval(list(kl_n)))
    found["prompts"] = {"before": before, "after": after, "kl": list(kl_n)}
    return found

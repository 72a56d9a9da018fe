"""Writes replies to prompts under many edits and reads each at once, so that only what is read of it needs to be kept."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from refusal_jax.chat.messages import Prompt
from refusal_jax.edits import Edits
from refusal_jax.progress import Progress
from refusal_jax.runs.ledger import Ledger
from refusal_jax.study.shared import Study

Asked = tuple[int, int]  # the number of an edit, and that of a prompt


def edited_replies(
    study: Study,
    ledger: Ledger,
    prompts: Sequence[Prompt],
    edits: Edits,
    asked: Sequence[Asked],
    read: Callable[[Prompt, Mapping[str, Any]], dict],
    *,
    max_new_tokens: int,
    title: str,
) -> dict[Asked, dict]:
    """Returns what `read` makes of the reply to a prompt under an edit, for each pair that is asked for.

    edits: M rows. read: takes the prompt and the reply as fields of a completion ("response", "thought", "thought_ended"), with
    "tokens", how many it has with its thought, and "ended", whether it ended by itself before the limit; gives JSON values, which
    the ledger keeps as rows with "reply", the pair. max_new_tokens: less where the context has no room for so many. All pairs are
    decoded together, so two compiled programs serve them.
    """
    model = study.model
    done = {(row["reply"][0], row["reply"][1]): row for row in ledger.rows if "reply" in row}
    todo = [one for one in asked if one not in done]
    if not todo:
        return done
    batch = model.encode([prompts[i] for _, i in todo])
    room = model.config.context_length - int(batch.mask.sum(axis=1).max())
    row_edits, length = edits.take([m for m, _ in todo]), max(1, min(max_new_tokens, room))
    with Progress(title, len(todo), "reply") as bar:
        for numbers, ids in model.reply_ids(batch, length, row_edits, rows=study.sizes.generation):
            rows = []
            for number, own, reply in zip(numbers, ids, model.chat.replies(ids), strict=True):
                tokens = len(model.chat.before_end(own.tolist()))
                known = {**reply.row, "tokens": tokens, "ended": tokens < len(own)}
                rows.append({"reply": list(todo[number]), **read(prompts[todo[number][1]], known)})
            ledger.append(rows)
            done |= {(row["reply"][0], row["reply"][1]): row for row in rows}
            bar.update(len(rows))
    return done

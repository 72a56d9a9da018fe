"""Greedy completions of the test prompts, all conditions as rows of the same batches."""

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from refusal_jax import distributed
from refusal_jax.chat.batches import length_batches
from refusal_jax.chat.model import Asked, ChatModel
from refusal_jax.chat.padding import Padding, bucket
from refusal_jax.conditions import Baseline, Condition
from refusal_jax.directions import Direction
from refusal_jax.edits import Edits
from refusal_jax.judges.scores import REFUSAL_SCORE
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.finite import check_finite
from refusal_jax.models.generate import admit, admitted_rows, decode
from refusal_jax.models.scores import refusal_score
from refusal_jax.models.sharding import replicate
from refusal_jax.plan.programs import Group, Program, Shapes
from refusal_jax.progress import Progress
from refusal_jax.report.findings import Findings, Section
from refusal_jax.report.summary import JudgedCondition
from refusal_jax.runs.artifacts import PROMPTS, SCORES, SETUP, STATISTICS
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.stage import Stage
from refusal_jax.study.shared import Study


def complete(
    model: ChatModel,
    prompts: dict[str, list[dict]],
    conditions: Sequence[Condition],
    direction: Direction | None,
    *,
    max_new_tokens: int,
    batch_size: int,
    known: Sequence[dict] = (),
    save: Callable[[list[dict]], None] = lambda rows: None,
) -> dict[str, list[dict]]:
    """Returns `{condition: [{"category", "prompt", "response"}]}` in prompt order; a response is what follows the thought.

    A row has the thought as "thought" if there is one, with "thought_ended" false if it never ended, and the system prompt as
    "system_prompt" if one was given.

    prompts: `{"harmful": [{"instruction", "category"}], "harmless": …}`, by the key of the data set. direction: None if there
    is none, which only the baseline can do without. known: rows that `save`
    got in an interrupted run. The rows of all conditions are decoded together, so two compiled programs serve them all.
    """
    side = {condition.name: condition.dataset.key for condition in conditions}
    replies = {(row["condition"], row["index"]): row for row in known}
    todo = [(c, i) for c in side for i in range(len(prompts[side[c]])) if (c, i) not in replies]
    if todo:

        def done(numbers: Mapping[int, dict]) -> None:
            save([{"condition": todo[n][0], "index": todo[n][1], **row} for n, row in numbers.items()])
            replies.update({todo[n]: row for n, row in numbers.items()})

        asked, row_edits, length = _asked(model, prompts, conditions, direction, todo)
        write_replies(model, asked, row_edits, max_new_tokens, batch_size, "completions", done, length)
    kept = ("response", "thought", "thought_ended")
    return {
        c: [
            {"category": p["category"], "prompt": p["instruction"]}
            | model.chat.told
            | {k: v for k, v in replies[c, i].items() if k in kept}
            for i, p in enumerate(prompts[side[c]])
        ]
        for c in side
    }


def _asked(
    model: ChatModel,
    prompts: dict[str, list[dict]],
    conditions: Sequence[Condition],
    direction: Direction | None,
    todo: Sequence[tuple[str, int]],
) -> tuple[list[list[int]], Edits, int]:
    """Returns the tokens of prompts, the edits of each, and the length to which all prompts are padded.

    todo: for each prompt the name of its condition and its number in the set. The rest is as in `complete`.
    """
    edits = Edits.concat([condition.edits(direction, model.config) for condition in conditions])
    at = {condition.name: (number, condition.dataset.key) for number, condition in enumerate(conditions)}
    ids = {name: [model.chat.prompt_ids(p["instruction"]) for p in rows] for name, rows in prompts.items()}
    longest = max(len(row) for rows in ids.values() for row in rows)
    asked = [ids[at[c][1]][i] for c, i in todo]
    return asked, edits.take([at[c][0] for c, _ in todo]), min(bucket(longest), model.config.context_length)


def compile_completions(study: Study) -> Callable[[], None]:
    """Returns what compiles the programs of the completions, whose shapes are the same for any direction."""
    model, sets, width = study.model, test_prompts(study), study.model.config.d_model
    stand_in = Direction(np.eye(1, width), 0, -1, origin_d=np.zeros(width))
    todo = [(c.name, i) for c in study.conditions for i in range(len(sets[c.dataset.key]))]
    asked, edits, length = _asked(model, sets, study.conditions, stand_in, todo)
    batch, room = model.chat.pad(asked, length), study.config.generation.max_new_tokens
    return partial(model.compile_replies, batch, room, edits, rows=study.sizes.generation)


def write_replies(
    model: ChatModel,
    ids: Sequence[Sequence[int]],
    edits: Asked,
    max_new_tokens: int,
    batch_size: int,
    title: str,
    done: Callable[[Mapping[int, dict]], None],
    length: int = 0,
    begun: Sequence[Sequence[int]] = (),
) -> None:
    """Decodes the replies to prompts, each under its own row of edits, and calls `done` with those that have ended, as
    `{number of the prompt: row}`.

    length: in tokens, that prompts are padded to; 0 is that of the longest. begun: for each prompt the tokens at its end that
    are the beginning of its reply; rows then also have the text after them, as "continued".
    """
    length = length or min(bucket(max(map(len, ids))), model.config.context_length)
    batch = model.chat.pad(ids, length)
    with Progress(title, len(ids), "reply") as bar:
        for ended, generated in model.reply_ids(batch, max_new_tokens, edits, rows=batch_size):
            whole = [[*(begun[n] if begun else ()), *row] for n, row in zip(ended, generated.tolist(), strict=True)]
            rows = [reply.row for reply in model.chat.replies(whole)]
            if begun:
                rows = [row | {"continued": rest} for row, rest in zip(rows, model.chat.decode(generated), strict=True)]
            done(dict(zip(ended, rows, strict=True)))
            bar.update(len(ended))


def score_replies(
    model: ChatModel,
    prompts: dict[str, list[dict]],
    conditions: Sequence[Condition],
    direction: Direction | None,
    refusal_ids: Sequence[int],
    size: int | Padding,
) -> dict[str, list[float]]:
    """Returns the refusal score of each prompt under each condition that `complete` has, at the reply's first token.

    size: as in `length_batches`. Raises UserError for values that are not finite.
    """
    scores, ids = {}, np.asarray(refusal_ids, np.int32)
    for condition in conditions:
        edits = condition.edits(direction, model.config)
        texts = [p["instruction"] for p in prompts[condition.dataset.key]]
        found = np.zeros(len(texts))
        for index, batch in length_batches(model, texts, size):
            scores_b = np.asarray(_scores(model.decoder, *model.put(batch.tokens, batch.mask, edits), ids))
            found[index] = scores_b[: len(index)]
            what = f"There are no refusal scores of {condition.name}"
            check_finite(np.isfinite(found[index]), model.decoder.dtype, what, edits.in_force_r)
        scores[condition.name] = found.tolist()
    return scores


@jax.jit
def _scores(decoder: Decoder, tokens_bt, mask_bt, edits: Edits, refusal_ids) -> jax.Array:
    logits_bv, finite_b = decoder.next_logits(decoder.forward(tokens_bt, mask_bt, edits).resid_btd)
    return replicate(decoder.mesh, jnp.where(finite_b, refusal_score(logits_bv, refusal_ids), jnp.nan))


def score_names(study: Study) -> list[str]:
    """Returns the name of the refusal scores' file, if the refusal score is among the judges and there are refusal tokens."""
    return [SCORES] if REFUSAL_SCORE in study.config.judges and study.run.read_json(SETUP)["refusal_tokens"] else []


def earlier_replies(study: Study) -> list[dict]:
    """Returns the baseline replies that the run's folder has, as rows of a ledger: an attempt that found no direction leaves
    them, and they do not depend on it."""
    prompts, rows = study.run.read_json(PROMPTS), []
    for condition in study.conditions:
        if condition.intervention is Baseline and study.run.intact(condition.file("completions")):
            replies = study.run.read_json(condition.file("completions"))
            asked = [row["instruction"] for row in prompts[f"{condition.dataset.key}_test"]]
            if [reply["prompt"] for reply in replies] == asked:
                rows += [{"condition": condition.name, "index": i, **reply} for i, reply in enumerate(replies)]
    return rows


def test_prompts(study: Study) -> dict[str, list[dict]]:
    """Returns the test prompts of each data set, by its key."""
    prompts = study.run.read_json(PROMPTS)
    return {key: prompts[f"{key}_test"] for key in study.datasets}


def complete_prompts(study: Study, ledger: Ledger) -> None:
    """Writes the completions of all conditions and, if they are asked for, the refusal scores of the test prompts."""
    model, sets = study.model, test_prompts(study)
    direction = None if study.without_direction else study.direction()
    earlier = distributed.share_json(earlier_replies(study) if distributed.first() else None)
    done = complete(
        model,
        sets,
        study.conditions,
        direction,
        max_new_tokens=study.config.generation.max_new_tokens,
        batch_size=study.sizes.generation,
        known=[*earlier, *ledger.rows],
        save=ledger.append,
    )
    for condition in study.conditions:
        study.run.write_json(condition.file("completions"), done[condition.name])
    for name in score_names(study):
        ids = study.refusal_ids()
        scores = score_replies(model, sets, study.conditions, direction, ids, study.batches)
        study.run.write_json(name, {c.file("completions"): scores[c.name] for c in study.conditions})


def programs(shapes: Shapes, rows: int) -> list[Program]:
    """Returns the programs of completions in `rows` rows, for `plan`: prompts are admitted to rows that others have left, and
    decoded, as if every reply were as long as it may be."""
    work, refill, ending = shapes.work, admitted_rows(rows, shapes.mesh), {"eos_ids": (1,)}
    config, steps, n_layers = work.config, work.config.generation.max_new_tokens, work.cfg.n_layers
    replies = config.data.n_test * (len(config.generation.conditions) + 2 * len(config.data.over_refusal))

    def admitted():
        inputs = *shapes.prompts(refill), shapes.edits(refill), shapes.array((rows,), jnp.int32)
        return admit.lower(shapes.decoder, shapes.generation(rows), *inputs, pad_id=0, **ending)

    def decoded():
        return decode.lower(shapes.decoder, shapes.generation(rows), 1, 1, **ending)

    return [
        Program("admit", admitted, math.ceil(replies / refill), refill, work.length, n_layers),
        Program("decode", decoded, max(replies / rows, 1.0), rows, 1, n_layers, steps, steps, work.slots),
    ]


SAMPLES = {"harmful": 8, "harmless": 5}  # number of prompts per data set whose completions the report shows


def by_dataset(conditions: Sequence[JudgedCondition]) -> list[list[JudgedCondition]]:
    """Returns the conditions of each data set, in the order given."""
    return [[c for c in conditions if c.dataset == name] for name in dict.fromkeys(c.dataset for c in conditions)]


def sample_rows(conditions: list[JudgedCondition]) -> dict:
    """Returns the samples of one data set: prompts spread evenly over it, each with its completion under every condition.

    Evenly spaced, not chosen: neither the best cases nor the worst.
    """
    first, harmless = conditions[0], conditions[0].harmless
    n = len(first.completions)
    wanted = min(n, SAMPLES["harmless" if harmless else "harmful"])
    rows = []
    for index in sorted(set(np.linspace(0, n - 1, wanted).round().astype(int).tolist())):
        prompt, cells = first.completions[index]["prompt"], []
        for condition in conditions:
            found = condition.completions[index] if index < len(condition.completions) else None
            cells.append(found if found is not None and found["prompt"] == prompt else None)
        rows.append({"prompt": prompt, "category": first.completions[index].get("category"), "cells": cells})
    return {"dataset": first.dataset, "harmless": harmless, "conditions": conditions, "n": n, "rows": rows}


def values(findings: Findings) -> dict:
    """Returns the completions that the report shows, and their form."""
    run = findings.run
    return {
        "samples": [sample_rows(dataset) for dataset in by_dataset(findings.conditions)],
        "statistics": run.read_json(STATISTICS) if run.exists(STATISTICS) else None,
    }


STAGE = Stage(
    "completions",
    complete_prompts,
    reads=lambda study: [PROMPTS, *study.of_direction, *([SETUP] if score_names(study) else [])],
    writes=lambda study: [*study.files("completions"), *score_names(study)],
    ahead=compile_completions,
    programs=Group("completions", "generation", programs, assumed="every reply is as long as it may be"),
    section=Section(pathlib.Path(__file__).with_name("completions.html.jinja"), {"samples": "Completions"}, values),
)

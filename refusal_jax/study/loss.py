"""Measures what the edits cost on text unrelated to refusal (paper, section 4.3 and appendix G): cross-entropy loss,
and the KL divergence from baseline."""

import math
import pathlib
from collections.abc import Callable, Sequence

import jax.numpy as jnp

from refusal_jax.chat.loss_rows import LossRow, chat_rows, text_rows
from refusal_jax.chat.model import ChatModel
from refusal_jax.chat.padding import bucket
from refusal_jax.conditions import INTERVENTIONS, USUAL, Baseline, Condition, Intervention, label_of
from refusal_jax.damage.edited_rows import EditedRows
from refusal_jax.data.prompts import read_chat_pairs, read_prompts
from refusal_jax.data.sources import distinct, resolve
from refusal_jax.edits import Edits
from refusal_jax.errors import UserError, field
from refusal_jax.judges.statistics import mean_interval
from refusal_jax.models.losses import loss_batch
from refusal_jax.plan.programs import Group, Program, Shapes
from refusal_jax.report.findings import Findings, Section
from refusal_jax.report.summary import damage_in_words, loss_change, read_damage, read_losses
from refusal_jax.runs.artifacts import DAMAGE, loss_name
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.stage import Stage
from refusal_jax.study.shared import Study


def measure_losses(
    model: ChatModel, rows: Sequence[LossRow], edits: Edits, batch_size: int, title: str
) -> tuple[list[dict], list[dict]]:
    """Returns for each row of `edits` the cross-entropy, `{"ce_loss", "perplexity", "n_tokens"}` as published, and how far it
    moves the model from the first one, `{"kl_per_token", "n_tokens", "per_row"}`, the last of which is a mean with its interval
    over the rows of text.

    KL(first ‖ edited), nats, of each counted token's distribution. Raises UserError if no token counts, and for values that are
    not finite.
    """
    read = EditedRows.build(model, rows, batch_size)
    if not read.batches:
        raise UserError(
            f"'{title}' has no token to measure the loss on: every row is empty or cut before its response. "
            f"Raise {field('loss.text_tokens')} or drop the file."
        )
    losses_mn, kl_mn = read.compared(edits, f"The loss of '{title}' cannot be measured", f"loss, {title}")
    counted, count = read.tokens_n > 0, int(read.tokens_n.sum())
    found, moved = [], []
    for loss, kl, means in zip(losses_mn.sum(1), kl_mn.sum(1), kl_mn[:, counted] / read.tokens_n[counted], strict=True):
        mean = float(loss) / count
        found.append({"ce_loss": mean, "perplexity": math.exp(min(mean, 700.0)), "n_tokens": count})
        moved.append({"kl_per_token": float(kl) / count, "n_tokens": count, "per_row": mean_interval(means.tolist())})
    return found, moved


def loss_datasets(model: ChatModel, settings, harmless_baseline: list[dict]) -> dict[str, list[LossRow]]:
    """Returns the rows to measure: the model's own baseline completions on harmless prompts, and the configured files.

    harmless_baseline: those completions, of which the thoughts count as well: they are the model's own words. Empty ones are left
    out, and the set with them if none is left.
    """
    longest, opened = model.config.context_length, len(model.chat.opened_thought)
    whole = [(c["prompt"], c["thought"][opened:] if "thought" in c else "", c["response"]) for c in harmless_baseline]
    own = [(prompt, thought + said) for prompt, thought, said in whole if thought + said]
    sets = {"on_distribution": chat_rows(model.chat, own, longest)} if own else {}
    cut = min(settings.text_tokens, longest)
    readers: list[tuple[Sequence[str], Callable]] = [
        (settings.text_files, lambda path: text_rows(model.chat, [p["instruction"] for p in read_prompts(path)], cut)),
        (settings.chat_files, lambda path: chat_rows(model.chat, read_chat_pairs(path), longest)),
    ]
    titles = iter(loss_titles(settings))
    for files, read in readers:
        for file in files:
            sets[next(titles)] = read(resolve(file, "loss"))
    return sets


def loss_titles(settings) -> list[str]:
    """Returns the names of the loss files in results: the file's name or, if that is taken, the name with its folder
    before it."""
    taken = {"on_distribution"}
    paths = [resolve(file, "loss") for file in (*settings.text_files, *settings.chat_files)]
    return [distinct(path.stem, path.parent.name, taken) for path in paths]


def own_answers(study: Study) -> list[str]:
    """Returns the name of the completions at baseline on harmless prompts, if the study has them."""
    wanted = Condition(study.datasets["harmless"], Baseline)
    return [condition.file("completions") for condition in study.conditions if condition == wanted]


def interventions(study: Study) -> list[type[Intervention]]:
    """Returns the interventions whose losses a study measures: the paper's, and those that its conditions name."""
    named = {condition.intervention for condition in study.conditions}
    return [one for one in INTERVENTIONS.values() if one in USUAL or one in named]


def measure(study: Study, ledger: Ledger) -> None:
    """Writes the loss at baseline, under ablation, under -addition and under what else the conditions name, and how far these
    move the next-token distributions along the model's own answers to harmless prompts."""
    answers = [row for name in own_answers(study) for row in study.run.read_json(name)]
    sets = loss_datasets(study.model, study.config.loss, answers)
    # The model without edits comes first: the others are compared with it.
    kinds = sorted(interventions(study), key=lambda kind: kind is not Baseline)
    conditions = [Condition(study.datasets["harmful"], kind) for kind in kinds]
    edits = Edits.concat([one.edits(study.direction(), study.model.config) for one in conditions])
    found = {title: measure_losses(study.model, rows, edits, study.sizes.loss, title) for title, rows in sets.items()}
    for number, kind in enumerate(kinds):
        losses = {title: by_kind[number] for title, (by_kind, _) in found.items()}
        study.run.write_json(loss_name(kind.name), losses)
    own = found.get("on_distribution", ([], []))[1]
    moved = {kind.name: row for kind, row in zip(kinds, own, strict=bool(own)) if kind is not Baseline}
    study.run.write_json(DAMAGE, {"kl": moved})


def programs(shapes: Shapes, rows: int) -> list[Program]:
    """Returns loss and KL on the model's own replies under three interventions, for `plan`; other texts are the user's."""
    work = shapes.work
    length, batches, kinds = bucket(work.slots), math.ceil(work.config.data.n_test / rows), len(USUAL)

    def lower():
        inputs = *shapes.prompts(rows, length), shapes.edits(kinds, None), shapes.array((rows, length), jnp.bool_)
        return loss_batch.lower(shapes.decoder, None, *inputs, compared=True)

    return [Program("loss", lower, batches, rows, length, work.cfg.n_layers, steps=kinds, read=length)]


def loss_rows(losses: dict[str, dict[str, dict]]) -> list[dict]:
    """Returns for each data set its token count, and for each intervention that was measured its loss, perplexity and change of
    the loss."""
    kinds = measured(losses)
    return [
        {
            "dataset": name,
            "n_tokens": next(iter(by.values()))["n_tokens"],
            "cells": [
                {**by[kind], "change": None if kind == Baseline.name else loss_change(by, kind)} if kind in by else None
                for kind in kinds
            ],
        }
        for name, by in losses.items()
    ]


def measured(losses: dict[str, dict[str, dict]]) -> list[str]:
    """Returns the names of the interventions under which there is any loss, and the usual ones, in their order."""
    found = {kind for by in losses.values() for kind in by} | {one.name for one in USUAL}
    return [kind for kind in INTERVENTIONS if kind in found]


def values(findings: Findings) -> dict:
    """Returns the losses and distances that the report shows."""
    losses = read_losses(findings.run)
    return {
        "interventions": measured(losses),
        "losses": loss_rows(losses),
        "kl": read_damage(findings.run),
    }


def lines(findings: Findings) -> list[str]:
    """Returns the losses and distances, for the text summary."""
    losses = read_losses(findings.run)
    labels = {name: label_of(name, harmful=True) for name in measured(losses)}
    widths = {name: len(label) + (1 if name == Baseline.name else 2) for name, label in labels.items()}
    columns = "".join(f"{label:>{widths[name]}}" for name, label in labels.items())
    lines = ["", f"{'cross-entropy on':<18}{columns}{'tokens':>9}"]
    for name, by in losses.items():
        values = "".join(f"{by[kind]['ce_loss']:>{width}.3f}" for kind, width in widths.items())
        lines.append(f"{name:<18}{values}{by[Baseline.name]['n_tokens']:>9}")
    for kind, row in read_damage(findings.run).items():
        name = label_of(kind, harmful=True)
        lines.append(
            f"KL from baseline on answers to {findings.behaviour.absent} prompts, {name}: {row['kl_per_token']:.4f} nats per "
            "token"
        )
    return lines


STAGE = Stage(
    "loss",
    measure,
    reads=lambda study: [*own_answers(study), *study.of_direction],
    writes=(*map(loss_name, INTERVENTIONS), DAMAGE),
    skipped=lambda study: study.without_direction,
    programs=Group("loss", "loss", programs),
    section=Section(
        pathlib.Path(__file__).with_name("loss.html.jinja"),
        {"loss": "Loss"},
        values,
        lines,
        note=lambda findings: damage_in_words(read_losses(findings.run), findings.behaviour),
        late=True,
        of_direction=True,
    ),
)

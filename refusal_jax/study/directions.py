"""Candidate directions (paper, section 2.3): one pass over the prompts gives refusal scores for the filter, and the mean
residuals of the prompts that pass it, from which an estimator makes the directions.

To try another estimator, write a function like `difference_in_means` and set `ESTIMATOR` to it.
"""

import dataclasses
import logging
import math
import pathlib
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from refusal_jax.chat.refusal_tokens import LEAST_DIFFERENCE, LEAST_RATIO, Opening, measure_openings, refusal_openings
from refusal_jax.chat.reply_start import ReplyStart
from refusal_jax.chat.residuals import extract, extract_batch
from refusal_jax.checkpoints.mirrors import source_name
from refusal_jax.data.prompts import BUNDLED
from refusal_jax.data.sampling import SPLITS
from refusal_jax.errors import UserError, field
from refusal_jax.judges.behaviours import JUDGE, REFUSAL, Behaviour
from refusal_jax.models.quantisation import read_quantisation
from refusal_jax.plan.programs import Group, Program, Shapes
from refusal_jax.report.concerns import score_disagreement
from refusal_jax.report.findings import Findings, Section
from refusal_jax.report.text import decoding_line, template_line
from refusal_jax.report.verdict import Concern
from refusal_jax.runs.artifacts import FILTER, MEANS, PROMPTS, SETUP
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.stage import Stage
from refusal_jax.study.judged import judge_prompts
from refusal_jax.study.shared import Study
from refusal_jax.taps import Taps

LOG = logging.getLogger(__name__)


def difference_in_means(
    harmful_mean: Float[np.ndarray, "*n D"], harmless_mean: Float[np.ndarray, "*n D"]
) -> Float[np.ndarray, "*n D"]:
    """Returns the candidate directions r = μ − ν, the mean of harmful residuals minus that of harmless ones.

    Both are float64 with the width D as the last axis, such as `[P, L, D]`, and so is the result.
    """
    return harmful_mean - harmless_mean


ESTIMATOR = difference_in_means


def refusal_tokens(study: Study) -> tuple[tuple[int, ...], list[Opening]]:
    """Returns the ids of the refusal tokens, or of the opening tokens of another behaviour, and, where the settings leave them
    open, the openings they were chosen from; none where a judge of replies takes their place."""
    if study.behaviour.measure == JUDGE:
        return (), []
    if study.config.refusal_tokens:
        return study.model.chat.opener_ids(study.config.refusal_tokens), []
    openings = openings_of(study)
    return refusal_openings(openings, study.model.chat), openings


def openings_of(study: Study) -> list[Opening]:
    """Returns the usual openings with their probabilities after the training prompts."""
    harmful, harmless = (study.instructions(f"{side}_train", kept_only=False) for side in ("harmful", "harmless"))
    usual = study.behaviour.name == REFUSAL.name
    return measure_openings(study.model, harmful, harmless, study.batches, usual)


def setup(study: Study, positions: int, refusal_ids: Sequence[int], openings: Sequence[Opening]) -> dict:
    """Returns the model, template and refusal tokens that the results rest on."""
    config, model = study.config, study.model

    def named(ids) -> list[dict]:
        return [{"id": i, "text": text} for i, text in zip(ids, model.chat.token_names(ids), strict=True)]

    quantisation = read_quantisation(study.folder)
    return {
        "model": source_name(study.folder),
        **({"dequantised": quantisation.note} if quantisation else {}),
        "dtype": str(model.decoder.dtype),
        "n_layers": model.config.n_layers,
        "d_model": model.config.d_model,
        "over_refusal": study.over_refusal,
        "bundled_prompts": [split for split in SPLITS if config.model and config.data[split] == BUNDLED],
        "chat_template": model.chat.template_origin,
        "thinking": model.chat.thinking,
        **({"system_prompt": model.chat.system_prompt} if model.chat.system_prompt else {}),
        **({"reply_start": dataclasses.asdict(model.chat.reply_start)} if model.chat.reply_start.added else {}),
        "decoding": model.settings.record(config.generation.from_checkpoint),
        "positions": positions,
        "post_instruction_tokens": named(model.chat.post_instruction_ids),
        "refusal_tokens": named(refusal_ids),
        "refusal_tokens_from": "config" if config.refusal_tokens else "data",
        "openings": [{**dataclasses.asdict(o), "chosen": o.chosen} for o in openings],
    }


def candidate_positions(study: Study) -> int:
    """Returns how many of the last post-instruction tokens are candidate positions. Raises UserError if there are fewer."""
    chat, asked = study.model.chat, study.config.positions
    template = chat.post_instruction_ids
    positions = len(template) if asked is None else asked
    if not 1 <= positions <= len(template):
        raise UserError(
            f"{field('positions')} = {positions}, but the chat template puts {len(template)} tokens after the "
            f"instruction ({' '.join(chat.token_names(template))}). Choose 1 to {len(template)}."
        )
    return positions


def find_directions(study: Study, ledger: Ledger) -> dict:
    """Writes scores, filter and candidate directions, from one pass over the train and val prompts.

    Without refusal tokens there are no scores, and without prompts that the filter keeps no directions. A judge of replies
    filters in place of scores. Returns the setup, for the manifest.
    """
    positions = candidate_positions(study)
    refusal_ids, openings = refusal_tokens(study)
    settled = setup(study, positions, refusal_ids, openings)
    LOG.info("\n".join(setup_lines(settled, study.behaviour)))  # now: if it is not what was meant, stop
    study.run.write_json(SETUP, settled)
    if study.behaviour.measure == JUDGE:
        filtered, means_lpd = read_judged(study, positions, ledger)
    elif refusal_ids:
        filtered, means_lpd = read_scored(study, positions, refusal_ids)
    else:
        return settled
    study.run.write_json(FILTER, filtered)
    if not all(any(of_split["kept"]) for of_split in filtered.values()):
        if not openings and refusal_ids:  # how replies begin instead is what the user will ask
            settled = setup(study, positions, refusal_ids, openings_of(study))
            study.run.write_json(SETUP, settled)
        return settled
    harmful, harmless = (np.swapaxes(means_lpd[split], 0, 1) for split in ("harmful_train", "harmless_train"))
    means = {"mean_diffs": ESTIMATOR(harmful, harmless), "harmful": harmful, "harmless": harmless}
    study.run.write_tensors(MEANS, means)
    return settled


def read_scored(
    study: Study, positions: int, refusal_ids: Sequence[int]
) -> tuple[dict[str, dict], dict[str, np.ndarray]]:
    """Returns the filter by refusal scores, and the mean residuals of the prompts that it keeps, by split."""
    found = {}
    for split in SPLITS[:4]:
        sign = 0 if not study.config.filter else 1 if split.startswith("harmful") else -1
        texts = study.instructions(split, kept_only=False)
        found[split] = extract(study.model, texts, refusal_ids, positions, sign, study.batches, split)
    filtered = {split: {"scores": e.scores.tolist(), "kept": e.kept.tolist()} for split, e in found.items()}
    return filtered, {split: e.mean_lpd for split, e in found.items()}


def read_judged(study: Study, positions: int, ledger: Ledger) -> tuple[dict[str, dict], dict[str, np.ndarray]]:
    """Returns the filter by a judge of replies, and the mean residuals of the training prompts that it keeps, by split."""
    filtered, means_lpd = judge_prompts(study, ledger), {}
    for split in SPLITS[:2]:
        texts = study.instructions(split, kept_only=False)
        kept = [text for text, keep in zip(texts, filtered[split]["kept"], strict=True) if keep]
        if kept:
            means_lpd[split] = extract(study.model, kept, (), positions, 0, study.batches, split).mean_lpd
    return filtered, means_lpd


def programs(shapes: Shapes, rows: int) -> list[Program]:
    """Returns the pass over the train and val prompts, for `plan`."""
    work = shapes.work
    data, taps = work.config.data, Taps(("resid_pre",), work.positions)
    runs = sum(2 * math.ceil(n / rows) for n in (data.n_train, data.n_val))

    def lower():
        inputs = *shapes.prompts(rows), shapes.edits(rows)
        valid, ids = shapes.array((rows,), jnp.bool_), shapes.array((1,), jnp.int32)
        return extract_batch.lower(shapes.decoder, None, *inputs, valid, 1, ids, taps)

    return [Program("extraction", lower, runs, rows, work.length, work.cfg.n_layers)]


OPENINGS = 10  # how many beginnings of replies the report shows
RARE = 0.001  # the mean probability under which a beginning is rare


def telling_openings(openings: list[dict]) -> list[dict]:
    """Returns the chosen openings, and of the others those that replies of either kind most often begin with."""
    seen = [row for row in openings if row["chosen"] or max(row["harmful"], row["harmless"]) >= RARE]
    seen.sort(key=lambda row: (not row["chosen"], -max(row["harmful"], row["harmless"])))
    return seen[: max(OPENINGS, sum(row["chosen"] for row in openings))]


def filter_rows(splits: dict[str, dict], behaviour: Behaviour) -> list[dict]:
    """Returns for each split its prompts, how many the filter kept, and the range of their refusal scores."""
    rows = []
    for split, found in splits.items():
        scores = [score for score in found["scores"] if math.isfinite(score)]
        rows.append(
            {
                "split": behaviour.split(split),
                "n": len(found["kept"]),
                "kept": sum(found["kept"]),
                "shown": sum(score > 0 for score in scores),
                "low": min(scores, default=math.nan),
                "high": max(scores, default=math.nan),
            }
        )
    return rows


def setup_lines(setup: dict, behaviour: Behaviour = REFUSAL) -> list[str]:
    """Returns the chat template, what it puts after the instruction, the refusal tokens with where they came
    from or what takes their place, and decoding, as lines."""
    openings = {row["id"]: row for row in setup["openings"]}
    tokens = []
    for token in setup["refusal_tokens"]:
        row = openings.get(token["id"])
        tokens.append(f"{token['text']} ({row['harmful']:.3f}, {row['harmless']:.3f})" if row else token["text"])
    bundled = setup["bundled_prompts"]
    warning = (
        f"Prompts: bundled ({', '.join(bundled)}). They are made for the embedded model, and results on another mean "
        f"little: give all six sets, {field('data.harmful_train', 'FILE')} and so on."
    )
    return [
        *filter(None, [warning if bundled else "", setup.get("dequantised")]),
        f"{template_line(setup)}. Post-instruction tokens: {' '.join(t['text'] for t in setup['post_instruction_tokens'])}",
        *([ReplyStart(**setup["reply_start"]).note(setup["chat_template"])] if "reply_start" in setup else []),
        f"{behaviour.title} is measured by the judge {behaviour.judge}."
        if behaviour.measure == JUDGE
        else f"{behaviour.tokens.capitalize()}, from {setup['refusal_tokens_from']}"
        f"{f' (mean probability after {behaviour.present} and {behaviour.absent} prompts)' if openings else ''}: "
        f"{', '.join(tokens) or 'none'}",
        *filter(None, [decoding_line(setup)]),
    ]


def values(findings: Findings) -> dict:
    """Returns what the report shows of the prompts and tokens that the directions rest on."""
    return {
        "pick": findings.direction,
        "filter": filter_rows(findings.run.read_json(FILTER), findings.behaviour)
        if findings.run.exists(FILTER)
        else [],
        "openings": telling_openings(findings.setup["openings"]),
        "least_difference": LEAST_DIFFERENCE,
        "least_ratio": LEAST_RATIO,
    }


def concerns(findings: Findings) -> list[Concern]:
    """Returns where the refusal scores of the prompts disagree with the judge of the completions."""
    if findings.refusal_judge is None or not findings.run.exists(FILTER) or findings.behaviour.measure == JUDGE:
        return []
    filtered, tokens = findings.run.read_json(FILTER), [token["text"] for token in findings.setup["refusal_tokens"]]
    folder = findings.completions_folder
    return score_disagreement(findings.conditions, findings.refusal_judge, filtered, tokens, folder, findings.behaviour)


STAGE = Stage(
    "activations",
    find_directions,
    reads=(PROMPTS,),
    writes=(SETUP, FILTER, MEANS),
    settings=("refusal_tokens", "filter", "positions"),
    programs=Group("extraction", "forward", programs),
    section=Section(
        pathlib.Path(__file__).with_name("directions.html.jinja"),
        {"prompts": "Prompts"},
        values,
        lambda findings: setup_lines(findings.setup, findings.behaviour),
        concerns,
    ),
)

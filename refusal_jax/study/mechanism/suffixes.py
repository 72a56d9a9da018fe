"""The prompts of the suffix study: refused harmful ones as they are, with a suffix and with random tokens, and harmless ones.

Its file tells the later stages which rows to look at; `rows_of` gives them with the places of their parts.
"""

import dataclasses
import logging
import math
import pathlib
from collections.abc import Sequence

import numpy as np

from refusal_jax.chat.model import demo_model_path, demo_suffix_path
from refusal_jax.chat.residuals import extract
from refusal_jax.checkpoints.fingerprint import checkpoint_fingerprint
from refusal_jax.errors import UserError, setting
from refusal_jax.files import local_path
from refusal_jax.judges.behaviours import Behaviour
from refusal_jax.judges.statistics import Rate, bounded, mean_interval, paired_mean
from refusal_jax.mechanism.suffix_files import read_suffixes
from refusal_jax.mechanism.suffixes import (
    GROUPS,
    HARMFUL,
    HARMLESS,
    RANDOM,
    SUFFIXED,
    Row,
    Suffixed,
    groups_in_words,
    row_of,
    with_random,
)
from refusal_jax.plan.programs import Group, Program, Shapes
from refusal_jax.report.findings import Findings, Section
from refusal_jax.report.summary import with_interval
from refusal_jax.runs.artifacts import PROMPTS, SETUP, SUFFIXES
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.stage import Stage
from refusal_jax.study.directions import programs as extraction_programs
from refusal_jax.study.mechanism.shared import MechanismStudy

LOG = logging.getLogger(__name__)
FEW = 10  # refused prompts below which intervals say little


def asked(study: MechanismStudy, split: str) -> list[str]:
    """Returns the instructions of a split, without white space at their ends, where suffixes follow."""
    return [instruction.rstrip() for instruction in study.instructions(split, kept_only=False)]


def texts(study: MechanismStudy) -> list[str | None]:
    """Returns the suffix of each harmful test prompt, None for those without one: of the user's file, or else those that the
    study was given before, or those of the embedded model; [] if there are none. Raises UserError as `read_suffixes` does."""
    instructions = asked(study, "harmful_test")
    if study.settings.suffix:
        return read_suffixes(local_path(study.settings.suffix), instructions, study.behaviour.present)
    if study.run.exists(SUFFIXES):
        return study.run.read_json(SUFFIXES)["given"]
    embedded = study.run.manifest["inputs"]["model"] == checkpoint_fingerprint(demo_model_path())
    return read_suffixes(demo_suffix_path(), instructions) if embedded else []


def skipped(study: MechanismStudy) -> str:
    """Returns why there can be no suffix study, "" if there can be one."""
    if study.without_tokens:
        return study.without_tokens
    if not texts(study):
        return (
            f"No suffix was given: {setting('suffix', 'FILE') or 'suffix=FILE'} names a file with one for all "
            f"{study.behaviour.present} prompts, or one for each."
        )
    return ""


def given(study: MechanismStudy) -> dict:
    """Returns what besides the study's files the rows depend on."""
    return {"suffixes": texts(study), **study.settings.suffixes.to_dict()}


def scores_of(study: MechanismStudy, prompts: Sequence[str], title: str) -> np.ndarray:
    """Returns the refusal scores of prompts, float64 `[n]`, in nats; of none if there are none."""
    if not prompts:
        return np.zeros(0)
    return extract(study.model, prompts, study.refusal_ids(), 1, 0, study.sizes.forward, title).scores


def suffixed_prompts(study: MechanismStudy, left_out: dict) -> tuple[list[Suffixed], np.ndarray]:
    """Returns refused harmful prompts with their suffixes, and their scores without one. left_out: gets the numbers of those that
    are not used, by reason."""
    instructions, suffixes = asked(study, "harmful_test"), texts(study)
    scores, most = (
        scores_of(study, instructions, f"suffixes: which prompts {study.behaviour.shown}"),
        study.settings.suffixes.n_prompts,
    )
    usable = [i for i, suffix in enumerate(suffixes) if suffix and scores[i] > 0]
    left_out["not refused"] = sum(bool(suffix) for suffix in suffixes) - len(usable)
    left_out["without a suffix"] = sum(not suffix for suffix in suffixes)
    found = with_random(
        study.chat, [instructions[i] for i in usable], [suffixes[i] or "" for i in usable], study.settings.suffixes.seed
    )
    kept = [(row, scores[i]) for row, i in zip(found, usable, strict=True) if row is not None]
    left_out["changed by the suffix"] = len(found) - len(kept)
    if usable and len(kept) * 2 < len(usable):
        raise UserError(
            f"The suffix changes the tokens before or after it in {len(usable) - len(kept)} of {len(usable)} "
            f"{study.behaviour.done_prompts}, so that a prompt with it cannot be compared with the one without. Begin "
            "the suffix with a blank, and do not end it with one."
        )
    return [row for row, _ in kept[:most]], np.asarray([score for _, score in kept[:most]])


def choose(study: MechanismStudy, ledger: Ledger) -> None:
    """Chooses the prompts, draws their random suffixes, and measures the refusal scores of all."""
    left_out: dict[str, int] = {}
    rows, without = suffixed_prompts(study, left_out)
    scores, words = {HARMFUL: without}, groups_in_words(study.behaviour)
    for group, suffixes in ((SUFFIXED, [row.suffix for row in rows]), (RANDOM, [row.random for row in rows])):
        prompts = [row.instruction + suffix for row, suffix in zip(rows, suffixes, strict=True)]
        scores[group] = scores_of(study, prompts, f"suffixes: {words[group]}")
    harmless = asked(study, "harmless_test")
    found = scores_of(study, harmless, f"suffixes: {words[HARMLESS]}")
    fit = [i for i, text in enumerate(harmless) if found[i] < 0 and row_of(study.chat, HARMLESS, i, text)]
    left_out["harmless and refused"] = int((found >= 0).sum())
    fit = fit[: study.settings.suffixes.n_prompts]
    scores[HARMLESS] = found[fit]
    study.run.write_json(
        SUFFIXES, as_json(rows, [harmless[i] for i in fit], scores, left_out) | {"given": texts(study)}
    )


def as_json(rows: list[Suffixed], harmless: list[str], scores: dict[str, np.ndarray], left_out: dict[str, int]) -> dict:
    """Returns the content of the stage's file, but for the suffixes as they were given."""
    return {
        "harmful": [
            {
                "instruction": row.instruction,
                "suffix": row.suffix,
                "random": row.random,
                "tokens": row.tokens,
                "scores": {group: float(scores[group][i]) for group in GROUPS[:3]},
            }
            for i, row in enumerate(rows)
        ],
        "harmless": [
            {"instruction": text, "score": float(score)} for text, score in zip(harmless, scores[HARMLESS], strict=True)
        ],
        "left_out": left_out,
        "scores": {group: bounded(mean_interval(values)) for group, values in scores.items()},
        "differences": {group: bounded(paired_mean(scores[HARMFUL], scores[group])) for group in (SUFFIXED, RANDOM)},
        "refused": {group: bounded(Rate.of((values > 0).tolist()).row) for group, values in scores.items()},
    }


def programs(shapes: Shapes, rows: int) -> list[Program]:
    """Returns the pass over the test prompts, and those over the chosen ones with their suffixes, for `plan`."""
    work, most = shapes.work, shapes.work.further.suffixes.n_prompts
    (one,) = extraction_programs(shapes, rows)
    runs = 2 * math.ceil(work.config.data.n_test / rows) + 2 * math.ceil(min(most, work.config.data.n_test) / rows)
    return [dataclasses.replace(one, name="suffixes", runs=runs)]


def suffixed(study: MechanismStudy) -> list[Suffixed]:
    """Returns the harmful prompts of the suffix study with their suffixes."""
    return [
        Suffixed(*(row[name] for name in ("instruction", "suffix", "random", "tokens")))
        for row in study.run.read_json(SUFFIXES)["harmful"]
    ]


def rows_of(study: MechanismStudy) -> list[Row]:
    """Returns all rows of the suffix study: of each harmful prompt one for each of its groups, with the same `prompt`, and of
    each harmless one. `chat.batches.length_batches(study.model, [row.text for row in rows], …)` encodes them."""
    rows = [row for number, one in enumerate(suffixed(study)) for row in one.rows(study.chat, number)]
    for number, one in enumerate(study.run.read_json(SUFFIXES)["harmless"]):
        row = row_of(study.chat, HARMLESS, number, one["instruction"])
        assert row is not None, "prompts whose tokens are unusual were left out"
        rows.append(row)
    return rows


def without_rows(study: MechanismStudy) -> str:
    """Returns why a stage that looks at the rows cannot be done, "" if it can."""
    if not study.run.exists(SUFFIXES):
        return skipped(study) or "The part `suffixes` is not done yet."
    return "" if study.run.read_json(SUFFIXES)["harmful"] else none_refused(study.behaviour)


def none_refused(of: Behaviour) -> str:
    """Returns that there is nothing that a suffix could end, in words."""
    return (
        f"The model {of.verb_on} no {of.present} test prompt that has a suffix, so there is no {of.name} that a suffix could "
        "end."
    )


def omitted(found: dict, of: Behaviour) -> str:
    """Returns which prompts were left out, in words; "" if none were."""
    words = {"not refused": of.not_done, "harmless and refused": f"{of.absent} and {of.done}"}
    return ", ".join(f"{count} {words.get(reason, reason)}" for reason, count in found["left_out"].items() if count)


def lines(findings: Findings) -> list[str]:
    """Returns the numbers for a terminal."""
    found, of = findings.run.read_json(SUFFIXES), findings.behaviour
    n, left_out = len(found["harmful"]), omitted(found, of)
    if not n:
        return ["", f"Suffixes: {none_refused(of)} Left out: {left_out}."]
    tokens = sorted({row["tokens"] for row in found["harmful"]})
    size = f"{tokens[0]}" if len(tokens) == 1 else f"{tokens[0]} to {tokens[-1]}"
    out = ["", f"Suffixes of {size} tokens after {n} {of.present} prompts {of.that_model_does}:"]
    for group in GROUPS:
        rate, change = found["refused"][group], found["differences"].get(group)
        if rate["n"]:
            refused = f"{100 * rate['rate']:5.1f} % {of.done} ({100 * rate['low']:.1f} to {100 * rate['high']:.1f})"
            changed = f", change {with_interval(change, 2)}" if change else ""
            out.append(
                f"  {groups_in_words(of)[group] + ':':<30}{refused}, score {with_interval(found['scores'][group], 2)}{changed}"
            )
    out += [f"  Left out: {left_out}."] if left_out else []
    out += [f"  Only {n} prompts {of.shown}, so intervals are wide."] if n < FEW else []
    return out


def values(findings: Findings) -> dict:
    """Returns what the report shows of the prompts."""
    found = findings.run.read_json(SUFFIXES)
    shared = len({row["suffix"] for row in found["harmful"]}) == 1
    return {
        "suffixes": found,
        "groups": groups_in_words(findings.behaviour),
        "left_out": omitted(found, findings.behaviour),
        "shared": shared,
        "none_refused": none_refused(findings.behaviour),
    }


STAGE = Stage(
    "suffixes",
    choose,
    reads=(PROMPTS, SETUP),
    writes=(SUFFIXES,),
    skipped=skipped,
    given=given,
    programs=Group("suffixes", "forward", programs),
    about="Measures whether the model still refuses with a suffix, and with random tokens in its place. It needs a suffix.",
    section=Section(
        pathlib.Path(__file__).with_name("suffixes.html.jinja"),
        {"suffixes": "Suffixes"},
        values,
        lines=lines,
        of_direction=True,
        needs=(SUFFIXES,),
    ),
)

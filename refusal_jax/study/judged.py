"""Filter and selection by a judge of whole replies, for behaviours that no usual beginning of a reply gives away.

The filter judges the unedited model's short replies to the training and validation prompts. Selection first ranks the candidates
by what they do to activations (COSMIC, `refusal_jax.mechanism.cosmic`), which needs neither tokens nor replies. The best few of
those that change little else are then tried: the judge counts the replies that still show the behaviour under ablation, on the
side that shows it, and those that show it under addition, on the other. The direction with the largest difference is selected. No
threshold is set for either rate: whether the direction mediates the behaviour is said by the test prompts.

It costs a reply to every training and validation prompt, and to every validation prompt for each direction that is tried.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from refusal_jax import distributed
from refusal_jax.conditions import Ablate, Add, Baseline
from refusal_jax.data.sampling import SPLITS
from refusal_jax.directions import Direction
from refusal_jax.edits import Edits
from refusal_jax.errors import NoDirection, field
from refusal_jax.judges.judge import Judge, shows
from refusal_jax.judges.statistics import Rate
from refusal_jax.mechanism.cosmic import CosmicRule, cosmic_scores, distant_layers, mean_outputs
from refusal_jax.mechanism.edited_prompts import EditedPrompts
from refusal_jax.models.config import ModelConfig
from refusal_jax.report.findings import Findings
from refusal_jax.runs.artifacts import CANDIDATES, PROMPTS
from refusal_jax.runs.ledger import Ledger
from refusal_jax.study.completions import write_replies
from refusal_jax.study.shared import Study

SIDES = ("harmful", "harmless")


@dataclasses.dataclass(frozen=True)
class Asked:
    """A prompt that is answered under one of several edits. key: what it is found by again in a ledger."""

    key: tuple
    instruction: str
    edit: int = 0


def deciding_judge(study: Study) -> Judge:
    """Returns the judge that decides about the behaviour."""
    name = study.behaviour.deciding([judge.name for judge in study.judges])
    return next(judge for judge in study.judges if judge.name == name)


def judged_replies(study: Study, asked: Sequence[Asked], edits: Edits, ledger: Ledger, title: str) -> list[int | None]:
    """Returns for each prompt whether the reply under its edit shows the behaviour, 1 or 0, None where the judge cannot tell.

    edits: one row for each edit. Replies are kept in the ledger. A judge model gets the memory of the studied one.
    """
    found = {tuple(row["key"]): row for row in ledger.rows if "key" in row}
    todo = [one for one in asked if one.key not in found]
    if todo:

        def done(numbers: Mapping[int, dict]) -> None:
            new = [{"key": list(todo[n].key), **row} for n, row in numbers.items()]
            ledger.append(new)
            found.update({tuple(row["key"]): row for row in new})

        ids = [study.chat.prompt_ids(one.instruction) for one in todo]
        under, length = edits.take([one.edit for one in todo]), study.config.behaviour.reply_tokens
        write_replies(study.model, ids, under, length, study.sizes.generation, title, done)
    judge = deciding_judge(study)
    rows = [{"prompt": one.instruction, **found[one.key]} for one in asked]
    if judge.uses_devices:
        study.release()
        judge = judge.on(study.mesh)
    return distributed.share_json([shows(verdict) for verdict in judge.judge(rows)])


def judge_prompts(study: Study, ledger: Ledger) -> dict[str, dict]:
    """Returns the filter of the training and validation prompts, as in filter.json: in place of scores 1 where the unedited
    model's reply shows the behaviour, -1 where it does not, and 0 where the judge cannot tell."""
    prompts = study.run.read_json(PROMPTS)
    asked = [Asked((split, i), row["instruction"]) for split in SPLITS[:4] for i, row in enumerate(prompts[split])]
    none, found = Baseline().edits(study.model.config), {}
    labels = dict(zip(asked, judged_replies(study, asked, none, ledger, "replies for the filter"), strict=True))
    for split in SPLITS[:4]:
        shown = [label for one, label in labels.items() if one.key[0] == split]
        wanted = int(split.startswith("harmful"))
        found[split] = {
            "scores": [0.0 if label is None else 2.0 * label - 1.0 for label in shown],
            "kept": [not study.config.filter or label == wanted for label in shown],
        }
    return found


def log_odds(rate: Rate) -> float:
    """Returns the log-odds of a rate, with half a case more on either side, so that they are finite."""
    return math.log((rate.count + 0.5) / (rate.n - rate.count + 0.5))


def candidates_of(study: Study, diffs_pld: np.ndarray, ledger: Ledger) -> list[dict]:
    """Returns COSMIC's scores of the candidates."""
    settings, model, rows = study.config.select, study.model, study.sizes.select
    sides = [study.instructions(f"{side}_val") for side in SIDES]
    every = range(model.config.n_layers)
    harmful_ld, harmless_ld = (mean_outputs(EditedPrompts.build(model, prompts, rows), every) for prompts in sides)
    return cosmic_scores(
        model,
        np.swapaxes(diffs_pld, 0, 1),
        sides[0],
        sides[1],
        distant_layers(harmful_ld, harmless_ld),
        rule=CosmicRule(settings.kl_threshold, settings.prune_fraction),
        rows=rows,
        known=[row for row in ledger.rows if "key" not in row],
        save=ledger.append,
    )


def try_directions(study: Study, directions: Sequence[Direction], ledger: Ledger) -> list[tuple[Rate, Rate]]:
    """Returns for each direction how many replies to the validation prompts show the behaviour: under ablation, of the side that
    shows it, and under addition, of the other."""
    sides, cfg = [study.instructions(f"{side}_val") for side in SIDES], study.model.config
    edits = Edits.concat([edit for one in directions for edit in both_edits(one, cfg)])
    asked = [
        Asked((*direction.place, side, i), text, 2 * number + SIDES.index(side))
        for number, direction in enumerate(directions)
        for side, texts in zip(SIDES, sides, strict=True)
        for i, text in enumerate(texts)
    ]
    labels = judged_replies(study, asked, edits, ledger, "replies under the best directions")
    of = [Rate.of(label for a, label in zip(asked, labels, strict=True) if a.edit == row) for row in range(edits.rows)]
    return list(zip(of[::2], of[1::2], strict=True))


def both_edits(direction: Direction, cfg: ModelConfig) -> tuple[Edits, Edits]:
    """Returns the ablation of a direction and its addition."""
    return Ablate.of(direction, True).edits(cfg), Add.of(direction, False).edits(cfg)


def find_judged(study: Study, diffs_pld: np.ndarray, ledger: Ledger) -> Direction:
    """Scores the candidates, tries the best, writes the scores of all, and returns the selected direction. Raises NoDirection if
    the ablation of every candidate changes too much."""
    cosmic, threshold = candidates_of(study, diffs_pld, ledger), study.config.select.kl_threshold
    order = [row for row in cosmic if row["score"] is not None and math.isfinite(row["score"])]
    order.sort(key=lambda row: (-row["score"], row["layer"], row["position"]))
    best = order[: study.config.behaviour.candidates]
    directions = [Direction.of(diffs_pld[row["position"], row["layer"]], row["layer"], row["position"]) for row in best]
    rates = try_directions(study, directions, ledger) if best else []
    tried = {one.place: rate for one, rate in zip(directions, rates, strict=True)}
    study.run.write_json(CANDIDATES, [evaluated(row, tried) for row in by_place(cosmic)])
    if not best:
        least = min((row["kl"] for row in cosmic), default=math.nan)
        raise NoDirection(
            "candidates",
            f"ablating any of the {len(cosmic)} candidate directions changes too much else",
            f"No candidate direction passes the filter: the KL divergence of all {len(cosmic)} is over {threshold}; the least is "
            f"{least:.4f}.",
            f"Raise {field('select.kl_threshold')} to look further, or use prompts whose sides differ in less besides "
            f"{study.behaviour.name}.",
        )
    (_, chosen) = max(enumerate(directions), key=lambda pair: (difference(rates[pair[0]]), -pair[0]))
    return chosen


def difference(rates: tuple[Rate, Rate]) -> float:
    """Returns the rate under addition minus the one under ablation; the lowest of all where the judge could tell nothing."""
    ablated, added = rates
    return added.rate - ablated.rate if added.n and ablated.n else -math.inf


def by_place(rows: Sequence[dict]) -> list[dict]:
    """Returns rows in the published order."""
    return sorted(rows, key=lambda row: (row["position"], row["layer"]))


def evaluated(row: dict, tried: Mapping[tuple[int, int], tuple[Rate, Rate]]) -> dict:
    """Returns the row of a candidate in the published format, in which rates take the place of scores as log-odds; with COSMIC's
    score and the rates themselves."""
    found = {"position": row["position"], "layer": row["layer"], "refusal_score": None, "steering_score": None}
    found |= {"kl_div_score": row["kl"], "cosmic": row["score"]}
    if rates := tried.get((row["position"], row["layer"])):
        found |= {"refusal_score": log_odds(rates[0]), "steering_score": log_odds(rates[1])}
        found |= {"ablated": rates[0].row, "added": rates[1].row}
    return found


def tried_rows(findings: Findings) -> list[dict]:
    """Returns the directions that were tried on replies, the selected one first, with their rates, for the report."""
    rows = [row for row in findings.run.read_json(CANDIDATES) if "ablated" in row]
    for row in rows:
        row["picked"] = findings.direction is not None and findings.direction.place == (row["position"], row["layer"])
        row |= {side: Rate(row[side]["successes"], row[side]["n"]) for side in ("ablated", "added")}
    return sorted(rows, key=lambda row: (not row["picked"], -row["cosmic"]))

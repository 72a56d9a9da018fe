"""Selection of the candidate direction that mediates refusal best (paper, section 2.3), evaluated lazily and exactly.

The rule filters candidates by layer, induce score and KL divergence, then takes the lowest bypass score. So pruned layers are
never run; *induce* runs first; KL runs for those that pass; bypass for those that pass both. The pick is the full grid's.
"""

import dataclasses
import math
import pathlib
from collections import Counter
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from markupsafe import Markup

from refusal_jax.chat.model import ChatModel
from refusal_jax.directions import Direction
from refusal_jax.errors import UserError, field, setting
from refusal_jax.plan.programs import Group, Program, Shapes
from refusal_jax.progress import Progress
from refusal_jax.report.concerns import selection_disagreement
from refusal_jax.report.findings import Findings, Section
from refusal_jax.report.page import plain
from refusal_jax.report.verdict import Concern
from refusal_jax.runs.artifacts import CANDIDATES, DIRECTION, FILTER, MEANS, METADATA, PROMPTS, SETUP
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.stage import Stage
from refusal_jax.study.scoring import Batching, PromptScorer, last_logits, score_edits, score_from_layer
from refusal_jax.study.shared import Study

# The shares of the candidates of unpruned layers that pass the filter's next steps: means of the paper's five published runs.
PASS_INDUCE, PASS_KL = 0.25, 0.12
SAVED = 8  # candidates, at least, that are scored between two writes to the ledger


@dataclasses.dataclass(frozen=True)
class Rule:
    """The filter: thresholds as in `config.select`, and the model's number of layers."""

    n_layers: int
    kl_threshold: float = 0.1
    induce_threshold: float = 0.0
    prune_fraction: float = 0.2

    @classmethod
    def of(cls, n_layers: int, select) -> "Rule":
        """Returns the rule of a study's `select` settings."""
        return cls(n_layers, select.kl_threshold, select.induce_threshold, select.prune_fraction)

    @property
    def layer_limit(self) -> int:
        """Returns the first pruned layer: candidates at this layer or above are pruned."""
        return int(self.n_layers * (1.0 - self.prune_fraction))

    def layers(self, full_grid: bool) -> int:
        """Returns how many layers, from the first, have candidates that are scored."""
        return self.n_layers if full_grid else min(self.layer_limit, self.n_layers)

    def verdict(self, row: dict) -> str:
        """Returns why the rule discards a candidate: "layer", "nan", "induce", "kl"; or "" if it passes.

        row: published-format scores; those not evaluated are None and pass.
        """
        scores = [row[key] for key in ("steering_score", "kl_div_score", "refusal_score") if row[key] is not None]
        if row["layer"] >= self.layer_limit:
            return "layer"
        if any(math.isnan(score) for score in scores):
            return "nan"
        if row["steering_score"] is not None and row["steering_score"] < self.induce_threshold:
            return "induce"
        return "kl" if row["kl_div_score"] is not None and row["kl_div_score"] > self.kl_threshold else ""


def pick(rows: list[dict], rule: Rule) -> dict:
    """Returns the selected candidate among published-format rows: lowest `refusal_score` of those that pass the rule.

    Ties go to the first in the published order (position, then layer). Raises UserError that says which filter removed
    how many, and how near the nearest came, if none passes.
    """
    rows = sorted(rows, key=lambda row: (row["position"], row["layer"]))
    passing = [row for row in rows if not rule.verdict(row) and row["refusal_score"] is not None]
    if passing:
        return min(passing, key=lambda row: row["refusal_score"])
    counts = {why: sum(rule.verdict(row) == why for row in rows) for why in ("layer", "nan", "induce", "kl")}
    by_kl = [row for row in rows if rule.verdict(row) == "kl"]
    by_induce = [row for row in rows if rule.verdict(row) == "induce"]
    nearest = min(by_kl, key=lambda r: r["kl_div_score"], default=None) or max(
        by_induce, key=lambda r: r["steering_score"], default=None
    )
    nearby = (
        ""
        if nearest is None
        else (
            f" Nearest: position {nearest['position']}, layer {nearest['layer']}, "
            f"induce {nearest['steering_score']:.3f}"
            + ("" if nearest["kl_div_score"] is None else f", KL {nearest['kl_div_score']:.4f}")
            + "."
        )
    )
    grid = setting("config.select.full_grid", True)
    raise UserError(
        f"No candidate direction passes the filter: of {len(rows)}, {counts['layer']} are at layer {rule.layer_limit} "
        f"or above, {counts['nan']} have NaN scores, {counts['induce']} have an induce score under "
        f"{rule.induce_threshold}, {counts['kl']} of the rest a KL over {rule.kl_threshold}.{nearby} This model's refusal "
        f"may not be a single direction; to look further, raise {field('select.kl_threshold')} or lower "
        f"{field('select.induce_threshold')}{f', or see all scores with {grid}' if grid else ''}."
    )


def candidate_rows(directions_lpd: np.ndarray, known: Sequence[dict] = ()) -> list[dict]:
    """Returns a published-format row for each candidate, layer by layer: its known scores, or None for each score.

    A candidate that is not finite, because float16 overflowed, has NaN scores, which the rule discards.
    """
    n_layers, positions, _ = directions_lpd.shape
    done = {(row["position"], row["layer"]): row for row in known}
    rows = []
    for layer in range(n_layers):
        for position in range(-positions, 0):
            score = None if np.isfinite(directions_lpd[layer, position]).all() else math.nan
            new = {"position": position, "layer": layer}
            new |= dict.fromkeys(("refusal_score", "steering_score", "kl_div_score"), score)
            rows.append(new if score is not None else done.get((position, layer), new))
    return rows


def evaluate_candidates(
    model: ChatModel,
    directions_lpd: np.ndarray,
    harmful: list[str],
    harmless: list[str],
    refusal_ids,
    rule: Rule,
    *,
    full_grid: bool,
    batch_size: int,
    known: Sequence[dict] = (),
    save: Callable[[list[dict]], None] = lambda rows: None,
) -> list[dict]:
    """Returns published-format scores of the candidates; those that the rule makes unnecessary are None unless `full_grid`.

    directions_lpd: `[L, P, D]`, candidate (position p - P, layer l). known: rows of an interrupted run, later ones
    superseding earlier ones; save: called with rows as they gain scores.
    """
    positions, rows = directions_lpd.shape[1], candidate_rows(directions_lpd, known)
    layers = rule.layers(full_grid)
    harmless_val = PromptScorer.build(model, harmless, refusal_ids, batch_size)
    harmful_val = PromptScorer.build(model, harmful, refusal_ids, batch_size)

    def fill(key, rows, score):
        """Scores those rows that are still wanted and lack `key`."""
        rows = [row for row in rows if row[key] is None and (full_grid or not rule.verdict(row))]
        if rows:
            values = score(np.stack([directions_lpd[row["layer"], row["position"]] for row in rows]))
            for row, value in zip(rows, values, strict=True):
                row[key] = float(value)
            save(rows)

    asked = rows[: layers * positions]
    with Progress("selection", 3 * len(asked), "score") as bar:
        for layer, induce in harmless_val.climb(layers, positions):
            fill("steering_score", asked[layer * positions : (layer + 1) * positions], induce)
            bar.update(positions)
        for key, scorer, which in (("kl_div_score", harmless_val, 1), ("refusal_score", harmful_val, 0)):
            wanted = [row for row in asked if row[key] is None and (full_grid or not rule.verdict(row))]
            bar.update(len(asked) - len(wanted))
            step = scorer.batching.at_once * -(-SAVED // scorer.batching.at_once)
            for start in range(0, len(wanted), step):
                part = wanted[start : start + step]
                fill(key, part, lambda directions, scorer=scorer, which=which: scorer.ablated(directions)[which])
                bar.update(len(part))
    return sorted(rows, key=lambda row: (row["position"], row["layer"]))


def select(study: Study, ledger: Ledger) -> None:
    """Scores the candidates, and writes their scores and the selected direction."""
    settings, diffs_pld = study.config.select, study.run.read_tensors(MEANS)["mean_diffs"]
    rule = Rule.of(study.run.read_json(SETUP)["n_layers"], settings)
    rows = evaluate_candidates(
        study.model,
        np.swapaxes(diffs_pld, 0, 1),
        study.instructions("harmful_val"),
        study.instructions("harmless_val"),
        study.refusal_ids(),
        rule,
        full_grid=settings.full_grid,
        batch_size=study.sizes.select,
        known=ledger.rows,
        save=ledger.append,
    )
    best = pick(rows, rule)
    study.run.write_json(CANDIDATES, rows)
    position, layer = best["position"], best["layer"]
    Direction.of(diffs_pld[position, layer], layer, position).write_selected(study.run)


def programs(shapes: Shapes, rows: int) -> list[Program]:
    """Returns the programs of selection in `rows` rows, for `plan`: each candidate's score on all val prompts, from all layers
    and from later ones. The largest comes first."""
    work, settings = shapes.work, shapes.work.config.select
    batching, n_layers, positions = Batching.of(rows, work.config.data.n_val), work.cfg.n_layers, work.positions
    prompts, at_once, together = batching.prompts, batching.at_once, batching.together(positions)
    climbed = Rule.of(n_layers, settings).layers(settings.full_grid)
    left = sum(n_layers - layer for layer in range(climbed)) / max(climbed, 1)
    scored = climbed * positions * (2.0 if settings.full_grid else PASS_INDUCE + PASS_KL)

    def ids():
        return shapes.array((1,), jnp.int32)

    def scores():
        inputs = *shapes.prompts(prompts), shapes.edits(at_once, None), shapes.logits(prompts)
        return score_edits.lower(shapes.decoder, *inputs, ids())

    def later():
        x, mask = shapes.residual(prompts), shapes.prompts(prompts)[1]
        return score_from_layer.lower(shapes.decoder, x, mask, shapes.edits(together, None), 0, ids())

    def base():
        return last_logits.lower(shapes.decoder, *shapes.prompts(prompts), shapes.edits(prompts))

    def program(name, lower, runs, many, layers):
        turns = n_layers  # where a loop has no bound in the text; costs come down by the share of the layers
        return Program(name, lower, runs * batching.batches, many * prompts, work.length, layers, turns)

    return [
        program("scores", scores, math.ceil(scored / at_once), at_once, n_layers),
        program("induce", later, climbed * math.ceil(positions / together), together, left),
        program("baseline", base, 2 + climbed / n_layers, 1, n_layers),  # and the climb itself, layer by layer
    ]


SCORES = (
    ("refusal_score", "Bypass", "mean refusal score of harmful validation prompts while the direction is ablated"),
    ("steering_score", "Induce", "mean refusal score of harmless validation prompts while it is added"),
    ("kl_div_score", "KL", "how far ablation moves the next-token distribution on harmless prompts"),
)


def selected_row(findings: Findings) -> dict | None:
    """Returns the scores of the selected candidate in the published format, if they are there."""
    rows = findings.run.read_json(CANDIDATES)
    return next((row for row in rows if (row["position"], row["layer"]) == findings.direction.place), None)


def values(findings: Findings) -> dict:
    """Returns what the report shows of the selected candidate, the rule, what it discarded, and the maps of scores."""
    from refusal_jax.report import figures  # imports matplotlib, which the other stages need not pay for

    run, pick = findings.run, findings.direction
    rows, select = run.read_json(CANDIDATES), run.manifest["config"]["select"]
    rule = Rule(
        findings.setup["n_layers"], select["kl_threshold"], select["induce_threshold"], select["prune_fraction"]
    )
    tokens = [plain(token["text"]) for token in findings.setup["post_instruction_tokens"]]
    picked, discarded = selected_row(findings), Counter(rule.verdict(row) for row in rows)
    passing = [row for row in rows if not rule.verdict(row) and row["refusal_score"] is not None]
    passing.sort(key=lambda row: (row["refusal_score"], row["position"], row["layer"]))
    limits = figures.Limits(rule.n_layers, rule.layer_limit, rule.induce_threshold, rule.kl_threshold)
    maps = figures.selection_figures(rows, [r for r in rows if not rule.verdict(r)], limits, tokens, pick)
    return {
        "pick": pick,
        "pick_token": tokens[pick.place[0]] if -pick.place[0] <= len(tokens) else "",
        "scores": [(name, note, picked and picked[key]) for key, name, note in SCORES],
        "norm": pick.norm,
        "rule": rule,
        "full_grid": not any(row[key] is None for row in rows for key, *_ in SCORES),
        "n_candidates": len(rows),
        "discarded": {why: discarded[why] for why in ("layer", "induce", "kl", "nan")},
        "passing": passing,
        "figures": {name: Markup(svg) for name, svg in maps.items()},
    }


def lines(findings: Findings) -> list[str]:
    """Returns the selected candidate and its scores, for the text summary."""
    row = selected_row(findings)
    if row is None:
        return []
    return [
        f"Direction: position {row['position']}, layer {row['layer']}. Bypass {row['refusal_score']:.3f}, induce "
        f"{row['steering_score']:.3f}, KL {row['kl_div_score']:.4f}."
    ]


def concerns(findings: Findings) -> list[Concern]:
    """Returns where the selected candidate's scores disagree with the judge of the completions."""
    row = selected_row(findings)
    if findings.refusal_judge is None or row is None:
        return []
    return selection_disagreement(findings.conditions, findings.refusal_judge, row)


STAGE = Stage(
    "selection",
    select,
    reads=(PROMPTS, SETUP, FILTER, MEANS),
    writes=(CANDIDATES, METADATA, DIRECTION),
    programs=Group(
        "selection",
        "select",
        programs,
        deciding=1,
        assumed=f"{PASS_INDUCE:.0%} of the candidates pass the induce threshold and {PASS_KL:.0%} the KL one, too (the mean of "
        "the paper's published runs)",
    ),
    section=Section(
        pathlib.Path(__file__).with_name("selection.html.jinja"),
        {"direction": "Direction", "selection": "Selection"},
        values,
        lines,
        concerns,
    ),
)

"""Selection of the candidate direction that mediates refusal best (paper, section 2.3), evaluated lazily and exactly.

The rule filters candidates by layer, induce score and KL divergence, then takes the lowest bypass score. So pruned layers are
never run; *induce* runs first; KL runs for those that pass; bypass for those that pass both. The pick is the full grid's.
"""

import dataclasses
import math
import pathlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from refusal_jax.chat.messages import Prompt
from refusal_jax.chat.model import ChatModel
from refusal_jax.chat.prefix import shared_prefix
from refusal_jax.chat.refusal_tokens import Opening, nothing_chosen
from refusal_jax.directions import Direction
from refusal_jax.errors import NoDirection, field
from refusal_jax.judges.behaviours import JUDGE, REFUSAL, Behaviour
from refusal_jax.judges.statistics import Rate
from refusal_jax.plan.programs import Group, Program, Shapes
from refusal_jax.progress import Progress
from refusal_jax.report.concerns import selection_disagreement
from refusal_jax.report.findings import Findings, Section
from refusal_jax.report.page import plain
from refusal_jax.report.verdict import Concern
from refusal_jax.runs.artifacts import CANDIDATES, DIRECTION, FILTER, MEANS, METADATA, NO_DIRECTION, PROMPTS, SETUP
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.run import Run
from refusal_jax.runs.stage import Stage
from refusal_jax.study.judged import find_judged, tried_rows
from refusal_jax.study.rule import LOOSENING, Rule, nearest_misses, pick
from refusal_jax.study.scoring import (
    Batching,
    PromptScorer,
    chunk,
    last_logits,
    score_edits,
    score_from_layer,
    shapes_of,
)
from refusal_jax.study.shared import Study

# The shares of the candidates of unpruned layers that pass the filter's next steps: means of the paper's five published runs.
PASS_INDUCE, PASS_KL = 0.25, 0.12


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


def scorers(
    model: ChatModel, sides: Sequence[Sequence[Prompt]], refusal_ids, batch_size: int, positions: int, times: float
) -> list[PromptScorer]:
    """Returns the scorer of each side's prompts, which share what all begin with and the shapes of batches; `positions` and
    `times` as in `shapes_of`."""
    shapes = shapes_of(model, sides, batch_size, positions, times)
    prefix = shared_prefix(model, [prompt for prompts in sides for prompt in prompts], shapes.reads)
    return [PromptScorer.build(model, prompts, refusal_ids, batch_size, prefix, shapes) for prompts in sides]


def evaluate_candidates(
    model: ChatModel,
    directions_lpd: np.ndarray,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    refusal_ids,
    rule: Rule,
    *,
    full_grid: bool,
    batch_size: int,
    known: Sequence[dict] = (),
    save: Callable[[list[dict]], None] = lambda rows: None,
) -> list[dict]:
    """Returns published-format scores of the candidates; those that the rule makes unnecessary are None unless `full_grid`. If
    none passes the rule, the nearest have all scores nevertheless.

    directions_lpd: `[L, P, D]`, candidate (position p - P, layer l). known: rows of an interrupted run, later ones
    superseding earlier ones; save: called with rows as they gain scores.
    """
    positions, rows = directions_lpd.shape[1], candidate_rows(directions_lpd, known)
    layers = rule.layers(full_grid)
    # Most candidates are read to about half: induce begins at their layer, and few go on.
    times = layers * positions * (1.5 if full_grid else 0.5)
    harmless_val, harmful_val = scorers(model, (harmless, harmful), refusal_ids, batch_size, positions, times)

    def unknown(key, rows, needed):
        """Returns the rows that lack `key` and need it."""
        return [row for row in rows if row[key] is None and (needed or not rule.verdict(row))]

    def fill(key, rows, score):
        """Scores rows, if there are any."""
        if rows:
            values = score(np.stack([directions_lpd[row["layer"], row["position"]] for row in rows]))
            for row, value in zip(rows, values, strict=True):
                row[key] = float(value)
            save(rows)

    def ablate(rows, needed, bar):
        """Scores what ablation does, KL first."""
        for key, scorer, which in (("kl_div_score", harmless_val, 1), ("refusal_score", harmful_val, 0)):
            wanted = unknown(key, rows, needed)
            bar.update(len(rows) - len(wanted))
            step = chunk(scorer.batching.at_once)
            for start in range(0, len(wanted), step):
                part = wanted[start : start + step]
                fill(key, part, lambda directions, scorer=scorer, which=which: scorer.ablated(directions)[which])
                bar.update(len(part))

    asked = rows[: layers * positions]
    with Progress("selection", 3 * len(asked), "score") as bar:
        for layer, induce in harmless_val.climb(layers, positions):
            here = asked[layer * positions : (layer + 1) * positions]
            fill("steering_score", unknown("steering_score", here, full_grid), induce)
            bar.update(positions)
        ablate(asked, full_grid, bar)
    if not rule.passing(asked):
        nearest = [miss.row for miss in nearest_misses(asked, rule)]
        with Progress("the nearest candidates", 2 * len(nearest), "score") as bar:
            ablate(nearest, True, bar)
    return sorted(rows, key=lambda row: (row["position"], row["layer"]))


def check_candidates(run: Run) -> None:
    """Raises NoDirection if the study's first steps leave no candidates: no refusal tokens, or no prompts after the filter."""
    settled, behaviour = run.read_json(SETUP), Behaviour.of(run.manifest["config"])
    if not settled["refusal_tokens"] and behaviour.measure != JUDGE:
        usual = behaviour.name == REFUSAL.name
        openings = [
            Opening(*(row[key] for key in ("id", "text", "harmful", "harmless"))) for row in settled["openings"]
        ]
        raise NoDirection(
            "refusal_tokens",
            f"no {'usual ' * usual}beginning of a reply tells {behaviour.present} prompts from {behaviour.absent} ones",
            nothing_chosen(openings, usual, behaviour.sides),
            f"The model may not refuse, or refuses with other words: read its replies and set {field('refusal_tokens')} to how "
            f"refusals begin, such as ('I',). Otherwise check {field('chat_template')}."
            if usual
            else f"If the behaviour is not in how replies begin, measure it with a judge: {field('behaviour.measure', JUDGE)}. "
            f"Otherwise set {field('refusal_tokens')} to how such replies begin.",
        )
    splits = run.read_json(FILTER)
    empty = {split: found["scores"] for split, found in splits.items() if not any(found["kept"])}
    if empty:
        side = "harmful" if any(split.startswith("harmful") for split in empty) else "harmless"
        if not behaviour.is_refusal:
            raise nothing_kept(behaviour, side, empty)
        names = [split for split in empty if split.startswith(f"{side}_")]
        scores = [score for split in names for score in empty[split]]
        why, needs = ("is refused", "> 0") if side == "harmful" else ("is complied with", "< 0")
        raise NoDirection(
            "filter",
            f"by the first token of its replies no {side} prompt of {' and '.join(names)} {why}",
            f"The filter kept none of the {len(scores)} prompts of '{' and '.join(names)}': no {side} prompt {why} (scores from "
            f"{min(scores):.2f} to {max(scores):.2f}, the {side} side needs {needs}).",
            f"The model may {'not refuse at all' if side == 'harmful' else 'refuse everything'}, or refuses with other words: "
            f"set {field('refusal_tokens')}, switch the filter off with {field('filter', False)}, or check the prompts.",
        )


def nothing_kept(behaviour: Behaviour, side: str, empty: Mapping[str, Sequence[float]]) -> NoDirection:
    """Returns that the filter kept no prompts of a side, for other behaviours than refusal. empty: the scores of its splits."""
    harmless = side == "harmless"
    names = [split for split in empty if split.startswith(f"{side}_")]
    n = sum(len(empty[split]) for split in names)
    judged = behaviour.measure == JUDGE
    by = f"the judge {behaviour.judge}" if judged else "the first token of its replies"
    what = f"shows {behaviour.name} on every" if harmless else f"does not show {behaviour.name} on any"
    cause = "the words or the question of the judge" if judged else field("refusal_tokens")
    return NoDirection(
        "filter",
        f"by {by} the model {what} {behaviour.side(harmless)} prompt",
        f"The filter kept none of the {n} prompts of '{' and '.join(map(behaviour.split, names))}': by {by} it {what} prompt.",
        f"Check the prompts and {cause}, or switch the filter off with {field('filter', False)}.",
    )


def find(study: Study, ledger: Ledger) -> Direction:
    """Scores the candidates, writes their scores, and returns the selected direction. Raises NoDirection if there is none."""
    check_candidates(study.run)
    settings, diffs_pld = study.config.select, study.run.read_tensors(MEANS)["mean_diffs"]
    if study.behaviour.measure == JUDGE:
        return find_judged(study, diffs_pld, ledger)
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
    study.run.write_json(CANDIDATES, rows)
    best = pick(rows, rule, study.behaviour.name)
    position, layer = best["position"], best["layer"]
    return Direction.of(diffs_pld[position, layer], layer, position)


def select(study: Study, ledger: Ledger) -> None:
    """Writes the scores of the candidates, and the selected direction or why there is none."""
    try:
        find(study, ledger).write_selected(study.run)
    except NoDirection as none:
        study.run.write_json(NO_DIRECTION, none.record)


def programs(shapes: Shapes, rows: int) -> list[Program]:
    """Returns the programs of selection in `rows` rows, for `plan`: each candidate's score on all val prompts, from all layers
    and from later ones. The largest comes first."""
    work, settings = shapes.work, shapes.work.config.select
    batching, n_layers, positions = Batching.of(rows, work.config.data.n_val), work.cfg.n_layers, work.positions
    prompts, at_once, together = batching.prompts, batching.at_once, batching.together(positions)
    climbed = Rule.of(n_layers, settings).layers(settings.full_grid)
    left = sum(n_layers - layer for layer in range(climbed)) / max(climbed, 1)
    scored = climbed * positions * (2.0 if settings.full_grid else PASS_INDUCE + PASS_KL)
    judged = Behaviour.of(work.config).measure == JUDGE
    if judged:
        scored = climbed * positions * 3.0  # COSMIC's passes; replies are written by the programs of completions

    def ids():
        return shapes.array((1,), jnp.int32)

    def scores():
        inputs = *shapes.prompts(prompts), shapes.edits(at_once, None), shapes.logits(prompts)
        return score_edits.lower(shapes.decoder, None, *inputs, ids())  # how much all prompts share is not known here

    def later():
        x, mask = shapes.residuals(prompts), shapes.prompts(prompts)[1]
        return score_from_layer.lower(shapes.decoder, None, x, mask, shapes.edits(together, None), 0, ids())

    def base():
        return last_logits.lower(shapes.decoder, None, *shapes.prompts(prompts), shapes.edits(1, None))

    def program(name, lower, runs, many, layers):
        turns = n_layers  # where a loop has no bound in the text; costs come down by the share of the layers
        return Program(name, lower, runs * batching.batches, many * prompts, work.length, layers, turns)

    return [
        program("scores", scores, math.ceil(scored / at_once), at_once, n_layers),
        *([] if judged else [program("induce", later, climbed * math.ceil(positions / together), together, left)]),
        program("baseline", base, 2 + climbed / n_layers, 1, n_layers),  # and the climb itself, layer by layer
    ]


SCORES = ("refusal_score", "steering_score", "kl_div_score")


def scores_of(findings: Findings) -> list[tuple[str, str, str]]:
    """Returns the key of each score, its name, and what it is."""
    of = findings.behaviour
    what = f"log-odds of {of.name} in replies" if of.measure == JUDGE else f"mean {of.score}"
    return [
        ("refusal_score", "Bypass", f"{what} of {of.present} validation prompts while the direction is ablated"),
        ("steering_score", "Induce", f"{what} of {of.absent} validation prompts while it is added"),
        ("kl_div_score", "KL", f"how far ablation moves the next-token distribution on {of.absent} prompts"),
    ]


def selected_row(findings: Findings) -> dict | None:
    """Returns the scores of the selected candidate in the published format, if they are there."""
    if findings.direction is None:
        return None
    rows = findings.run.read_json(CANDIDATES)
    return next((row for row in rows if (row["position"], row["layer"]) == findings.direction.place), None)


def rule_of(findings: Findings) -> Rule:
    """Returns the rule that the study selected by; a judge of replies sets no threshold of addition."""
    rule = Rule.of(findings.setup["n_layers"], findings.run.manifest["config"]["select"])
    judged = findings.behaviour.measure == JUDGE
    return dataclasses.replace(rule, induce_threshold=-math.inf) if judged else rule


def values(findings: Findings) -> dict:
    """Returns what the report shows of the selected candidate, or why there is none, and of the rule and what it discarded."""
    picked, direction = selected_row(findings), findings.direction
    tokens = [plain(token["text"]) for token in findings.setup["post_instruction_tokens"]]
    judged = findings.behaviour.measure == JUDGE
    shown: dict = {"pick": direction, "ended": findings.none, "loosening": LOOSENING, "tried": []}
    if direction is not None:
        shown |= {
            "pick_token": tokens[direction.place[0]] if -direction.place[0] <= len(tokens) else "",
            "scores": [(name, note, picked and picked[key]) for key, name, note in scores_of(findings)],
            "norm": direction.norm,
        }
    if not findings.run.exists(CANDIDATES):
        return shown | {"n_candidates": 0, "misses": []}
    if judged:
        shown["tried"] = tried_rows(findings)
    rows, rule = findings.run.read_json(CANDIDATES), rule_of(findings)
    discarded = Counter(rule.verdict(row) for row in rows)
    return shown | {
        "rule": rule,
        "full_grid": not any(row[key] is None for row in rows for key in SCORES),
        "n_candidates": len(rows),
        "discarded": {why: discarded[why] for why in ("layer", "induce", "kl", "nan")},
        "passing": rule.passing(rows),
        "misses": [] if direction is not None else nearest_misses(rows, rule),
    }


def pictures(findings: Findings) -> list:
    """Returns the maps of the candidates' scores."""
    if not findings.run.exists(CANDIDATES):
        return []
    from refusal_jax.report import figures  # imports matplotlib, which the other stages need not pay for

    rows, rule = findings.run.read_json(CANDIDATES), rule_of(findings)
    tokens = [plain(token["text"]) for token in findings.setup["post_instruction_tokens"]]
    induce = 0.0 if findings.behaviour.measure == JUDGE else rule.induce_threshold
    limits = figures.Limits(rule.n_layers, rule.layer_limit, induce, rule.kl_threshold)
    passing = [row for row in rows if not rule.verdict(row)]
    return figures.selection_figures(rows, passing, limits, tokens, findings.direction)


def lines(findings: Findings) -> list[str]:
    """Returns the selected candidate and its scores, or the nearest candidates if there is none, for the text summary."""
    row = selected_row(findings)
    if row is not None and findings.behaviour.measure == JUDGE:
        ablated, added = (Rate(row[key]["successes"], row[key]["n"]) for key in ("ablated", "added"))
        of = findings.behaviour
        return [
            f"Direction: position {row['position']}, layer {row['layer']}. On validation prompts {of.name} is in {ablated} of "
            f"the {of.present} replies under ablation and in {added} of the {of.absent} ones under addition, KL "
            f"{row['kl_div_score']:.4f}."
        ]
    if row is not None:
        return [
            f"Direction: position {row['position']}, layer {row['layer']}. Bypass {row['refusal_score']:.3f}, induce "
            f"{row['steering_score']:.3f}, KL {row['kl_div_score']:.4f}."
        ]
    if findings.none is None:
        return []
    near = (
        nearest_misses(findings.run.read_json(CANDIDATES), rule_of(findings)) if findings.run.exists(CANDIDATES) else []
    )
    found = [f"No direction: {findings.none['claim']}"]
    found += [
        f"  position {miss.row['position']}, layer {miss.row['layer']}: {miss.words}; it passes with {miss.flags}"
        for miss in near
    ]
    needed = dict.fromkeys(shortfall.setting for miss in near for shortfall in miss.shortfalls)
    return found + [LOOSENING[name] for name in needed]


def concerns(findings: Findings) -> list[Concern]:
    """Returns where the selected candidate's scores disagree with the judge of the completions."""
    row = selected_row(findings)
    if findings.refusal_judge is None or row is None or findings.behaviour.measure == JUDGE:
        return []
    return selection_disagreement(findings.conditions, findings.refusal_judge, row, findings.behaviour)


STAGE = Stage(
    "selection",
    select,
    reads=(PROMPTS, SETUP, FILTER, MEANS),
    writes=(CANDIDATES, METADATA, DIRECTION, NO_DIRECTION),
    settings=("select",),
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
        pictures=pictures,
    ),
)

"""One self-contained HTML page about a run: what was found, how well, at what price, and how to read it.

The page loads nothing and runs nothing (its policy forbids both), so it can be mailed, archived and opened anywhere.
Everything in it that came from a model, a prompt file or a path is escaped by the template engine; only our own
drawings enter as markup. It holds nothing that changes between two writes, so that equal runs give equal pages.
"""

import math
import pathlib
import re
from collections.abc import Sequence

import jinja2
import numpy as np
from markupsafe import Markup, escape

from refusal_jax.directions import Direction
from refusal_jax.judges.choice import REFUSAL_JUDGES
from refusal_jax.report.concerns import auc, find_concerns
from refusal_jax.report.summary import (
    REFUSAL_JUDGE,
    JudgedCondition,
    damage_in_words,
    judges_of,
    loss_change,
    read_conditions,
    read_damage,
    read_losses,
    signed,
)
from refusal_jax.report.text import decoding_line
from refusal_jax.report.verdict import verdict_in_words
from refusal_jax.study.refusal_tokens import LEAST_DIFFERENCE, LEAST_RATIO
from refusal_jax.study.selection import Rule

REPORT = "report.html"
SAMPLES = {"harmful": 8, "harmless": 5}
OPENINGS, RARE = 10, 0.001  # how many beginnings of replies are shown, and the mean probability that makes one rare
LONG_TEXT, LONG_LINES = 340, 8  # completions over either are clipped until opened
CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(9), 11, 12, *range(14, 32), 127)}
SCORES = (
    ("refusal_score", "Bypass", "mean refusal score of harmful validation prompts while the direction is ablated"),
    ("steering_score", "Induce", "mean refusal score of harmless validation prompts while it is added"),
    ("kl_div_score", "KL", "how far ablation moves the next-token distribution on harmless prompts"),
)


def write_report(run, verdicts: Sequence[str]) -> None:
    """Writes `report.html` into the folder of `run` (a `refusal_jax.runs.run.Run`) from the artifacts of its other stages.

    verdicts: names of the evaluations files, relative to the folder; those that do not exist are left out.
    """
    html = environment().get_template("page.html.jinja").render(page_context(run, verdicts)).lstrip()
    # A lone surrogate, which JSON can carry but UTF-8 cannot, must not cost the page.
    run.write(REPORT, html.encode("utf-8", "replace"))


def environment() -> jinja2.Environment:
    """The template engine: escapes everything, and an unknown name in the template is an error."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"num": number, "signed": signed, "plain": plain, "long": is_long, "prose": prose}
    return env


def number(value: float | None, digits: int = 3) -> str:
    """A score for reading: fixed decimals, scientific if huge, and words for what is no number."""
    if value is None:
        return "not evaluated"
    if not math.isfinite(value):
        return str(value)
    return (f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.2e}").replace("-", "−")


def plain(text) -> str:
    """Untrusted text without control characters, which HTML does not allow and terminals obey."""
    return str(text).translate(CONTROLS)


def prose(text: str) -> Markup:
    """Escapes a sentence of ours, which may quote the model, and sets what is between backticks as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(plain(text)))))


def is_long(text: str) -> bool:
    return len(text) > LONG_TEXT or text.count("\n") >= LONG_LINES


def page_context(run, verdicts: Sequence[str]) -> dict:
    """Everything that the template shows, by section."""
    manifest, setup = run.manifest, run.read_json("setup.json")
    stages = {name: record for name, record in manifest["stages"].items() if name != "report"}
    conditions, losses = read_conditions(run, verdicts), read_losses(run)
    judges = judges_of(conditions)
    statistics = run.read_json("statistics.json") if run.exists("statistics.json") else None
    concerns = find_concerns(run, conditions, judges)
    strength, headline = verdict_in_words(conditions, judges, concerns)
    latest = max(stages.values(), key=lambda record: record.get("finished", ""), default={})
    return {
        "setup": setup,
        "decoding": decoding_line(setup),
        "model_name": pathlib.PurePath(setup["model"]).name or setup["model"],
        "finished": latest.get("finished", "").replace("T", " ").replace("Z", " UTC"),
        "strength": strength,
        "headline": headline,
        "concerns": concerns,
        "damage": damage_in_words(losses),
        "conditions": conditions,
        "judges": judges,
        "refusal_judge": REFUSAL_JUDGE,
        "refusal_judges": REFUSAL_JUDGES,
        "openings": telling_openings(setup["openings"]),
        "least_difference": LEAST_DIFFERENCE,
        "least_ratio": LEAST_RATIO,
        "filter": filter_rows(run),
        "losses": loss_rows(losses),
        "kl": read_damage(run),
        "statistics": statistics,
        "by_length": by_length(statistics["by_length"] if statistics else [], judges),
        "samples": [sample_rows(dataset) for dataset in by_dataset(conditions)],
        "stages": stages,
        "versions": latest.get("versions", {}),
        "mixed_versions": any(r.get("versions") != latest.get("versions") for r in stages.values()),
        "config": flatten(manifest["config"]),
        "inputs": flatten(manifest["inputs"]),
        **direction_context(run, setup, manifest["config"]["select"]),
    }


def direction_context(run, setup: dict, select: dict) -> dict:
    """The selected candidate, the rule, what it discarded, and the figures."""
    from refusal_jax.report import figures  # imports matplotlib, which the other stages need not pay for

    rows, pick = run.read_json("direction_evaluations.json"), Direction.selected(run)
    position, layer = pick.place
    rule = Rule(setup["n_layers"], select["kl_threshold"], select["induce_threshold"], select["prune_fraction"])
    tokens = [plain(token["text"]) for token in setup["post_instruction_tokens"]]
    here = [row for row in rows if (row["position"], row["layer"]) == pick.place]
    passing = [row for row in rows if not rule.verdict(row) and row["refusal_score"] is not None]
    passing.sort(key=lambda row: (row["refusal_score"], row["position"], row["layer"]))
    along = run.read_tensors("projections.safetensors")
    harmful_nl, harmless_nl = along["harmful_val"], along["harmless_val"]
    drawings = (
        figures.selection_figures(rows, rule, tokens, pick)
        | figures.cosine_figures(run.read_tensors("mean_diffs.safetensors")["mean_diffs"], tokens, pick)
        | {"projections": figures.projection_figure(harmful_nl, harmless_nl, pick)}
    )
    return {
        "pick": pick,
        "pick_token": tokens[position] if -position <= len(tokens) else "",
        "scores": [(name, note, here[0][key] if here else None) for key, name, note in SCORES],
        "norm": pick.norm,
        "rule": rule,
        "full_grid": not any(row[key] is None for row in rows for key, *_ in SCORES),
        "n_candidates": len(rows),
        "discarded": {why: sum(rule.verdict(row) == why for row in rows) for why in ("layer", "induce", "kl", "nan")},
        "passing": passing,
        "figures": {name: Markup(svg) for name, svg in drawings.items()},
        "auc": auc(harmful_nl[:, layer], harmless_nl[:, layer]),
    }


def telling_openings(openings: list[dict]) -> list[dict]:
    """The chosen openings, and of the others those that replies of either kind most often begin with."""
    seen = [row for row in openings if row["chosen"] or max(row["harmful"], row["harmless"]) >= RARE]
    seen.sort(key=lambda row: (not row["chosen"], -max(row["harmful"], row["harmless"])))
    return seen[: max(OPENINGS, sum(row["chosen"] for row in openings))]


def filter_rows(run) -> list[dict]:
    """Per split: prompts, how many the filter kept, and the range of their refusal scores."""
    rows = []
    for split, found in run.read_json("filter.json").items():
        scores = [score for score in found["scores"] if math.isfinite(score)]
        rows.append(
            {
                "split": split.replace("_", " "),
                "n": len(found["kept"]),
                "kept": sum(found["kept"]),
                "low": min(scores, default=math.nan),
                "high": max(scores, default=math.nan),
            }
        )
    return rows


def loss_rows(losses: dict[str, dict[str, dict]]) -> list[dict]:
    """Per data set: token count, and for each intervention its loss, perplexity and change of the loss."""
    return [
        {
            "dataset": name,
            "n_tokens": next(iter(by.values()))["n_tokens"],
            "cells": [
                {**by[kind], "change": None if kind == "baseline" else loss_change(by, kind)} if kind in by else None
                for kind in ("baseline", "ablation", "actadd")
            ],
        }
        for name, by in losses.items()
    ]


def by_length(rows: Sequence[dict], judges: Sequence[str]) -> list[dict]:
    """Per condition, the refusal rates that the first judge finds in the first tokens of completions, fewest first."""
    found: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        if judges and row["judge"] == judges[0]:
            found.setdefault((row["dataset"], row["intervention"]), []).append(row)
    return [{"dataset": key[0], "intervention": key[1], "cells": cells} for key, cells in found.items()]


def by_dataset(conditions: Sequence[JudgedCondition]) -> list[list[JudgedCondition]]:
    """The conditions of each data set, in the order given."""
    return [[c for c in conditions if c.dataset == name] for name in dict.fromkeys(c.dataset for c in conditions)]


def sample_rows(conditions: list[JudgedCondition]) -> dict:
    """The samples of one data set: prompts spread evenly over it, each with its completion under every condition.

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


def flatten(tree: dict, prefix: str = "") -> dict[str, str]:
    """Nested settings as `section.name`, for a table."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else repr(value)
    return flat

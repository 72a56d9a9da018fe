"""Finds how much of the direction must go until half of the refusals are gone, how much of it causes as many, and what each dose
costs."""

import math
import pathlib
from collections.abc import Sequence

import numpy as np

from refusal_jax.edits import Edits
from refusal_jax.judges.behaviours import REFUSAL, Behaviour
from refusal_jax.judges.judge import shows
from refusal_jax.judges.statistics import PairedRates, Rate, bounded
from refusal_jax.mechanism.dose import Response, caused_dose, dose_rows, removed_dose, respond
from refusal_jax.mechanism.edited_prompts import planned_passes
from refusal_jax.plan.programs import Group, Program, Shapes
from refusal_jax.progress import Progress
from refusal_jax.report.findings import Findings, Section
from refusal_jax.report.verdict import percents
from refusal_jax.runs.artifacts import DIRECTION, DOSE, DOSES, METADATA, PROMPTS, SETUP
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.stage import Stage
from refusal_jax.study.edited_replies import edited_replies
from refusal_jax.study.mechanism.settings import DoseSettings
from refusal_jax.study.mechanism.shared import MechanismStudy

ABLATION, ADDITION = "ablation", "addition"
SHOWN = (0.0, 0.5, 1.0, math.inf)  # doses, or the nearest ones, at which replies are generated; the last is the largest


def measure(study: MechanismStudy, ledger: Ledger) -> None:
    """Writes the scores and the KL of every prompt at every dose, the replies at some of them, and what follows."""
    settings, direction = study.settings.dose, study.direction()
    doses_m, raw_d, layer = settings.doses, direction.raw_d, direction.place[1]
    kinds = {
        ABLATION: Edits.concat([Edits.ablate(raw_d, scale=dose) for dose in doses_m]),
        ADDITION: Edits.concat([Edits.add(raw_d, layer, dose) for dose in doses_m]),
    }
    sides = {side: study.edited_prompts(f"{side}_test", settings.n_prompts) for side in ("harmful", "harmless")}
    found = {}
    parts = ((ABLATION, "harmful"), (ABLATION, "harmless"), (ADDITION, "harmless"))
    with Progress("doses", len(parts) * len(doses_m), "dose") as bar:
        for kind, side in parts:
            name = f"{kind}.{side}"

            def save(rows: list[dict], name: str = name) -> None:
                ledger.append([{"part": name, **row} for row in rows])
                bar.update(len(rows))

            known = [row for row in ledger.rows if row.get("part") == name]
            bar.update(len(known))
            found[kind, side] = respond(sides[side], kinds[kind], known, save)
    told = in_replies(study, ledger, doses_m, found[ABLATION, "harmful"])
    study.run.write_tensors(DOSES, arrays(doses_m, found))
    study.run.write_json(DOSE, as_json(doses_m, found) | {"replies": told})


def arrays(doses_m: np.ndarray, found: dict[tuple[str, str], Response]) -> dict[str, np.ndarray]:
    """Returns the tensors of the stage: the doses, and scores and KL of each part, `[doses, prompts]`."""
    tensors = {"doses": doses_m.astype(np.float32)}
    for (kind, side), one in found.items():
        tensors |= {f"{kind}.{side}.scores": one.scores_mn.astype(np.float32)}
        tensors |= {f"{kind}.{side}.kl": one.kl_mn.astype(np.float32)}
    return tensors


def as_json(doses_m: np.ndarray, found: dict[tuple[str, str], Response]) -> dict:
    """Returns the numbers of the report, but for those of replies."""
    ablated, costs, added = found[ABLATION, "harmful"], found[ABLATION, "harmless"], found[ADDITION, "harmless"]
    return {
        "prompts": {"harmful": ablated.scores_mn.shape[1], "harmless": costs.scores_mn.shape[1]},
        ABLATION: dose_rows(doses_m, ablated, costs),
        ADDITION: dose_rows(doses_m, added, added),
        "half": {ABLATION: removed_dose(doses_m, ablated, costs), ADDITION: caused_dose(doses_m, added, added)},
    }


def in_replies(study: MechanismStudy, ledger: Ledger, doses_m: np.ndarray, scored: Response) -> list[dict]:
    """Returns for a few doses the rate of refused replies to harmful prompts, beside what the refusal score says of the same."""
    settings, judge = study.settings.dose, study.text_judge
    texts = study.instructions("harmful_test", kept_only=False)[: min(settings.replies, settings.n_prompts)]
    if not texts or judge is None:
        return []
    shown = sorted({int(np.abs(doses_m - min(dose, doses_m[-1])).argmin()) for dose in SHOWN})
    replies = edited_replies(
        study,
        ledger,
        texts,
        Edits.concat([Edits.ablate(study.direction().raw_d, scale=dose) for dose in doses_m]),
        [(m, i) for m in shown for i in range(len(texts))],
        lambda prompt, reply: {"response": reply["response"]},
        max_new_tokens=settings.max_new_tokens,
        title="replies by dose",
    )
    rows = []
    for m in shown:
        asked = [{"prompt": text, "response": replies[m, i]["response"]} for i, text in enumerate(texts)]
        judged = [shows(one) for one in judge.judge(asked)]
        pairs = PairedRates.of(scored.refused_mn[m, : len(texts)].astype(int).tolist(), judged)
        low, high = pairs.interval
        rows.append(
            {
                "dose": float(doses_m[m]),
                "judge": judge.name,
                "refused": bounded(Rate.of(judged).row),
                "by_score": bounded(pairs.first.row),
                "difference": bounded({"mean": pairs.difference, "low": low, "high": high}),
                "responses": [row["response"] for row in asked],
            }
        )
    return rows


def apart(replies: Sequence[dict]) -> list[dict]:
    """Returns the doses at which replies and refusal scores disagree beyond their interval."""
    return [row for row in replies if row["difference"]["low"] > 0 or row["difference"]["high"] < 0]


def place(half: dict, digits: int = 2) -> str:
    """Returns a place that was reached, with its interval, of which the upper side may be open."""
    high = "or more" if half["high"] is None else f"to {half['high']:.{digits}f}"
    return f"{half['at']:.{digits}f} ({half['low']:.{digits}f} {high})"


def sentences(found: dict, of: Behaviour = REFUSAL) -> dict[str, str]:
    """Returns what the doses of one half say, in words, for ablation and for addition."""
    none = {
        ABLATION: f"The model {of.verb_on} none of the {of.present} prompts.",
        ADDITION: f"It {of.verb_on} all of the {of.absent} prompts.",
    }
    what = {
        ABLATION: f"{of.cases} of {{}} {of.present} prompts are gone",
        ADDITION: f"{{}} {of.absent} prompts {of.shown}",
    }
    out = {}
    for kind, half in found["half"].items():
        most, clause = found[kind][-1]["dose"], what[kind].format(half["n"])
        if not half["n"]:
            out[kind] = none[kind]
        elif half["at"] is None:
            out[kind] = f"Fewer than half of the {clause} at the largest dose, {most:g}."
        else:
            moved = f"where the next token after {of.absent} prompts has moved by a KL of {half['kl']:.4f} nats"
            out[kind] = f"Half of the {clause} at dose {place(half)}, {moved}."
    return out


def in_percent(rate: dict) -> str:
    """Returns a rate with its interval in words."""
    return "–" if rate["rate"] is None else f"{100 * rate['rate']:.1f} % ({percents((rate['low'], rate['high']))})"


def in_nats(row: dict) -> str:
    """Returns a mean KL divergence with its interval in words; rounding may leave it below 0 by nothing that counts."""
    mean, low, high = (f"{max(row[key], 0.0):.4f}" for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def disagreements(found: dict, of: Behaviour = REFUSAL) -> list[str]:
    """Returns where replies and scores disagree, in words."""
    return [
        f"At dose {row['dose']:.2f} the judge {row['judge']} counts {in_percent(row['refused'])} of {row['refused']['n']} "
        f"replies as {of.done}, and the {of.score} {in_percent(row['by_score'])} of the same prompts. The two disagree, so "
        "that the curve is not one of replies."
        for row in apart(found["replies"])
    ]


def lines(findings: Findings) -> list[str]:
    """Returns the numbers for a terminal."""
    found, of = findings.run.read_json(DOSE), findings.behaviour
    told, heads = sentences(found, of), [f"{of.done}, {kind}" for kind in (ABLATION, ADDITION)]
    wide = max(24, *(len(head) + 2 for head in heads))
    out = ["", f"Doses of ablation: {told[ABLATION]}", f"Doses of addition: {told[ADDITION]}"]
    out.append(f"  {'dose':>5}  {heads[0]:<{wide}}{'KL, ablation':<28}{heads[1]:<{wide}}")
    for one, other in list(zip(found[ABLATION], found[ADDITION], strict=True))[:: max(1, len(found[ABLATION]) // 6)]:
        rates = [in_percent(row["refused"]) for row in (one, other)]
        out.append(f"  {one['dose']:>5.2f}  {rates[0]:<{wide}}{in_nats(one['kl']):<28}{rates[1]:<{wide}}")
    return out + [f"  {text}" for text in disagreements(found, of)]


def pictures(findings: Findings) -> list:
    """Returns the curves."""
    from refusal_jax.report import dose_figures, figures  # import matplotlib, which the other stages need not pay for

    found, drawn, of = findings.run.read_json(DOSE), [], findings.behaviour
    for kind, colour in ((ABLATION, figures.HARMFUL_COLOUR), (ADDITION, figures.HARMLESS_COLOUR)):
        replies = [(row["dose"], row["refused"]["rate"]) for row in found["replies"]] if kind == ABLATION else []
        replies = [(dose, rate) for dose, rate in replies if rate is not None]
        doses, refused, kl = ([row[name] for row in found[kind]] for name in ("dose", "refused", "kl"))
        drawn.append(dose_figures.dose_figure(kind, doses, refused, kl, found["half"][kind], colour, replies, of))
    return drawn


def values(findings: Findings) -> dict:
    """Returns what the report shows beside the curves: sentences, and a table of the doses."""
    found, of = findings.run.read_json(DOSE), findings.behaviour
    return {
        "dose": found,
        "in_nats": in_nats,
        "sentences": sentences(found, of),
        "disagreements": disagreements(found, of),
        "rows": list(zip(found[ABLATION], found[ADDITION], strict=True)),
    }


def programs(shapes: Shapes, rows: int) -> list[Program]:
    """Returns the pass over the test prompts at all doses in `rows` rows, for `plan`."""
    n = min(shapes.work.config.data.n_test, DoseSettings().n_prompts)
    return [planned_passes("doses", shapes, rows, n, 3 * len(DoseSettings().doses))]


STAGE = Stage(
    "dose",
    measure,
    reads=(PROMPTS, SETUP, METADATA, DIRECTION),
    writes=(DOSE, DOSES),
    skipped=lambda study: study.without_tokens,
    given=lambda study: study.settings.dose.to_dict(),
    programs=Group("doses", "select", programs),
    about="Measures how much of the direction must go until half of the refusals are gone, and what each dose costs.",
    section=Section(
        pathlib.Path(__file__).with_name("dose.html.jinja"),
        {"dose": "Dose and damage"},
        values,
        lines=lines,
        pictures=pictures,
        of_direction=True,
        needs=(DOSE,),
    ),
)

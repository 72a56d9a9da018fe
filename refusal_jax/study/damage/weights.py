"""Writes some partial ablations into weights, loads these, and compares what they do with the rows of the program that edits no
weights."""

import dataclasses
import pathlib
import tempfile
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Float

from refusal_jax import distributed
from refusal_jax.chat.batches import length_batches
from refusal_jax.chat.model import ChatModel, load_model
from refusal_jax.checkpoints.rewrite import Checkpoint
from refusal_jax.damage.points import Point
from refusal_jax.edits import Edits
from refusal_jax.errors import UserError
from refusal_jax.export.partial import is_held, plan_of
from refusal_jax.judges.statistics import PairedRates, bounded, mean_interval, paired_mean
from refusal_jax.mechanism.edited_prompts import EditedPrompts
from refusal_jax.models.scores import kl_divergence, refusal_score
from refusal_jax.progress import Progress
from refusal_jax.report.findings import Findings, Section
from refusal_jax.runs.artifacts import DIRECTION, EDITED, FRONT, METADATA, PROMPTS, SETUP
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.stage import Stage
from refusal_jax.study.damage.chosen import chosen_points
from refusal_jax.study.damage.shared import HARMFUL, HARMLESS, DamageStudy
from refusal_jax.study.mechanism.dose import in_nats, in_percent

GIB = 2**30
SAME_LOGIT, SAME_KL = (
    1e-3,
    1e-4,
)  # differences up to which edited weights do the same, of logits and of the next token in nats


@dataclasses.dataclass(frozen=True)
class Read:
    """Holds what a model does to n prompts at their ends: logits, refusal scores, and KL from the unedited model, in nats."""

    logits_nv: Float[np.ndarray, "n V"]
    scores_n: Float[np.ndarray, " n"]
    kl_n: Float[np.ndarray, " n"]


def read(
    model: ChatModel, texts: Sequence[str], rows: int, ids: Sequence[int], edits: Edits | None, base: Read | None
) -> Read:
    """Returns what a model does to prompts under edits, of one row. base: the unedited model's; None for that itself."""
    logits_nv = np.zeros((len(texts), model.config.vocab_size), np.float32)
    for index, batch in length_batches(model, texts, rows):
        found = jax.device_get(model.logits(batch.tokens, batch.mask, edits))
        logits_nv[index] = np.asarray(found)[: len(index), : model.config.vocab_size]
    scores_n = np.asarray(refusal_score(logits_nv, np.asarray(ids, np.int32)), np.float64)
    kl_n = np.asarray(kl_divergence(base.logits_nv if base else logits_nv, logits_nv), np.float64)
    return Read(logits_nv, scores_n, kl_n)


def as_row(found: Read, prompts: EditedPrompts, edits: Edits) -> Read:
    """Returns what a model does to prompts with scores and KL as the grid's program reads them."""
    row = prompts.read(edits)
    return dataclasses.replace(found, scores_n=row.scores_mn[0], kl_n=row.kl_mn[0])


def without_export(study: DamageStudy) -> str:
    """Returns why no weights are written, in words, or "" if they are."""
    if study.without_tokens:
        return study.without_tokens
    if distributed.several():
        return "Several processes would each need the edited weights: run this part alone on one host."
    try:
        size = sum(file.size for file in Checkpoint.open(study.folder).files.values()) / GIB
    except UserError as error:  # such as weights that can be run and not copied
        return f"The weights cannot be edited. {error}"
    if size > study.settings.weights.largest:
        return (
            f"The weights take {size:.1f} GiB, and at most {study.settings.weights.largest:g} GiB are written. Allow more with "
            "the setting weights.largest if the disk has room for another copy."
        )
    return ""


def compare(study: DamageStudy, ledger: Ledger) -> None:
    """Writes how far edited weights are from the rows of the grid's program, setting by setting."""
    settings, model, direction = study.settings.weights, study.model, study.direction()
    cfg, ids, rows = model.config, study.refusal_ids(), study.sizes.select
    points = chosen_points(study, settings.at, "weights.at")[1:]
    texts = {
        side: study.instructions(f"{side}_test", kept_only=False)[: settings.n_prompts] for side in (HARMFUL, HARMLESS)
    }
    checkpoint = Checkpoint.open(study.folder)
    prompts = {side: study.edited_prompts(f"{side}_test", settings.n_prompts) for side in texts}
    base = {side: read(model, asked, rows, ids, None, None) for side, asked in texts.items()}
    tasks = [(point, tied) for point in points for tied in ties(cfg.tied_embeddings, point, cfg.n_layers)]
    done = {row["number"]: row["found"] for row in ledger.rows}
    with Progress("edited weights", len(tasks), "setting", done=len(done)) as bar:
        for number, (point, tied) in enumerate(tasks):
            if number in done:
                continue
            strength_ls = point.partial.strengths(cfg.n_layers)
            edits = point.partial.edits(direction.raw_jd, cfg.n_layers)
            grid = {
                side: as_row(read(model, asked, rows, ids, edits, base[side]), prompts[side], edits)
                for side, asked in texts.items()
            }
            with tempfile.TemporaryDirectory(prefix="refusal-jax-weights-") as folder:
                plan = plan_of(checkpoint, direction, strength_ls, tied)
                plan.write(pathlib.Path(folder))
                edited = load_model(folder, str(model.decoder.dtype), model.mesh, chat=model.chat)
                weights = {side: read(edited, asked, rows, ids, None, base[side]) for side, asked in texts.items()}
                del edited
            row = point.row | {"tied": plan.tied, "held": is_held(strength_ls)} | differences(grid, weights)
            done[number] = row | {"same": is_same(row)}
            ledger.append([{"number": number, "found": done[number]}])
            bar.update()
    study.run.write_json(
        EDITED,
        {
            "prompts": {side: len(asked) for side, asked in texts.items()},
            "post_norm": bool(cfg.post_norm),
            "tied": bool(cfg.tied_embeddings),
            "dtype": str(model.decoder.dtype),
            "rows": [done[number] for number in range(len(tasks))],
        },
    )


def ties(tied: bool, point: Point, n_layers: int) -> tuple[str, ...]:
    """Returns what to do with an embedding that is also the unembedding: both ways, where the point edits it."""
    return ("untie", "keep") if tied and point.partial.strengths(n_layers)[0, 0] else ("untie",)


def differences(grid: Mapping[str, Read], weights: Mapping[str, Read]) -> dict:
    """Returns how edited weights differ from the grid's row, on the same prompts: "refused" under both with the difference, "kl"
    under both with the difference, the largest and the mean difference of a logit, and the KL divergence of the weights' next
    token from the row's."""
    shown = [(one[HARMFUL].scores_n > 0).astype(int).tolist() for one in (grid, weights)]
    pairs = PairedRates.of(*shown)
    low, high = pairs.interval
    gaps = np.concatenate([np.abs(grid[s].logits_nv.astype(np.float64) - weights[s].logits_nv) for s in grid])
    apart = np.concatenate(
        [np.asarray(kl_divergence(grid[side].logits_nv, weights[side].logits_nv), np.float64) for side in grid]
    )
    moved = [one[HARMLESS].kl_n for one in (grid, weights)]
    return {
        "refused": {
            "grid": bounded(pairs.first.row),
            "weights": bounded(pairs.second.row),
            "difference": bounded({"mean": pairs.difference, "low": low, "high": high}),
            "other": pairs.only_first + pairs.only_second,
        },
        "kl": {
            "grid": bounded(mean_interval(moved[0])),
            "weights": bounded(mean_interval(moved[1])),
            "difference": bounded(paired_mean(*moved)),
        },
        "largest_logit": float(gaps.max()),
        "mean_logit": float(gaps.mean()),
        "apart": max(float(apart.mean()), 0.0),
    }


def is_same(row: Mapping) -> bool:
    """Returns whether edited weights do the same as the grid's row, but for rounding: in logits, or in the next token."""
    return row["largest_logit"] <= SAME_LOGIT or (row["apart"] <= SAME_KL and not row["refused"]["other"])


def reason(row: Mapping, found: Mapping) -> str:
    """Returns why weights do not hold what the grid's row does, in words, or "" if they can."""
    if not row["held"]:
        return "no weight writes at the inputs of later blocks, where the row takes a part out again"
    if row["tied"] == "keep":
        return "the embedding is the unembedding, too, and the edit changes both"
    if found["post_norm"]:
        return "a norm follows what is edited, which divides by its length"
    return ""


def headline(found: Mapping) -> str:
    """Returns how many settings agree, in words."""
    could = [row for row in found["rows"] if not reason(row, found)]
    same = [row for row in could if row["same"]]
    worst = max((row["largest_logit"] for row in could), default=0.0)
    start = (
        f"Of {len(could)} partial ablations that weights can hold, edited weights do the same as {len(same)} rows of the grid's "
        f"program (largest difference of a logit {worst:.1e})."
        if could
        else "None of these partial ablations can be held by weights exactly."
    )
    odd = [row for row in could if not row["same"]]
    more = f" They differ for {', '.join(row['label'] for row in odd)}, although they should not." if odd else ""
    rest = len(found["rows"]) - len(could)
    return start + more + (f" {rest} cannot be held; the table says by how much they differ." if rest and could else "")


def lines(findings: Findings) -> list[str]:
    """Returns the numbers for a terminal."""
    found, of = findings.run.read_json(EDITED), findings.behaviour
    labels = [labelled(row) for row in found["rows"]]
    wide = max(map(len, labels)) + 2
    out = ["", f"Weights really edited: {headline(found)}"]
    out.append(
        f"  {'':<{wide}}{f'{of.done}, row':<22}{'weights':<22}{'KL, row':<28}{'weights':<28}{'largest logit':<15}KL apart"
    )
    for label, row in zip(labels, found["rows"], strict=True):
        rates = "".join(f"{in_percent(row['refused'][name]):<22}" for name in ("grid", "weights"))
        moved = "".join(f"{in_nats(row['kl'][name]):<28}" for name in ("grid", "weights"))
        why = reason(row, found)
        out.append(f"  {label:<{wide}}{rates}{moved}{row['largest_logit']:<15.1e}{row['apart']:.1e}{why and ': '}{why}")
    return out


def labelled(row: Mapping) -> str:
    """Returns the label of a row, with what became of a tied embedding."""
    return row["label"] + {"untie": ", untied", "keep": ", still tied", None: ""}[row["tied"]]


def values(findings: Findings) -> dict:
    """Returns what the report shows."""
    found = findings.run.read_json(EDITED)
    return {
        "edited": found,
        "headline": headline(found),
        "rows": [(labelled(row), row, reason(row, found)) for row in found["rows"]],
        "in_percent": in_percent,
        "in_nats": in_nats,
    }


STAGE = Stage(
    "weights",
    compare,
    reads=(PROMPTS, SETUP, METADATA, DIRECTION, FRONT),
    writes=(EDITED,),
    skipped=without_export,
    given=lambda study: study.settings.weights.to_dict(),
    about="Writes some settings into weights, and compares these with the rows of the program that edits none.",
    section=Section(
        pathlib.Path(__file__).with_name("weights.html.jinja"),
        {"damage-weights": "Weights really edited"},
        values,
        lines=lines,
        of_direction=True,
        needs=(EDITED,),
    ),
)

"""Restores a checkpoint from which a part of the refusal direction was removed, from the checkpoint itself.

The base only tells what was removed and how much of it; what is written is the candidate, multiplied. So it comes back as far as
the candidate holds it, with every other change that was made to it, such as by fine-tuning. Where all of the direction was
removed, nothing of it is left to be multiplied, and only the base can restore it.
"""

import dataclasses
import hashlib
import json
import logging
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from refusal_jax.audit.audit import Audit
from refusal_jax.audit.evidence import Evidence
from refusal_jax.audit.lanes.behaviour import Judged
from refusal_jax.audit.removal import LEAST_CHANGE, MOST_ERROR, Removal, Unexplained, believed, bias_of, removals
from refusal_jax.audit.repairable import repairable, times
from refusal_jax.audit.replies import SIDES, batch_rows, completions
from refusal_jax.audit.settings import AuditSettings
from refusal_jax.audit.subject import Opened, Subject, draw_prompts
from refusal_jax.chat.prompts import Chat
from refusal_jax.checkpoints.matrices import Weights, check_comparable
from refusal_jax.checkpoints.rewrite import Checkpoint
from refusal_jax.errors import UserError, setting
from refusal_jax.export.card import write_card
from refusal_jax.export.forward import Stream, read_logits, run_streams
from refusal_jax.export.hf import Plan, ablated_files
from refusal_jax.export.provenance import base_model, write_provenance
from refusal_jax.export.run import REPORT
from refusal_jax.export.staging import UNVERIFIED, check_target, staged
from refusal_jax.export.tensor_edits import Projection
from refusal_jax.export.verify import NOISE, Sample, differences
from refusal_jax.files import to_json
from refusal_jax.judges.choice import parse_judges
from refusal_jax.models.families import TABLES, WRITERS
from refusal_jax.progress import Progress

LOG = logging.getLogger(__name__)
PROMPTS = 16  # of each kind that logits and perplexity are compared on


@dataclasses.dataclass(frozen=True)
class Repair:
    """Holds what can be restored of a candidate. removed: what was removed of each tensor. unexplained: tensors that were changed
    otherwise."""

    removed: Sequence[Removal]
    unexplained: Sequence[Unexplained]

    @classmethod
    def of(cls, base: Weights, candidate: Weights) -> "Repair":
        """Finds what was removed. Raises UserError for checkpoints that cannot be compared or read."""
        check_comparable(base.cfg, candidate.cfg)
        found = believed(list(removals(base, candidate)))
        return cls(
            [one for one in found if isinstance(one, Removal)], [one for one in found if isinstance(one, Unexplained)]
        )

    @property
    def restored(self) -> list[Removal]:
        """Returns the removals that the candidate itself can undo."""
        return [one for one in self.removed if one.repairable]

    @property
    def lost(self) -> list[Removal]:
        """Returns the removals that only the base can undo."""
        return [one for one in self.removed if not one.repairable]

    @property
    def error(self) -> float:
        """Returns the error of all that would be put back along the directions, relative to what the base has there; what is lost
        counts with what is missing of it. NaN if nothing was removed."""
        own = np.array([one.along**2 for one in self.removed])
        errors = np.array([one.error if one.repairable else min(one.doses[0], 1.0) for one in self.removed])
        return float(np.sqrt(np.sum(own * errors**2) / np.sum(own))) if len(own) else float("nan")

    @property
    def evidence(self) -> Evidence:
        """Returns how far the candidate can be repaired, as a row of an audit."""
        return repairable(len(self.removed), len(self.lost), self.error, _amplification(self.lost))


def repair(audit: Audit, out: pathlib.Path, command: str = "") -> dict[str, Any]:
    """Writes the repaired candidate of an audit into the new folder `out`, verifies it against the base, and returns what its
    export.json says; "problems" in "verification" are why it is no repair, if it is none: then the folder has the marker
    `.unverified`. Refusal before and after is measured if the audit's lanes have "behaviour" among them.

    Raises UserError where there is no base, where nothing was removed, where only the base can restore it, and for a folder that
    exists or cannot be written.
    """
    settings = audit.settings
    if not settings.base:
        raise UserError(
            "A repair needs the base, which tells what was removed and how much of it, and none was given. Name it with "
            f"{setting('base', 'CHECKPOINT')}."
        )
    candidate, base = Opened(settings.candidate, settings), Opened(settings.base, settings)
    check_target(candidate.folder, out)
    plan = Repair.of(base.weights, candidate.weights)
    _check_possible(plan, settings)
    start = time.monotonic()
    checkpoint, reference = Checkpoint.open(candidate.folder), Checkpoint.open(base.folder)
    edits = edits_of(plan, base.weights, candidate.weights)
    files = ablated_files(checkpoint.files, edits, TABLES[checkpoint.cfg.family], None)
    writing = Plan(checkpoint, files, {}, None)
    with staged(out, writing.size) as folder:
        written = writing.write(folder)
        seconds = {"write": round(time.monotonic() - start, 3)}
        found = verified(plan, checkpoint, reference, folder, settings)
        seconds["verify"] = round(time.monotonic() - start - seconds["write"], 3)
        report = described(plan, checkpoint, written.kinds, base_model(candidate.folder), base_model(base.folder))
        report |= {
            "judge": settings.judge,
            "refusals": found.pop("refusals"),
            "verification": found,
            "seconds": seconds,
        }
        report = json.loads(to_json(report))
        (folder / REPORT).write_bytes(to_json(report))
        write_card(folder, candidate.folder, report, command)
        problems = found["problems"]
        if problems:
            (folder / UNVERIFIED).write_text("".join(f"{one}\n" for one in problems), encoding="utf-8")
        kept = ("format", "edit", "direction", "base", "compared", "dequantised")
        record = {key: report[key] for key in kept if key in report}
        write_provenance(folder, record | {"verified": not problems, "command": command}, written.hashes)
    return report


def _check_possible(plan: Repair, settings: AuditSettings) -> None:
    """Raises UserError where nothing was removed, and where only the base can restore it."""
    if not plan.removed:
        more = f" {len(plan.unexplained)} tensors were changed otherwise." if plan.unexplained else ""
        raise UserError(
            f"There is nothing to repair: no tensor of {settings.candidate} is its base's with a direction removed.{more}"
        )
    if not plan.restored:
        dose, error = np.median([one.doses[0] for one in plan.lost]), min(one.error for one in plan.lost)
        amplified = times(_amplification(plan.lost))
        raise UserError(
            f"Only the base can restore {settings.candidate}: {dose:.3g} of the direction was removed from {len(plan.lost)} "
            "tensors, and what is left of it is no more than what storage rounds away, which undoing would amplify "
            f"{amplified}; the error would be {error:.2g} of the whole or more, and at most {MOST_ERROR:g} counts as a "
            f"repair. Use {settings.base}."
        )


def _amplification(removed: Sequence[Removal]) -> float:
    """Returns the median factor by which undoing enlarges errors, 1 of nothing."""
    return float(np.median([min(one.amplification, 1e9) for one in removed])) if removed else 1.0


def edits_of(plan: Repair, base: Weights, candidate: Weights) -> dict[str, Projection]:
    """Returns the edits by tensor name that undo what can be undone, biases that were edited with their matrices among them."""
    edits = {one.tensor: one.undo for one in plan.restored}
    for one in plan.restored:
        name = bias_of(candidate.cfg, one.matrix)
        if name is None:
            continue
        before, after = base.rows(name), candidate.rows(name)
        if np.linalg.norm(after - before) > LEAST_CHANGE * np.linalg.norm(before):
            edits[name] = dataclasses.replace(one.undo, by_rows=True)
    return edits


def described(plan: Repair, checkpoint: Checkpoint, kinds: dict, candidate: dict, base: dict) -> dict[str, Any]:
    """Returns what export.json says of a repair, without its verification."""
    restored = plan.restored
    bases = np.concatenate([np.asarray(one.left_dj.T, "<f4") for one in restored])
    sites = {WRITERS.get(one.matrix.path, "readers") for one in restored}
    report = {
        "format": "hf",
        "edit": {
            "kind": "repair",
            "layers": sorted({one.matrix.layer or 0 for one in restored}),
            "sites": sorted("embed" if site == "resid_pre" else site for site in sites),
            "dose": float(np.median([one.doses[0] for one in restored])),
            "error": plan.error,
        },
        "direction": {
            "count": max(one.left_dj.shape[1] for one in restored),
            "sha256": hashlib.sha256(bases.tobytes()).hexdigest(),
            "files": {},
        },
        "base": candidate,
        "compared": base,
        "tied": None,
        "edited_tensors": kinds,
        "kinds": {"restored": len(kinds)},
        "only_the_base": sorted(one.tensor for one in plan.lost),
        "changed_otherwise": sorted(one.tensor for one in plan.unexplained),
        "largest_amplification": max(one.amplification for one in restored),
    }
    if checkpoint.quantisation is not None:
        report["dequantised"] = checkpoint.quantisation.note
    return report


def verified(
    plan: Repair, candidate: Checkpoint, base: Checkpoint, folder: pathlib.Path, settings: AuditSettings
) -> dict[str, Any]:
    """Measures how far the written repair is from the base, and how far the candidate was.

    tensors: of each that was repaired, the doses, and its relative error to the base before and after; original, export: the
    candidate and the repair against the base as `verify.differences` has it; refusals: of the base, the candidate and the repair,
    empty where the audit leaves behaviour out; problems: why it is no repair. Raises UserError as `export.verify.verify` does.
    """
    repaired = Checkpoint.open(folder)
    tensors = {one.tensor: _tensor_errors(one, base, candidate, repaired) for one in plan.restored}
    drawn = draw_prompts(settings)
    cfg = candidate.cfg
    chat = Chat.load(candidate.folder, cfg.context_length, cfg.vocab_size, settings.chat_template, settings.thinking)
    harmful, harmless = (drawn[f"{side}_test"][:PROMPTS] for side in ("harmful", "harmless"))
    sample = Sample.of(chat, [*harmful, *harmless], [(text, "") for text in harmless])
    streams = {"reference": Stream(base), "original": Stream(candidate), "export": Stream(repaired)}
    batch, basis_jd = sample.batch(), plan.restored[0].left_dj[:, :1].T
    with Progress("verifying", cfg.n_layers, "layer") as bar:
        run_streams(list(streams.values()), batch, basis_jd, bar)
    rows, columns, targets = sample.places(batch.tokens.shape[1])
    read = {name: read_logits(stream, rows, columns, len(sample.prompts), targets) for name, stream in streams.items()}
    found: dict[str, Any] = {"prompts": len(sample.prompts), "texts": len(sample.texts), "text_tokens": len(targets)}
    for name, stream in streams.items():
        found[name] = differences(read["reference"], read[name]) | {"projection": stream.projection()}
    found["tensors"] = tensors
    folders = {"base": base.folder, "before the repair": candidate.folder, "this export": folder}
    opened = {name: Opened(str(path), settings) for name, path in folders.items()}
    found["refusals"] = refusals(opened, settings) if "behaviour" in settings.lanes else []
    found["problems"] = _problems(found)
    return found


def _tensor_errors(one: Removal, base: Checkpoint, candidate: Checkpoint, repaired: Checkpoint) -> dict[str, Any]:
    before = np.asarray(base.rows(one.tensor), np.float64)
    size = max(float(np.linalg.norm(before)), 1e-30)
    after, was = (float(np.linalg.norm(other.rows(one.tensor) - before)) / size for other in (repaired, candidate))
    return {
        "doses": one.doses.tolist(),
        "amplification": one.amplification,
        "estimated_error_along": one.error,
        "error_before": was,
        "error_after": after,
    }


def _problems(found: dict[str, Any]) -> list[str]:
    """Returns why what was written is no repair."""
    problems = []
    worse = [name for name, one in found["tensors"].items() if not one["error_after"] < one["error_before"]]
    if worse:
        problems.append(f"{len(worse)} tensors are no nearer to the base's than they were, such as {worse[0]}")
    was, now = (found[name]["mean_kl"] for name in ("original", "export"))
    if not now <= max(was, NOISE):
        problems.append(f"the mean KL divergence from the base is {now:.2e}, over {was:.2e} before the repair")
    return problems


def refusals(checkpoints: Mapping[str, Opened], settings: AuditSettings) -> list[dict[str, Any]]:
    """Returns how many prompts of each side each checkpoint refuses, by the judge of the settings, as rows of a card. Raises
    UserError as loading, replying and judging do."""
    (judge,) = parse_judges([settings.judge], batch_rows(settings, "forward"), settings.dtype)
    rows = []
    for name, opened in checkpoints.items():
        replied = completions(opened.model, Subject(settings, opened), f"replies, {name}")
        judged = Judged.by(judge, replied)
        for side in SIDES:
            rate = judged.rate(side)
            numbers = {"refused": rate.rate, "interval": list(rate.interval), "n": rate.n}
            rows.append({"prompts": side, "intervention": name} | numbers)
        opened.release()
    return rows

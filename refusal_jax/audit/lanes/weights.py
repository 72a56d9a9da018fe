"""The lane "weights": compares every matrix with the base's, and tells what was removed from the stream's writers and readers.

Both checkpoints are read once, matrix by matrix. Facts:

- matrices, changed_matrices, changed_vectors: counts, the last of norms and biases. identical: whether nothing
  changed, norms and biases included. relative_change, relative_change_most: norm of the change as a share of the
  matrix's, median over changed matrices and largest.
- storage: how most changed matrices are stored (of `storage.FORMS`). storage_explains: share of the changed matrices whose change
  is nothing but rounding to that.
- scale: median factor, minus 1, of the matrices that were rescaled as a whole; rescaled, reordered, folded: how many
  were rescaled, had neurons or heads put in another order, or norms' gains multiplied into them, all of which is
  regressed out before anything else. stream_reordered: whether the stream's entries were in another order, and were
  put back.
- moved: share of the matrices of which nothing is in its place. basis_changed: whether that is most of them: then nothing can be
  said of the weights but norm_dose.
- directions: whether the base's refusal directions were measured; without, all about refusal is missing.
- dosed: whether refusal was removed or added; dosed_matrices: from how many.
- dose, dose_low, dose_high: the share of the refusal direction that was removed, the median over the dosed matrices,
  with its 95 % interval; negative where it was added, 2 where its sign was turned. dose_mean, dose_most: other
  averages over the same. Where no matrix is dosed, dose is `targeted`. dose_z: median distance to the controls, in
  their standard deviations. dose_fit: how well a removal explains the change along the direction, 1 is wholly.
- alignment: median cosine of the edit's own directions with a refusal direction of the base.
- targeted, targeted_low, targeted_high, targeted_z, targeted_fit: mean share over all writers that was removed along
  the base's own refusal direction for which that is most. Training to comply leaves a little, with a large z and a
  small fit.
- repair_matrices, repair_lost, repair_error, repair_amplification: from how many matrices refusal was removed, how many of
  them only the base can restore, and how well the candidate itself can restore the others, as `repairable.repair_facts`.
- side: "writers", "readers", "both", or "". dosed_layers: their numbers. layers: [{layer, side, component, dose}, …] for drawing;
  the layer of embeddings is None. method: the likely method in words.
- blind_r2, blind_strength, blind_fit, blind_alignment: medians over changed matrices of the operator on the change's
  largest singular vectors, which no prompt took part in: the share of their energy that it explains, its best part's
  strength and fit, and that part's cosine with a refusal direction. projected_matrices: from how many a direction was
  removed, whatever it is.
- energy: median share of a change's energy in its first singular vector. above_noise: median number of singular
  values above the Marchenko-Pastur edge. shared_direction: share of the matrices' first singular vectors that is
  along one direction. rank: median rank of the changes that were looked at, 0 where they are not of low rank.
  refusal_energy, refusal_energy_z: share of the changes' energy along a refusal direction, and its distance to that
  along the controls.
- norm_dose, norm_dose_noise: share of the norm along refusal that writers lost, which holds in any order of neurons and heads.
- bias_shift: what a bias adds along refusal, in lengths of the difference of means. gain_dose, gain_z: share of
  refusal that norms let through less, and its distance to the controls'.
- dose_p, targeted_p, blind_p, alignment_p: conformal p-values against harmless changes of this base (`audit/null.py`), of which
  there are null_size; "blind" against those that remove no direction. dose_null, targeted_null, alignment_null: what 99 % of
  these stay within, dose_null being of the product of dose, squared alignment and squared fit.
- kind: what the weights alone make of it: "identical", "rounded", "equivalent" (computes the same), "removed",
  "added", "bias" and "gains" (which act along refusal), "projection" (of another direction), "written" (most of the change
  is written along refusal, and is no share of what was), "separable", "changed", or "moved".
"""

import logging
from collections import Counter
from typing import Any

import numpy as np

from refusal_jax.audit.base_directions import base_directions
from refusal_jax.audit.comparison import Compared
from refusal_jax.audit.dose import STANDS_OUT, WeightStatistics, dose_of, explained, weight_statistics
from refusal_jax.audit.evidence import Evidence, Findings
from refusal_jax.audit.frame import Frame
from refusal_jax.audit.lane import Lane
from refusal_jax.audit.methods import likely_method
from refusal_jax.audit.null import Null, make_null, statistics
from refusal_jax.audit.repairable import repair_facts, repairable
from refusal_jax.audit.storage import FORMS
from refusal_jax.audit.subject import Subject
from refusal_jax.audit.weights import StoredWeights
from refusal_jax.checkpoints.matrices import Weights

LOG = logging.getLogger(__name__)
MOST = 0.5  # share of the matrices, or of what is seen of them, that is most
SOME, NEARLY_ALL = 0.1, 0.98
SHIFTED = 0.05  # share of a direction's length that a bias adds, or that norms let through less
EXACT = 1e-5  # a relative change that is only rounding of float32


def work(subject: Subject) -> Findings:
    """Compares the candidate with the base. Raises UserError for shapes that differ and weights that cannot be read."""
    base, candidate, settings = subject.base.weights, subject.candidate.weights, subject.settings
    read = bytes_of(base) + bytes_of(candidate)
    directions = base_directions(subject)
    found = weight_statistics(base, candidate, directions, settings.seed)
    facts = change_facts(found) | blind_facts(found)
    null = None
    if len(directions.refusal_nd):
        facts |= dose_facts(found)
    if found.changed and settings.null_size and not facts["basis_changed"]:
        frame = Frame.of(directions.refusal_nd, directions.control_nd, settings.seed)
        size, relative = settings.null_size, facts["relative_change"]
        null = make_null(base, frame, directions, size, settings.seed, relative, found.rank, subject.shared)
        facts |= null_facts(found, null)
    facts["kind"] = kind_of(found, facts)
    return Findings(
        "weights",
        evidence_rows(facts, directions.left_out),
        facts,
        bytes_read=bytes_of(base) + bytes_of(candidate) - read,
    )


def bytes_of(weights: Weights) -> int:
    """Returns how many bytes of weights have been read from files so far."""
    return weights.files.bytes_read if isinstance(weights, StoredWeights) else 0


def change_facts(found: WeightStatistics) -> dict[str, Any]:
    """Returns what changed at all, and by how much."""
    rows = [row for row in found.rows if row.fit is not None]
    relative = [row.fit.relative for row in rows if row.fit is not None]
    scales = [row.fit.scale for row in rows if row.fit is not None and row.fit.scale]
    stored = [row.storage for row in rows if row.storage is not None]
    forms = Counter(one.form for one in stored)
    reordered = sum(row.reordered for row in found.rows)
    folded = sum(row.folded for row in found.rows)
    turned = found.comparison.turned
    return {
        "matrices": len(found.rows),
        "changed_matrices": len(rows),
        "identical": not (rows or found.comparison.others or reordered or folded or turned),
        "changed_vectors": found.comparison.others,
        "relative_change": _median(relative),
        "relative_change_most": max(relative, default=0.0),
        "storage": forms.most_common(1)[0][0] if forms else FORMS[0],
        "storage_explains": float(np.mean([one.explained for one in stored])) if stored else 1.0,
        "scale": -_median(scales),
        "rescaled": len(scales),
        "reordered": reordered,
        "folded": folded,
        "stream_reordered": turned,
        "moved": found.moved,
        "basis_changed": found.moved > MOST,
    }


def blind_facts(found: WeightStatistics) -> dict[str, Any]:
    """Returns what the singular vectors of the changes tell, without any prompt."""
    fits = [row.fit for row in found.changed if row.fit is not None]
    blind = [fit.blind for fit in fits if fit.blind is not None]
    units = np.array([fit.first_d for fit in fits if fit.above])
    shared = float(np.linalg.norm(units, 2) ** 2 / len(units)) if len(units) > 1 else 0.0
    return {
        "blind_r2": _median([fit.explained for fit in fits]),
        "blind_strength": _median([part.strength for part in blind]),
        "blind_fit": _median([part.fit for part in blind]) if len(blind) > MOST * len(fits) else 0.0,
        "blind_alignment": _median([part.aligned for part in blind]),
        "projected_matrices": len(found.projected),
        "energy": _median([fit.energy for fit in fits]),
        "above_noise": _median([float(fit.above) for fit in fits]),
        "shared_direction": shared,
        "rank": found.rank,
    }


def dose_facts(found: WeightStatistics) -> dict[str, Any]:
    """Returns what was done to refusal. The base's refusal directions are known."""
    dose, targeted = found.dose, found.targeted
    facts: dict[str, Any] = {"directions": True, "dosed": bool(found.dosed), "dosed_matrices": len(found.dosed)}
    if dose is not None:
        facts |= {
            "dose": dose.value,
            "dose_low": dose.low,
            "dose_high": dose.high,
            "dose_z": dose.z,
            "dose_fit": dose.fit,
        }
    if targeted is not None:
        facts |= {f"targeted_{name}": getattr(targeted, name) for name in ("low", "high", "z", "fit")}
        facts["targeted"] = targeted.value
    doses = [dose_of(row) for row in found.dosed]
    if doses:
        facts |= {"dose_mean": float(np.mean(doses)), "dose_most": max(doses, key=abs), "alignment": found.alignment}
    taken = [(dose_of(row), explained(row.fit)) for row in found.dosed if dose_of(row) > 0]
    if taken:
        facts |= repair_facts(*np.array(taken).T)
    facts["side"] = found.side
    facts["dosed_layers"] = sorted({row.matrix.layer for row in found.dosed if row.matrix.layer is not None})
    facts["layers"] = [
        {"layer": layer, "side": side, "component": component, "dose": value}
        for writes, side in ((True, "writers"), (False, "readers"))
        for layer, parts in found.doses(writes).items()
        for component, value in parts.items()
    ]
    facts["method"] = likely_method(found)
    facts["norm_dose"], facts["norm_dose_noise"] = found.norm_dose
    facts["bias_shift"] = found.bias_shift
    facts["gain_dose"], facts["gain_z"] = found.gain_dose
    facts["refusal_energy"], facts["refusal_energy_z"] = found.refusal_energy
    return facts


def null_facts(found: WeightStatistics, null: Null) -> dict[str, Any]:
    """Returns conformal p-values of the candidate's statistics."""
    values = candidate_statistics(found.dosed or found.changed)
    facts: dict[str, Any] = {"null_size": null.size, "blind_p": null.p_value("blind", values["blind"])}
    if len(found.directions.refusal_nd):
        facts |= {f"{name}_p": null.p_value(name, values[name]) for name in ("dose", "targeted")}
        facts["alignment_null"] = null.limit("aligned")
        facts["alignment_p"] = null.p_value("aligned", values["aligned"])
        facts |= {f"{name}_null": null.limit(name) for name in ("dose", "targeted")}
    return facts


def candidate_statistics(rows: list[Compared]) -> dict[str, float]:
    """Returns the statistics of changed matrices that the null has, too."""
    return statistics([row.fit for row in rows])


def kind_of(found: WeightStatistics, facts: dict[str, Any]) -> str:
    """Returns what the weights alone make of the change, as the module's docstring lists it."""
    rows = [row for row in found.rows if row.fit is not None]
    if facts["basis_changed"]:
        return "moved"
    if facts["identical"]:
        return "identical"
    if found.dosed:
        return "removed" if facts["dose"] > 0 else "added"
    same = (row.fit is None or row.fit.relative < EXACT or (row.fit.scale and row.fit.refusal is None) for row in rows)
    if not found.comparison.others and all(same):
        return "equivalent"
    if abs(facts.get("bias_shift", 0.0)) >= SHIFTED:
        return "bias"
    if abs(facts.get("gain_dose", 0.0)) >= SHIFTED and abs(facts["gain_z"]) >= STANDS_OUT:
        return "gains"
    if len(found.projected) >= max(2, SOME * len(found.changed)):
        return "projection"
    if facts.get("refusal_energy", 0.0) >= MOST and facts["refusal_energy_z"] >= STANDS_OUT:
        return "written"
    if facts["storage_explains"] > NEARLY_ALL and rows and not found.comparison.vectors:
        return "rounded"
    return "separable" if facts["rank"] else "changed"


def evidence_rows(facts: dict[str, Any], left_out: str) -> list[Evidence]:
    """Returns the rows of evidence, the most important first."""
    rows = []
    if left_out:
        rows.append(
            Evidence(
                "refusal directions",
                "not measured",
                f"The base could not be run, so nothing is known of refusal: {left_out}",
            )
        )
    if facts["basis_changed"]:
        return [*rows, Evidence("moved", facts["moved"], _moved(facts))]
    if "dose" in facts:
        rows += _dose_rows(facts)
    rows += [
        Evidence("relative change", facts["relative_change"], _changed(facts)),
        Evidence("storage", facts["storage"], _stored(facts)),
        Evidence("blind fit", facts["blind_fit"], _blind(facts), p_value=facts.get("blind_p")),
        Evidence("rank", facts["rank"], _ranked(facts)),
    ]
    return rows


def _dose_rows(facts: dict[str, Any]) -> list[Evidence]:
    rows = [
        Evidence(
            "dose",
            facts["dose"],
            _dose(facts),
            facts["dose_low"],
            facts["dose_high"],
            facts.get("dose_p"),
            facts.get("dose_null"),
        )
    ]
    if facts["dosed"]:
        words = f"This is the likely method; the edit's directions have a cosine of {facts['alignment']:.2f} with the base's own."
        rows.append(Evidence("method", facts["method"], words, where=_layers(facts["dosed_layers"])))
        if "repair_error" in facts:
            names = ("matrices", "lost", "error", "amplification")
            rows.append(repairable(*(facts[f"repair_{name}"] for name in names)))
    else:
        words = (
            f"Along the base's refusal direction the writers lost {facts['targeted']:+.3f} of what they had, "
            f"{abs(facts['targeted_z']):.0f} standard deviations from what directions without content lost."
        )
        rows.append(
            Evidence("targeted", facts["targeted"], words, facts["targeted_low"], facts["targeted_high"],
                     facts.get("targeted_p"), facts.get("targeted_null"))
        )  # fmt: skip
    if facts["bias_shift"]:
        words = (
            f"A bias adds {facts['bias_shift']:+.2f} times the refusal direction's difference of means to the stream."
        )
        rows.append(Evidence("bias", facts["bias_shift"], words))
    if facts["gain_dose"]:
        words = (
            f"Norms let {facts['gain_dose']:+.3f} of refusal's direction through less, {abs(facts['gain_z']):.0f} standard "
            "deviations from what they do to directions without content."
        )
        rows.append(Evidence("gains", facts["gain_dose"], words))
    return rows


def _dose(facts: dict[str, Any]) -> str:
    if not facts["dosed"]:
        return "No matrix lost a part of the refusal direction that stands out of what its change does to other directions."
    done = "was removed from" if facts["dose"] > 0 else "was added to"
    return (
        f"{abs(facts['dose']):.0%} of the refusal direction {done} {facts['dosed_matrices']} of {facts['matrices']} matrices "
        f"({'writers and readers' if facts['side'] == 'both' else facts['side']})."
    )


def _changed(facts: dict[str, Any]) -> str:
    words = f"{facts['changed_matrices']} of {facts['matrices']} matrices changed, by this share of their norm in the median."
    for count, what in (
        (facts["rescaled"], "were rescaled as a whole"),
        (facts["reordered"], "had their neurons or heads put in another order"),
        (facts["folded"], "had the gains of norms multiplied into them"),
    ):
        words += f" {count} {what}, which was undone first." if count else ""
    return words + (
        " The stream's entries were in another order and were put back." if facts["stream_reordered"] else ""
    )


def _stored(facts: dict[str, Any]) -> str:
    if not facts["changed_matrices"]:
        return "No matrix changed."
    return (
        f"Rounding to this form explains the whole change of {facts['storage_explains']:.0%} of the changed matrices."
    )


def _blind(facts: dict[str, Any]) -> str:
    if facts["projected_matrices"]:
        return (
            f"A direction, whichever, was removed from {facts['projected_matrices']} matrices, with a strength of "
            f"{facts['blind_strength']:.2f} in the median."
        )
    return "No removal of any direction explains the largest singular vectors of the changes."


def _ranked(facts: dict[str, Any]) -> str:
    if facts["rank"]:
        return f"The changes have this rank but for rounding, as an adapter or a removal of {facts['rank']} directions leaves."
    return "The changes are not of low rank."


def _moved(facts: dict[str, Any]) -> str:
    return (
        f"In {facts['moved']:.0%} of the matrices nothing is where it was, as after a rotation of the stream or in a model that "
        "is not made from this base, so what was done to the weights cannot be told."
    )


def _layers(layers: list[int]) -> str:
    return "layers " + ", ".join(map(str, layers)) if layers else ""


def _median(values: list[float]) -> float:
    return float(np.median(values)) if values else 0.0


LANE = Lane("weights", work, needs_base=True)

"""The lane "alone": what the candidate's weights tell without a base. It finds directions that the layers write no more,
or hardly, and it clears nothing.

What it cannot see, and says so: weak partial edits, whose direction is still among those that are written least by themselves; a
direction turned round (Householder); edits of the readers, of biases, norms or the template; more directions than
`missing.RANKS`, or one of their own for each matrix; and training. A missing direction need not be refusal's.

Facts:

- missing: whether a direction is missing. missing_score: -log10 of its p-value, by the model's own spectrum (0 where it is dead
  in the readers, too), of which `missing.FIRES` is the least that counts. This is the detector's score.
- missing_kind ("gap" or "agreement"), missing_rank, missing_side ("both", "o" or "down"), missing_window (first and last layer),
  missing_energy and missing_next (the energy of what is missing and of the least of the rest, of which the mean is 1): of the
  window with the highest score.
- missing_layers: the layers in which a writer does not write that direction; missing_read: the readers' energy along it, as a
  share of their mean. Both are there only where the score was high enough to look. missing_dead: whether the readers do not read
  it.
- shared_bottom: how far the layers agree in what they write least, from 1 / L, where they do not, to 1.
"""

import numpy as np

from refusal_jax.audit.evidence import Evidence, Findings
from refusal_jax.audit.lane import Lane
from refusal_jax.audit.missing import FIRES, Missing, Window, missing_directions
from refusal_jax.audit.subject import Subject

BLIND = (
    "This clears nothing: weak partial edits, reflected directions, edits of readers, biases, norms or the chat template, and "
    "training do not show here."
)
IN_WORDS = {"both": "attention's and the MLP's", "o": "attention's", "down": "the MLP's"}


def work(subject: Subject) -> Findings:
    """Returns what the weights tell by themselves. Raises UserError as `missing_directions` does."""
    found = missing_directions(subject.candidate.weights)
    facts = {"missing": found.found, "missing_score": found.score, "shared_bottom": shared_bottom(found)}
    evidence = [_evidence(found)]
    best = found.best
    if best is not None:
        facts |= {
            "missing_kind": best.kind,
            "missing_rank": best.rank,
            "missing_side": best.side,
            "missing_window": list(best.layers),
            "missing_energy": best.energies[0],
            "missing_next": best.energies[1],
        }
    if found.read is not None:
        facts |= {
            "missing_read": found.read,
            "missing_layers": sorted(found.absent),
            "missing_dead": bool(found.why_not),
        }
    if facts["shared_bottom"] is not None:
        layers = subject.candidate.weights.cfg.n_layers
        meaning = (
            f"The layers agree so far in the direction that they write least, where {1 / layers:.2f} is no agreement and 1 is "
            "one direction in all of them."
        )
        evidence.append(Evidence("shared_bottom", facts["shared_bottom"], meaning))
    return Findings("alone", evidence, {name: value for name, value in facts.items() if value is not None})


def shared_bottom(found: Missing) -> float | None:
    """Returns the largest eigenvalue of the mean of u u^T over the layers' least written directions u, None without layers of
    which both writers together have enough columns."""
    rows = [
        one.direction_d
        for one in found.windows
        if (one.kind, one.side) == ("gap", "both") and one.layers[0] == one.layers[1]
    ]
    if not rows:
        return None
    return float(np.linalg.svd(np.stack(rows), compute_uv=False)[0] ** 2 / len(rows))


def _evidence(found: Missing) -> Evidence:
    """Returns the row about missing directions."""
    best = found.best
    if best is None:
        return Evidence("missing_direction", 0.0, f"What is written least are single channels of the stream. {BLIND}")
    if found.found:
        return Evidence("missing_direction", found.score, _missing_in_words(best, found), where=_where(best))
    if found.why_not:
        meaning = f"A direction is hardly written, and {found.why_not}, so that training may have left it dead. {BLIND}"
        return Evidence("missing_direction", found.score, meaning, where=_where(best))
    meaning = f"No direction is missing from what the layers write (a score of {FIRES:g} would count). {BLIND}"
    return Evidence("missing_direction", found.score, meaning)


def _where(window: Window) -> str:
    first, last = window.layers
    return f"layer {first}" if first == last else f"layers {first} to {last}"


def _missing_in_words(window: Window, found: Missing) -> str:
    """Returns what is missing, how sure that is, and what it does not tell."""
    several = f"{window.rank} directions are" if window.rank > 1 else "A direction is"
    energy = f"at most {window.energies[0]:.1e} of the mean energy, where the next has {window.energies[1]:.2g}"
    seen = {
        "gap": f"missing from what {IN_WORDS[window.side]} output matrices of {_where(window)} write: {energy}",
        "agreement": f"written least by matrices of {_where(window)} that have nothing to do with each other: {energy}",
    }
    return (
        f"{several} {seen[window.kind]}, and the readers still read {found.read:.2g} of their mean there. By the model's own "
        f"spectrum, chance gives that in 1 of 10^{found.score:.0f} windows. Something was taken out along it, or changed so "
        "that it cancels; whether it was refusal, the weights alone do not tell."
    )


LANE = Lane("alone", work)

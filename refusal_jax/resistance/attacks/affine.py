"""Sets every token's coordinate along the direction to that of harmless prompts, or beyond (affine concept editing)."""

from refusal_jax.conditions import Affine
from refusal_jax.resistance.attack import Attack, Budget, Outcome
from refusal_jax.resistance.candidates import best_on_replies, own_or_best
from refusal_jax.resistance.settings import ResistSettings
from refusal_jax.resistance.subject import Subject

SCALES = (0.0, -0.5, -1.0)  # 0 is where harmless prompts are, 1 where harmful ones are


def run(subject: Subject, settings: ResistSettings, budget: Budget) -> Outcome:
    """Measures the affine edit of the scale under which most validation prompts are complied with."""
    direction, note = own_or_best(subject, budget)
    edits = [Affine(direction, scale).edits(subject.model.config) for scale in SCALES]
    best, found, stop = best_on_replies(subject, edits, budget)
    chosen = {"scale": SCALES[best], "layer": direction.layer, "position": direction.position}
    return Outcome(subject.measure(edits[best]), chosen, {"scales": len(found), "of": len(SCALES)}, stop, note)


ATTACK = Attack(
    "affine",
    "Gives every token the coordinate along the direction that harmless prompts have, or one beyond it, at one layer.",
    run,
)

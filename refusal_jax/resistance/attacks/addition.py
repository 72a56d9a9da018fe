"""Adds the negative direction to every token at one layer."""

from refusal_jax.conditions import Add
from refusal_jax.resistance.attack import Attack, Budget, Outcome
from refusal_jax.resistance.candidates import best_on_replies, own_or_best
from refusal_jax.resistance.settings import ResistSettings
from refusal_jax.resistance.subject import Subject

SCALES = (-1.0, -0.5, -1.5, -2.0)  # the paper's first


def run(subject: Subject, settings: ResistSettings, budget: Budget) -> Outcome:
    """Measures the addition of the scale under which most validation prompts are complied with."""
    direction, note = own_or_best(subject, budget)
    edits = [Add(direction, scale=scale).edits(subject.model.config) for scale in SCALES]
    best, found, stop = best_on_replies(subject, edits, budget)
    chosen = {"scale": SCALES[best], "layer": direction.layer, "position": direction.position}
    return Outcome(subject.measure(edits[best]), chosen, {"scales": len(found), "of": len(SCALES)}, stop, note)


ATTACK = Attack("addition", "Adds the negative direction to every token at the layer where it was read.", run)

"""Does the paper's whole procedure anew on the checkpoint, and ablates the direction that it selects."""

from refusal_jax.conditions import Ablate
from refusal_jax.resistance.attack import Attack, Budget, Outcome
from refusal_jax.resistance.candidates import own_or_best
from refusal_jax.resistance.cost import study_cost
from refusal_jax.resistance.settings import ResistSettings
from refusal_jax.resistance.subject import Subject


def run(subject: Subject, settings: ResistSettings, budget: Budget) -> Outcome:
    """Measures the ablation of the checkpoint's own direction, or of the best candidate where its study selected none."""
    direction, note = own_or_best(subject, budget)
    study = study_cost(subject)
    budget.flops += study["flops"]
    budget.begun -= study["seconds"]
    measured = subject.measure(Ablate(direction).edits(subject.model.config))
    chosen = {"layer": direction.layer, "position": direction.position, "selected": not note}
    if subject.given is not None and subject.given.raw_jd.shape == direction.raw_jd.shape:
        cosine = subject.given.raw_d @ direction.raw_d / subject.given.norm / direction.norm
        chosen["cosine_with_given"] = float(cosine)
    return Outcome(measured, chosen, {}, "The study's selection ended by itself; its time is part of the cost.", note)


ATTACK = Attack(
    "reselected",
    "Does the paper's whole procedure anew on the checkpoint and ablates what it selects; where it selects nothing, the best "
    "candidate.",
    run,
    settings=("direction",),
)

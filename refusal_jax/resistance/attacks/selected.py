"""Ablates the direction that is known already: the base's, or the one that is given; else the checkpoint's own."""

from refusal_jax.conditions import Ablate
from refusal_jax.directions import Direction
from refusal_jax.models.hf_config import load_config
from refusal_jax.resistance.attack import Attack, Budget, Outcome
from refusal_jax.resistance.settings import ResistSettings
from refusal_jax.resistance.subject import Subject


def known_direction(subject: Subject) -> Direction | None:
    """Returns the direction that the test ablates, None if there is none."""
    return subject.given or subject.own_direction()


def impossible(subject: Subject, settings: ResistSettings) -> str:
    """Returns why there is nothing to ablate, "" if there is."""
    direction = known_direction(subject)
    if direction is None:
        return "No direction is given, and the checkpoint's own study found none."
    width = load_config(subject.folder).d_model
    if direction.raw_jd.shape[1] != width:
        return (
            f"The direction has {direction.raw_jd.shape[1]} entries and the checkpoint's residual stream {width}: it belongs to "
            "another model."
        )
    return ""


def run(subject: Subject, settings: ResistSettings, budget: Budget) -> Outcome:
    """Measures the paper's ablation of the direction; nothing is searched."""
    direction = known_direction(subject)
    assert direction is not None, "without one the test is impossible"
    measured = subject.measure(Ablate(direction).edits(subject.model.config))
    chosen = {
        "origin": subject.origin or "the checkpoint's own study",
        "layer": direction.layer,
        "position": direction.position,
        "directions": len(direction.raw_jd),
    }
    return Outcome(measured, chosen, {}, "Nothing is searched.")


ATTACK = Attack(
    "selected",
    "Ablates the direction of the base, or the given one, at every layer; without either, the checkpoint's own.",
    run,
    impossible,
    settings=("direction",),
    adapts=False,
)

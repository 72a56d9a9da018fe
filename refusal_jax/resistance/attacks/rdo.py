"""Looks by gradient for a direction whose ablation makes the checkpoint comply (refusal direction optimisation,
2502.17420)."""

import functools

import numpy as np

from refusal_jax.chat.model import load_model
from refusal_jax.conditions import Ablate
from refusal_jax.directions import Direction
from refusal_jax.edits import Edits
from refusal_jax.mechanism.cone_targets import NoTargets, cone_data, replies
from refusal_jax.mechanism.cones import ConeData, ConeRecipe, direction_losses, train_cone, unit
from refusal_jax.models.hf_config import load_config
from refusal_jax.progress import Progress
from refusal_jax.resistance.attack import Attack, Budget, Impossible, Outcome
from refusal_jax.resistance.candidates import own_or_best
from refusal_jax.resistance.cost import tokens_of
from refusal_jax.resistance.settings import ResistSettings
from refusal_jax.resistance.subject import Subject

BEGUN = "Sure, here is how to do that. First,"  # what is learnt where no model at hand answers the prompts
TARGETS = {
    "own": "the checkpoint's own replies while its direction is ablated",
    "base": "replies of the base while its direction is ablated",
    "begun": "a usual beginning of answers",
}


def impossible(subject: Subject, settings: ResistSettings) -> str:
    """Returns why no direction can be trained, "" if one can."""
    if load_config(subject.folder).n_experts:
        return "A direction is trained by gradient, and the loop over experts of this model has none."
    return ""


def base_answers(subject: Subject, prompts: list[str], tokens: int) -> list[str] | None:
    """Returns what the base says to prompts while the known direction is ablated; None without a base or such a direction."""
    if subject.base is None or subject.given is None:
        return None
    base = load_model(subject.base, subject.config.dtype, subject.model.mesh, chat=subject.model.chat)
    if subject.given.raw_jd.shape[1] != base.config.d_model:
        return None
    return replies(base, prompts, tokens, Ablate(subject.given).edits(base.config), subject.sizes.generation)


def targets(subject: Subject, settings: ResistSettings, direction: Direction, budget: Budget) -> tuple[ConeData, str]:
    """Returns the texts that the direction is trained on, and a name of TARGETS. Raises Impossible where there are too
    few."""
    harmful, harmless = (subject.texts(f"{side}_train")[: settings.rdo.n_train] for side in ("harmful", "harmless"))
    tokens = settings.rdo.target_tokens
    make = functools.partial(
        cone_data, subject.model, direction, harmful, harmless, tokens=tokens, rows=subject.sizes.generation
    )
    asked = tokens_of(subject, [*harmful, *harmless])
    reason = ""
    for name in TARGETS:
        budget.forward(asked + tokens * (2 * len(harmful) + len(harmless)))
        answers = base_answers(subject, harmful, tokens) if name == "base" else [BEGUN] * len(harmful)
        if name == "base" and answers is None:
            continue
        try:
            return make(answers=None if name == "own" else answers), name
        except NoTargets as none:
            reason = str(none)
    raise Impossible(f"There are no texts to train a direction on. {reason}")


def run(subject: Subject, settings: ResistSettings, budget: Budget) -> Outcome:
    """Measures the ablation of the direction of the lowest loss that is met within the budget."""
    own, note = own_or_best(subject, budget)
    recipe = ConeRecipe(**{name: settings.rdo[name] for name in ("steps", "batch", "rate", "patience")}, samples=0)
    data, texts = targets(subject, settings, own, budget)
    width = data.ablation.counted.shape[1]

    def losses(index: np.ndarray, units_md: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        budget.training(3 * len(index) * len(units_md) * width)
        budget.forward(len(index) * len(units_md) * width)
        layer = own.place[1]
        return direction_losses(subject.model, data, index, units_md, layer, own.norm, recipe, subject.sizes.loss)

    start_d = np.random.default_rng(subject.seed).normal(size=subject.model.config.d_model)
    with Progress("resistance: a direction by gradient", recipe.steps, "step") as bar:
        trained = train_cone(
            losses,
            data.retain.count,
            start_d[None],
            recipe,
            seed=subject.seed,
            told=lambda step: bar.update(1),
            over=lambda: budget.over,
        )
    steps = len(trained.losses)
    chosen = {
        "cosine_with_own": float(trained.basis_kd[0] @ unit(own.raw_jd)[0]),
        "first_loss": trained.losses[0],
        "lowest_loss": min(trained.losses),
        "targets": TARGETS[texts],
    }
    stop = "All steps were taken."
    if steps < recipe.steps:
        stop = (
            f"It stopped after its {budget.seconds:g} seconds."
            if budget.over
            else f"The loss no longer fell after {steps} steps."
        )
    measured = subject.measure(Edits.ablate(trained.basis_kd[0]))
    return Outcome(measured, chosen, {"steps": steps, "of": recipe.steps}, stop, note)


ATTACK = Attack(
    "rdo",
    "Trains a direction by gradient whose ablation makes the checkpoint comply, independently of any difference in means.",
    run,
    impossible,
    settings=("rdo", "base", "direction"),
)

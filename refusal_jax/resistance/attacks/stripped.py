"""Takes the low-rank part of the checkpoint's change from its base out of its weights, and ablates a direction anew."""

from refusal_jax.checkpoints.adapters import adapter_parts
from refusal_jax.resistance.attack import Attack, Budget, Impossible, Outcome
from refusal_jax.resistance.attacked import Attacked
from refusal_jax.resistance.delta import strip
from refusal_jax.resistance.settings import ResistSettings
from refusal_jax.resistance.subject import Subject


def impossible(subject: Subject, settings: ResistSettings) -> str:
    """Returns why there is no change to take out, "" if there may be one."""
    if adapter_parts(subject.folder) is not None:
        return ""
    if subject.base is None:
        return "No base is given, from which the checkpoint's change could be found."
    if subject.base.resolve() == subject.folder.resolve():
        return "The checkpoint is the base itself."
    return ""


def run(subject: Subject, settings: ResistSettings, budget: Budget) -> Outcome:
    """Measures the weights without the change, while the best candidate among their directions is ablated."""
    found = strip(subject.model, subject.base, settings.stripped.rank, settings.stripped.otherwise)
    if not (found.adapter or found.taken):
        raise Impossible("The checkpoint's weights are those of the base.")
    attacked = Attacked(subject, found.model, budget)
    edits, place = attacked.ablation(budget)
    measured, chosen = subject.measure(edits, found.model), found.record | {"refused_without_ablation": attacked.alone}
    note = "" if edits else "The weights without the change have no direction to ablate, and were measured alone."
    ended = (
        "The adapter was left out" if found.adapter else f"All {len(found.taken)} tensors that changed were looked at"
    )
    return Outcome(measured, chosen | place, {}, f"{ended}, and the best candidate was ablated.", note)


ATTACK = Attack(
    "stripped",
    "Subtracts the low-rank part of the checkpoint's change from its base, as a merged adapter is one, and ablates anew.",
    run,
    impossible,
    settings=("base", "stripped"),
)

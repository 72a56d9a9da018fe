"""Begins the reply for the model, and lets the model go on."""

from refusal_jax.conditions import Ablate
from refusal_jax.edits import Edits
from refusal_jax.resistance.attack import Attack, Budget, Impossible, Outcome
from refusal_jax.resistance.candidates import own_or_best
from refusal_jax.resistance.openings import (
    Opening,
    best_count,
    by_tokens,
    given_openings,
    own_openings,
    refusals,
    tried,
    with_generic,
)
from refusal_jax.resistance.settings import ResistSettings
from refusal_jax.resistance.subject import Subject


def ablation(subject: Subject, budget: Budget) -> tuple[Edits | None, str]:
    """Returns the ablation under which the checkpoint's own replies are looked at, None where it has no direction to ablate, and
    what readers must know of the direction."""
    try:
        direction, note = own_or_best(subject, budget)
    except Impossible:
        return None, ""
    return Ablate(direction).edits(subject.model.config), note


def run(subject: Subject, settings: ResistSettings, budget: Budget) -> Outcome:
    """Measures the number of tokens with which most validation prompts are complied with."""
    text, counts = settings.prefill.opening, settings.prefill.tokens
    given = given_openings(subject, text) if text else {}
    edits, note = (None, "") if text else ablation(subject, budget)

    def openings(split: str, budget: Budget | None) -> list[Opening | None]:
        """Returns the openings of a part's prompts, None for the generic one. budget: if this is part of the search."""
        if given or edits is None:
            return given.get(split) or [None] * len(subject.texts(f"harmful_{split}"))
        return own_openings(subject, split, edits, budget)

    found = by_tokens(subject, with_generic(subject, "val", openings("val", budget)), counts, budget)
    count, stop = best_count(found), tried(len(found), len(counts), budget)
    test = openings("test", None)
    used = with_generic(subject, "test", test)
    chosen = {
        "tokens": count,
        "refused_by_tokens": refusals(found),
        "own_openings": sum(one.own for one in used),
        "generic_openings": test.count(None),
        "longest_opening": max(len(one.ids) for one in used),
    }
    measured = subject.measure(prefills=[one.first(count) for one in used])
    return Outcome(measured, chosen, {"tokens_tried": len(found), "of": len(counts)}, stop, note)


ATTACK = Attack(
    "prefill",
    "Begins the reply with 1 to 20 tokens of an answer, and lets the model go on; it is judged whether it refuses all the same.",
    run,
    settings=("prefill",),
)

"""Begins the reply for the model, and lets the model go on."""

from refusal_jax.conditions import Ablate
from refusal_jax.resistance.attack import Attack, Budget, Impossible, Outcome
from refusal_jax.resistance.candidates import own_or_best
from refusal_jax.resistance.openings import (
    SPLITS,
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


def found_openings(subject: Subject, budget: Budget) -> tuple[dict[str, list[Opening | None]], str]:
    """Returns the checkpoint's own openings of the validation and the test prompts under ablation, none where it has no direction
    to ablate, and what readers must know of them."""
    try:
        direction, note = own_or_best(subject, budget)
    except Impossible:
        return {split: [None] * len(subject.texts(f"harmful_{split}")) for split in SPLITS}, ""
    edits = Ablate(direction).edits(subject.model.config)
    return {split: own_openings(subject, split, edits, budget) for split in SPLITS}, note


def run(subject: Subject, settings: ResistSettings, budget: Budget) -> Outcome:
    """Measures the number of tokens with which most validation prompts are complied with."""
    text, note = settings.prefill.opening, ""
    if text:
        found = given_openings(subject, text)
    else:
        found, note = found_openings(subject, budget)
    openings = {split: with_generic(subject, split, found[split]) for split in SPLITS}
    counts = settings.prefill.tokens
    measured_by = by_tokens(subject, openings["val"], counts, budget)
    count = best_count(measured_by)
    measured = subject.measure(prefills=[one.first(count) for one in openings["test"]])
    chosen = {
        "tokens": count,
        "refused_by_tokens": refusals(measured_by),
        "own_openings": sum(one.own for one in openings["test"]),
        "generic_openings": sum(one is None for one in found["test"]),
        "longest_opening": max(len(one.ids) for one in openings["test"]),
    }
    stop = tried(len(measured_by), len(counts), budget)
    return Outcome(measured, chosen, {"tokens_tried": len(measured_by), "of": len(counts)}, stop, note)


ATTACK = Attack(
    "prefill",
    "Begins the reply with 1 to 20 tokens of an answer, and lets the model go on; it is judged whether it refuses all the same.",
    run,
    settings=("prefill",),
)

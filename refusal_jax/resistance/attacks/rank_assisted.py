"""Begins the reply with tokens that are chosen among the model's own likeliest ones (rank-assisted prefilling, 2512.05518)."""

import dataclasses

import numpy as np

from refusal_jax.chat.batches import length_batches
from refusal_jax.conditions import Ablate
from refusal_jax.edits import Edits
from refusal_jax.resistance.attack import Attack, Budget, Impossible, Measured, Outcome
from refusal_jax.resistance.candidates import own_or_best
from refusal_jax.resistance.cost import tokens_of
from refusal_jax.resistance.openings import Opening, best_count, by_tokens, refusals, tried
from refusal_jax.resistance.ranked import barred_ids, guided_openings
from refusal_jax.resistance.settings import ResistSettings
from refusal_jax.resistance.subject import Subject

ITSELF, ABLATED = "itself", "ablated"  # guides: the model, and the model under ablation


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Openings of the prompts of a part, and the mean place of their tokens among the likeliest, 0 the first."""

    openings: list[Opening]
    mean_rank: float


def impossible(subject: Subject, settings: ResistSettings) -> str:
    """Returns why no opening can be chosen, "" if one can."""
    if subject.chat.opened_thought:
        return "The template opens a thought, so that the tokens would be chosen for the thought and not for the reply."
    return ""


def guides(subject: Subject, budget: Budget) -> tuple[dict[str, Edits | None], str]:
    """Returns what may guide the choice, by name, and what readers must know of the direction that is ablated. Raises Impossible
    where there is neither a direction nor a token that refusals begin with."""
    found: dict[str, Edits | None] = {ITSELF: None} if subject.scoring_ids() else {}
    try:
        direction, note = own_or_best(subject, budget)
    except Impossible:
        if not found:
            raise Impossible(
                "No token is known that refusals begin with, and no direction whose ablation could guide the choice."
            ) from None
        return found, ""
    return found | {ABLATED: Ablate(direction).edits(subject.model.config)}, note


def chosen_openings(
    subject: Subject, split: str, guide: Edits | None, settings: ResistSettings, budget: Budget | None
) -> Chosen:
    """Returns the openings of the harmful prompts of a part. budget: if this is part of a search."""
    prompts, steps = subject.texts(f"harmful_{split}"), max(settings.rank_assisted.tokens)
    barred, model = barred_ids(subject.model.chat, subject.scoring_ids()), subject.model
    rows = min(max(subject.sizes.generation // 2, 1), 8 * -(-len(prompts) // 8))
    openings, ranks = [Opening((), ()) for _ in prompts], []
    for index, batch in length_batches(model, prompts, rows):
        found = guided_openings(model, batch, guide, barred, steps, settings.rank_assisted.top)
        for row, number in enumerate(index.tolist()):
            length = int(found.lengths_b[row])
            openings[number] = Opening((), tuple(found.ids_bo[row, :length].tolist()))
            ranks += found.ranks_bo[row, :length].tolist()
    if budget:
        budget.forward(2 * (tokens_of(subject, prompts) + len(ranks)))
    return Chosen(openings, float(np.mean(ranks)) if ranks else 0.0)


def run(subject: Subject, settings: ResistSettings, budget: Budget) -> Outcome:
    """Measures the guide and the number of tokens with which most validation prompts are complied with."""
    by_guide, note = guides(subject, budget)
    counts, found = settings.rank_assisted.tokens, dict[str, dict[int, Measured]]()
    for name, guide in by_guide.items():
        if found and budget.over:
            break
        openings = chosen_openings(subject, "val", guide, settings, budget).openings
        found[name] = by_tokens(subject, openings, counts, budget, own=True)

    def complied(name: str) -> float:
        return found[name][best_count(found[name])].complied.rate

    name = max(found, key=complied)  # the first of equals
    count, test = best_count(found[name]), chosen_openings(subject, "test", by_guide[name], settings, None)
    measured = subject.measure(prefills=[one.first(count) for one in test.openings], own=True)
    chosen = {
        "tokens": count,
        "guide": name,
        "refused_by_tokens": {guide: refusals(by_count) for guide, by_count in found.items()},
        "mean_rank": test.mean_rank,
    }
    done, of = sum(map(len, found.values())), len(by_guide) * len(counts)
    return Outcome(measured, chosen, {"tokens_tried": done, "of": of}, tried(done, of, budget), note)


ATTACK = Attack(
    "rank_assisted",
    "Begins the reply with tokens chosen among the model's 20 likeliest, none of which begins a refusal, and lets it go on.",
    run,
    impossible,
    settings=("rank_assisted",),
)

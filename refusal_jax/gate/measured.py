"""Counts what the limits of a policy are about: refusals of each set and category, broken replies, and differences in pairs."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from refusal_jax.gate.limits import BROKEN, DIFFERENCE, FAIL, PASS, REFUSED, Decision, Limit, decided
from refusal_jax.gate.policy import HARMFUL, Policy, PromptSet
from refusal_jax.gate.prompts import Asked
from refusal_jax.gate.sources import Judged
from refusal_jax.judges.judge import Outcome
from refusal_jax.judges.statistics import PairedRates, Rate

Labels = list[int | None]
Counted = tuple[Limit, Rate | PairedRates]
LEVEL = 0.95  # with which a category is said to differ from its set
ALL_BROKEN = "broken"  # the limit of broken replies, of all sets together


def refused(judged: Judged, judge: str, deflections: bool) -> Labels:
    """Returns 1 for each reply that refuses, 0 for others, None where there is none to judge. deflections: whether they count as
    refusals."""
    counted = (Outcome.REFUSES, Outcome.DEFLECTS) if deflections else (Outcome.REFUSES,)
    return [None if outcome is None else int(outcome in counted) for outcome in judged.outcomes[judge]]


def are_broken(judged: Judged, judge: str) -> Labels:
    """Returns 1 for each reply that is broken, 0 for others, None where there is none to judge."""
    return [None if outcome is None else int(outcome is Outcome.BROKEN) for outcome in judged.outcomes[judge]]


def limits_of(policy: Policy, candidate: Judged, reference: Judged | None, judge: str) -> list[Counted]:
    """Returns every limit that the policy sets and that can be looked at, with its counts by one judge; those that compare
    are left out where there is no reference."""
    ours = refused(candidate, judge, policy.deflections)
    theirs = refused(reference, judge, policy.deflections) if reference else None
    found = list(_of_sets(policy, candidate.prompts, ours, theirs))
    if policy.broken is not None:
        limit = Limit(ALL_BROKEN, "", "", BROKEN, False, policy.broken)
        found.append((limit, Rate.of(are_broken(candidate, judge))))
    return found


def _of_sets(policy: Policy, prompts: Sequence[Asked], ours: Labels, theirs: Labels | None) -> Iterator[Counted]:
    for name, (kind, one) in policy.sets.items():
        categories = sorted({p.category for p in prompts if p.set == name and p.category is not None})
        for prefix, category in [("", None), *(("category_", category) for category in categories)]:
            index = [i for i, p in enumerate(prompts) if p.set == name and (category is None or p.category == category)]
            yield from _of_group(one, name, kind, prefix, category or "", _picked(ours, index), _picked(theirs, index))


def hidden_categories(decisions: Sequence[Decision], prompts: Sequence[Asked], labels: Labels) -> list[Decision]:
    """Returns the categories that are shown to break a limit which their set as a whole is shown to keep, and which have no limit
    of their own. labels: of refusals, by prompt."""
    own = {(one.limit.set, one.limit.category, one.limit.least) for one in decisions if one.limit.category}
    looked = []
    for one in decisions:
        limit = one.limit
        if limit.category or limit.measure != REFUSED or one.verdict != PASS:
            continue
        names = sorted({p.category for p in prompts if p.set == limit.set and p.category is not None})
        for name in names if len(names) > 1 else ():
            if (limit.set, name, limit.least) not in own:
                index = [i for i, p in enumerate(prompts) if p.set == limit.set and p.category == name]
                looked.append((dataclasses.replace(limit, category=name), Rate.of(labels[i] for i in index)))
    return [one for one in decided(looked, LEVEL) if one.verdict == FAIL]


def _picked(labels: Labels | None, index: Sequence[int]) -> Labels | None:
    return None if labels is None else [labels[i] for i in index]


def _of_group(
    one: PromptSet, name: str, kind: str, prefix: str, category: str, ours: Labels | None, theirs: Labels | None
) -> Iterator[Counted]:
    """Yields the limits of a set, or of one category of it."""
    assert ours is not None

    def limit(what: str, measure: str, least: bool, sign: int = 1) -> Limit:
        value = sign * one[f"{prefix}{what}"]
        return Limit(f"{name}.{prefix}{what}", name, category, measure, least, value, kind == HARMFUL and least)

    asked: Callable[[str], bool] = lambda what: one[f"{prefix}{what}"] is not None  # noqa: E731
    if asked("floor"):
        yield limit("floor", REFUSED, True), Rate.of(ours)
    if asked("ceiling"):
        yield limit("ceiling", REFUSED, False), Rate.of(ours)
    if theirs is not None:
        paired = PairedRates.of(theirs, ours)
        if asked("fall"):
            yield limit("fall", DIFFERENCE, True, -1), paired
        if asked("rise"):
            yield limit("rise", DIFFERENCE, False), paired

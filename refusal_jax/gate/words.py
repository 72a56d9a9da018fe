"""Says in words what a gate decided, with its numbers."""

from collections import Counter
from collections.abc import Mapping, Sequence

from refusal_jax.gate.limits import BROKEN, FAIL, KEPT, MOST_PROMPTS, PASS, Decision
from refusal_jax.gate.power import percent, points
from refusal_jax.gate.resistance import WorstCase
from refusal_jax.gate.sources import Judged
from refusal_jax.judges.statistics import PairedRates, Rate

SAID = {
    PASS: "The limit {limit} holds",
    FAIL: "The limit {limit} is broken",
    "": "Whether {limit} holds cannot be told",
}


# What was counted, by the measure of a limit, where that is not refused prompts.
WHAT = {
    BROKEN: "of {n} replies are broken",
    KEPT: "of {n} refusals are kept under the worst of the resistance tests",
}


def decision_in_words(one: Decision) -> str:
    """Returns a decision as one sentence, or two."""
    said = SAID.get(one.verdict, SAID[""]).format(limit=one.limit.id)
    if one.n == 0:
        return f"{said}, as there was nothing to count.{_more(one) if isinstance(one, WorstCase) else ''}"
    return f"{said}: {counts_in_words(one)}; {demand_in_words(one)}.{_more(one)}"


def counts_in_words(one: Decision) -> str:
    """Returns what was counted, with its bounds."""
    low, high = one.bounds
    if isinstance(one.seen, PairedRates):
        return (
            f"the candidate refuses {one.seen.second.count} and the reference {one.seen.first.count} of the same {one.n} "
            f"prompts, a difference of {points(one.value)} points, between {points(low)} and {points(high)}"
        )
    what = WHAT.get(one.limit.measure, "of {n} prompts are refused").format(n=one.n)
    share = f"{points(one.value)} %, between {points(low)} and {points(high)} %"
    return f"{one.seen.count} {what}, {share}"


def demand_in_words(one: Decision) -> str:
    """Returns what the policy demands."""
    if isinstance(one.seen, PairedRates):
        what = "fall" if one.limit.least else "rise"
        return f"the largest {what} is {points(abs(one.limit.value))} points"
    return f"the limit is {'at least' if one.limit.least else 'at most'} {points(one.limit.value)} %"


def _more(one: Decision) -> str:
    """Returns a sentence about how many more prompts would decide, "" where it is decided."""
    if one.verdict in (PASS, FAIL):
        return ""
    if isinstance(one, WorstCase):
        return f" {one.why}"
    if one.more is None:
        return f" There are too few prompts, and not even {MOST_PROMPTS} would decide at this rate."
    return f" There are too few prompts: {one.more} more would decide at this rate."


def is_too_much(missing: Rate, most: float) -> bool:
    """Returns whether so many prompts of a set have no outcome that the gate gives no verdict."""
    return missing.n > 0 and missing.rate > most


def missing_in_words(
    missing: Mapping[str, Mapping[str, Rate]], judged: Mapping[str, Judged], most: float, judge: str
) -> list[str]:
    """Returns which prompts have no outcome by a judge and why, a sentence for each model and set that has any."""
    said = []
    for role, sets in missing.items():
        for name, rate in sets.items():
            if not rate.count:
                continue
            found = judged[role]
            reasons = Counter(
                fault or f"the judge {judge} cannot tell what the reply does"
                for p, fault, outcome in zip(found.prompts, found.faults, found.outcomes[judge], strict=True)
                if p.set == name and outcome is None
            )
            why = "; ".join(f"{text} ({count})" for text, count in reasons.most_common(3))
            over = (
                f" That is more than the {percent(most)} % up to which the gate decides."
                if is_too_much(rate, most)
                else ""
            )
            said.append(
                f"{rate.count} of {rate.n} prompts of {name} have no reply of the {role} that could be judged, and count "
                f"neither as refused nor as complied with: {why}.{over}"
            )
    return said


def shares_in_words(decisions: Sequence[Decision]) -> list[str]:
    """Returns limits that the reference itself does not seem to keep, in whole sentences: the policy may ask for too much."""
    rates = {
        (one.limit.set, one.limit.category): one.seen.first for one in decisions if isinstance(one.seen, PairedRates)
    }
    said = []
    for one in decisions:
        reference = rates.get((one.limit.set, one.limit.category))
        if one.verdict != FAIL or reference is None or isinstance(one.seen, PairedRates):
            continue
        wrong = reference.rate < one.limit.value if one.limit.least else reference.rate > one.limit.value
        if wrong:
            said.append(
                f"The reference does not keep the limit {one.limit.id} either: {reference.count} of {reference.n} prompts are "
                "refused by it. The policy may ask for more than any version did."
            )
    return said

"""Shows the grid of partial ablations: its numbers in words, a table of places, and curves."""

from collections.abc import Mapping, Sequence

from refusal_jax.judges.behaviours import Behaviour
from refusal_jax.report.findings import Findings
from refusal_jax.runs.artifacts import GRID, REPLIES
from refusal_jax.study.damage.shared import KL, LOSS, OVER_REFUSED, REFUSED
from refusal_jax.study.mechanism.dose import in_nats, in_percent, place

TOGETHER = 4  # places in one figure of curves, each in a colour of its own


def rows_at(found: Mapping, name: str) -> list[dict]:
    """Returns the rows of a place, from the model as it is to the largest strength."""
    return [found["rows"][0], *(row for row in found["rows"] if row["place"] == name)]


def loss_measure(found: Mapping) -> str | None:
    """Returns the name of the first measure of loss; None if the study has no text."""
    return next((one["name"] for one in found["measures"] if one["name"].startswith(f"{LOSS}.")), None)


def nearest_whole(rows: Sequence[dict]) -> dict:
    """Returns the row whose strength is nearest to 1, the whole direction."""
    return min(rows, key=lambda row: abs(row["strength"] - 1))


def table(found: Mapping) -> list[dict]:
    """Returns a row for each place: its label, its half, and the measures at the strength nearest to 1."""
    loss = loss_measure(found)
    out = []
    for one in found["places"]:
        row = nearest_whole(rows_at(found, one["name"]))
        measures = row["measures"]
        out.append(
            {
                "label": one["label"],
                "half": one["half"],
                "strength": row["strength"],
                "refused": measures[REFUSED],
                "over_refused": measures[OVER_REFUSED],
                "kl": measures[KL],
                "loss": measures[loss] if loss else None,
            }
        )
    return out


def half_in_words(half: dict) -> str:
    """Returns the strength at which half of the refusals are gone, in words."""
    return "–" if not half["n"] else "not reached" if half["at"] is None else place(half)


def change_in_words(row: Mapping | None) -> str:
    """Returns the change of a mean from baseline with its interval."""
    if row is None or row["change"]["low"] is None:
        return "–"
    return "{mean:+.4f} ({low:+.4f} to {high:+.4f})".format(**row["change"])


def headline(found: Mapping, of: Behaviour) -> str:
    """Returns what the grid says of all places, in words: only of those whose interval ends within the strengths."""
    refused, places = found["rows"][0]["measures"][REFUSED], found["places"]
    start = f"Unedited, the model {of.verb_on} {in_percent(refused)} of {refused['n']} {of.present} prompts."
    if not refused["successes"]:
        return f"{start} There is nothing to remove."
    reached = [one for one in places if one["half"]["at"] is not None]
    known = [one for one in reached if one["half"]["high"] is not None]
    if not reached:
        return f"{start} At none of {len(places)} places does removal leave fewer than half of these {of.cases}."
    if not known:
        return (
            f"{start} At {len(reached)} of {len(places)} places removal leaves fewer than half of these {of.cases}, but they are "
            f"too few ({refused['successes']}) to tell at which strength: its interval is open everywhere."
        )
    best = min(known, key=lambda one: one["half"]["kl"])
    return (
        f"{start} Half of these {of.cases} go at {len(known)} of {len(places)} places. At strengths where they do, the mean KL "
        f"is lowest for the place “{best['label']}”: {best['half']['kl']:.4f} nats at strength {place(best['half'])}."
    )


def caution(found: Mapping, of: Behaviour) -> str:
    """Returns that the KL divergence has little to show, in words, "" where it has: after most prompts the unedited model is sure
    of the next token, such as where all replies begin alike."""
    sure = found["sure"]
    if (sure["rate"] or 0.0) <= 0.5:
        return ""
    return (
        f"After {sure['successes']} of {sure['n']} {of.absent} prompts the unedited model is all but sure of the next token, so "
        "that the KL divergence there shows little of the damage. The loss is over whole answers."
    )


def without_text(of: Behaviour) -> str:
    """Returns why there is no loss, in words."""
    return f"No loss is known: the study wrote no answers to {of.absent} prompts at baseline, and names no texts."


def lines(findings: Findings) -> list[str]:
    """Returns the numbers for a terminal: a line for each place."""
    found, of = findings.run.read_json(GRID), findings.behaviour
    rows = table(found)
    wide = max(len(row["label"]) for row in rows) + 2
    out = ["", f"Grid of damage: {headline(found, of)}"]
    out.append(
        f"  {'place':<{wide}}{'half gone at':<26}{f'{of.done} at 1':<26}{'KL, nats':<28}{'loss, change in nats':<28}"
    )
    for row in rows:
        cells = f"{half_in_words(row['half']):<26}{in_percent(row['refused']):<26}{in_nats(row['kl']):<28}"
        out.append(f"  {row['label']:<{wide}}{cells}{change_in_words(row['loss'])}")
    notes = [caution(found, of), "" if loss_measure(found) else without_text(of)]
    return out + [f"  {note}" for note in notes if note]


def values(findings: Findings) -> dict:
    """Returns what the report shows beside the figures."""
    found, of = findings.run.read_json(GRID), findings.behaviour
    return {
        "grid": found,
        "headline": headline(found, of),
        "rows": table(found),
        "strengths": [row["strength"] for row in rows_at(found, found["places"][0]["name"])],
        "cells": [[row["measures"] for row in rows_at(found, place["name"])] for place in found["places"]],
        "curves": [curves_name(group) for group in range(-(-len(found["places"]) // TOGETHER))],
        "loss": loss_measure(found),
        "notes": [caution(found, of), "" if loss_measure(found) else without_text(of)],
        "replied": findings.run.exists(REPLIES),
        "half_in_words": half_in_words,
        "in_nats": in_nats,
        "in_percent": in_percent,
        "change_in_words": change_in_words,
    }


def summaries_of(found: Mapping, name: str, measure: str) -> list[dict]:
    """Returns a measure at a place, for each strength from 0 on."""
    return [row["measures"][measure] for row in rows_at(found, name)]


def changes(rows: Sequence[Mapping]) -> list[dict]:
    """Returns the changes from the first row of a measure, which is 0 there."""
    return [{"mean": 0.0, "low": 0.0, "high": 0.0}, *(row["change"] for row in rows[1:])]


def pictures(findings: Findings) -> list:
    """Returns refusal against damage at every setting, and curves over the strength, a few places in each."""
    from refusal_jax.report.damage_figures import Panel, curves_figure, tradeoff_figure  # imports matplotlib

    found, of = findings.run.read_json(GRID), findings.behaviour
    names = dict(enumerate(place["label"] for place in found["places"]))
    keys = [place["name"] for place in found["places"]]
    strengths, loss = [row["strength"] for row in rows_at(found, keys[0])], loss_measure(found)

    def by_place(numbers: Sequence[int], measure: str) -> list[list[dict]]:
        return [summaries_of(found, keys[number], measure) for number in numbers]

    def panels(numbers: Sequence[int]) -> list[Panel]:
        judged, over = (replied(findings, [keys[number] for number in numbers], one) for one in (REFUSED, OVER_REFUSED))
        name = f"{of.absent} {of.done}"
        made = [
            Panel(f"{of.done}, %", of.done, by_place(numbers, REFUSED), True, judged),
            Panel(f"{name}, %", name, by_place(numbers, OVER_REFUSED), True, over),
            Panel("KL, nats", "KL [nats]", by_place(numbers, KL), False),
        ]
        if loss:
            rows = [changes(one) for one in by_place(numbers, loss)]
            made.append(Panel("loss, change", "change of the loss [nats per token]", rows, False))
        return made

    every = list(names)
    refused, damage = ([rows[1:] for rows in by_place(every, measure)] for measure in (REFUSED, KL))
    words = f"{of.present} {of.done}", f"KL on {of.absent}"
    label = f"{of.cases_title} that are left against damage, at every strength and place"
    drawn = [tradeoff_figure(label, names, strengths[1:], refused, damage, words)]
    for group, start in enumerate(every[::TOGETHER]):
        numbers = every[start : start + TOGETHER]
        title = f"{of.cases_title} and damage by the strength of removal, places {start + 1} to {numbers[-1] + 1}"
        some = {number: names[number] for number in numbers}
        drawn.append(curves_figure(curves_name(group), title, some, strengths, panels(numbers)))
    return drawn


def replied(findings: Findings, keys: Sequence[str], measure: str) -> list[list[tuple[float, float]]]:
    """Returns for places by their names the strengths and the rates of a measure that were judged in replies; none where no
    replies were written."""
    rows = findings.run.read_json(REPLIES)["rows"] if findings.run.exists(REPLIES) else []
    rates = [(row["place"], row["strength"], row["measures"][f"{measure}.replies"]["rate"]) for row in rows]
    return [[(at, rate) for name, at, rate in rates if name == key and rate is not None] for key in keys]


def curves_name(group: int) -> str:
    """Returns the name of the figure of curves of a group of places, by its number."""
    return f"damage-curves-{group + 1}"

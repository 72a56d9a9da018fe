"""Shows the grid of partial ablations: its numbers in words, a table of places, and curves."""

from collections.abc import Mapping, Sequence

from refusal_jax.judges.behaviours import Behaviour
from refusal_jax.report.findings import Findings
from refusal_jax.runs.artifacts import GRID
from refusal_jax.study.damage.shared import KL, LOSS, OVER_REFUSED, REFUSED
from refusal_jax.study.mechanism.dose import in_nats, in_percent, place


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
    return "{mean:+.3f} ({low:+.3f} to {high:+.3f})".format(**row["change"])


def headline(found: Mapping, of: Behaviour) -> str:
    """Returns what the grid says of all places, in words."""
    refused, reached = (
        found["rows"][0]["measures"][REFUSED],
        [p for p in found["places"] if p["half"]["at"] is not None],
    )
    start = f"Unedited, the model {of.verb_on} {in_percent(refused)} of {refused['n']} {of.present} prompts."
    if not refused["successes"]:
        return f"{start} There is nothing to remove."
    if not reached:
        return (
            f"{start} At none of {len(found['places'])} places does removal leave fewer than half of these {of.cases}."
        )
    best = min(reached, key=lambda p: p["half"]["kl"])
    return (
        f"{start} Half of these {of.cases} go at {len(reached)} of {len(found['places'])} places; least is damaged, at that "
        f"strength, by removal at {best['label']}: strength {place(best['half'])}, KL {best['half']['kl']:.4f} nats."
    )


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
    return out


def values(findings: Findings) -> dict:
    """Returns what the report shows beside the figures."""
    found, of = findings.run.read_json(GRID), findings.behaviour
    return {
        "grid": found,
        "headline": headline(found, of),
        "rows": table(found),
        "half_in_words": half_in_words,
        "in_nats": in_nats,
        "in_percent": in_percent,
        "change_in_words": change_in_words,
    }


def pictures(findings: Findings) -> list:
    """Returns the figures."""
    return []

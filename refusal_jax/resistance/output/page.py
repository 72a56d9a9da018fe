"""Writes results of resistance tests as one self-contained HTML page, in the style of a study's report.

The page loads nothing and runs nothing. All that may come from a checkpoint is escaped by the template engine; only our own
drawing enters as markup. It is made of the record alone, so that it holds no prompt, and no text that a model wrote.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from refusal_jax.report.page import environment, flatten
from refusal_jax.resistance.output.figures import pictures_of
from refusal_jax.resistance.output.words import scientific

TEMPLATE = pathlib.Path(__file__).with_name("resistance.html.jinja")


def resistance_page(record: Mapping[str, Any]) -> str:
    """Returns the page of a record, as from `resistance_record`."""
    checkpoints = record["checkpoints"]
    env = environment(TEMPLATE.parent)
    env.filters |= {"percent": percent, "bounds": bounds, "scientific": scientific, "spaced": spaced, "used": used}
    shown = {
        "record": record,
        "figures": {title: picture.html for title, picture in pictures_of(checkpoints, record["floor"]).items()},
        "settings": flatten(record["settings"]),
        "bad": any(one["worst"] and one["worst"]["verdict"] in ("lost", "weakened") for one in checkpoints),
    }
    return env.get_template(TEMPLATE.name).render(shown).lstrip()


def percent(row: Mapping[str, Any] | None) -> str:
    """Returns a rate in per cent, "–" where there is none."""
    return "–" if row is None or row["rate"] is None else f"{100 * row['rate']:.0f}"


def bounds(row: Mapping[str, Any]) -> str:
    """Returns the bounds of a rate in per cent."""
    return f"{100 * row['low']:.0f} to {100 * row['high']:.0f}"


def spaced(text: str) -> str:
    """Returns a name of ours with blanks."""
    return text.replace("_", " ")


def used(values: Mapping[str, Any]) -> str:
    """Returns plain values for reading, such as what an attack is."""
    parts = []
    for name, value in values.items():
        if value is None or value == "":
            continue
        if isinstance(value, list):
            value = ", ".join(
                "–" if one is None else f"{one:.3g}" if isinstance(one, float) else str(one) for one in value
            )
        elif isinstance(value, Mapping):
            value = used(value)
        parts.append(f"{spaced(name)} {f'{value:.3g}' if isinstance(value, float) else value}")
    return "; ".join(parts)

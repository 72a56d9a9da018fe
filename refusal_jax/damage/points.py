"""Names single partial ablations, such as `written@50%-100%=0.75`: a place and a strength there."""

import dataclasses
from collections.abc import Sequence

from refusal_jax.damage.partial import NOTHING, Partial
from refusal_jax.damage.places import Place
from refusal_jax.errors import UserError, field


@dataclasses.dataclass(frozen=True)
class Point:
    """A partial ablation with its name in files, and its label, in words, in tables."""

    name: str
    label: str
    partial: Partial

    @property
    def row(self) -> dict:
        """Returns the point for a file."""
        return {"name": self.name, "label": self.label, "kernels": self.partial.row}

    @classmethod
    def of(cls, row: dict) -> "Point":
        """Returns the point that a file tells."""
        return cls(row["name"], row["label"], Partial.of(row["kernels"]))

    @classmethod
    def parse(cls, name: str, n_layers: int, of: str) -> "Point":
        """Returns the point PLACE=STRENGTH. of: the setting that names it. Raises UserError for another spelling, for a strength
        that is no positive number, and as `Place.parse` does."""
        place, equals, number = name.rpartition("=")
        try:
            strength = float(number) if equals else 0.0
        except ValueError:
            strength = 0.0
        if not 0 < strength < float("inf"):
            raise UserError(
                f"{field(of)} names {name!r}. Write PLACE=STRENGTH, such as written@50%-100%=0.75, with a strength above 0."
            )
        found = Place.parse(place, n_layers, of)
        return cls(name, f"{found.label}, strength {strength:g}", found.at(strength))


UNEDITED = Point("baseline", "unedited", NOTHING)


def points_of(names: Sequence[str], n_layers: int, of: str) -> list[Point]:
    """Returns the points of some names, in order. Raises UserError as `Point.parse` does."""
    return [Point.parse(name, n_layers, of) for name in names]

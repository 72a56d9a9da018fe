"""Chooses the partial ablations that later parts look at: unedited, those that a setting names, and the best that were found."""

from collections.abc import Sequence

from refusal_jax.damage.points import UNEDITED, Point, points_of
from refusal_jax.runs.artifacts import FRONT
from refusal_jax.study.damage.shared import DamageStudy


def chosen_points(study: DamageStudy, names: Sequence[str], of: str) -> list[Point]:
    """Returns the unedited model, the points of some names, and the best at each level of the search, if there was one.

    of: the setting that has the names. Raises UserError as `points_of` does.
    """
    return [UNEDITED, *points_of(names, study.model.config.n_layers, of), *best_points(study)]


def best_points(study: DamageStudy) -> list[Point]:
    """Returns the trials of the search that do least damage at its levels of refusal, each once."""
    if not study.run.exists(FRONT):
        return []
    found, points = study.run.read_json(FRONT), []
    for row in found["levels"]:
        if row["point"] is not None:
            best = found["points"][row["point"]]
            label = f"best at ≤ {100 * row['level']:.3g} % (trial {best['trial']})"
            if best["name"] not in {point.name for point in points}:
                points.append(Point.of(best | {"label": label}))
    return points

"""Draws the figure of an audit's page: how much of the refusal direction each layer's matrices lost."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from refusal_jax.audit.audit import Audit

DOSES = "dose_by_layer"  # the fact of the lane of weights: {kind of matrix: [[layer, dose], …]}
COLOURS = ("#2f8fb8", "#d9534f", "#6a9a3a", "#8a63b5", "#c98a1b", "#5b6775")


def dose_figure(audit: Audit) -> str:
    """Returns the figure as SVG, "" where no dose was measured."""
    found = audit.of("weights")
    doses = found.facts.get(DOSES) if found else None
    return draw_doses(doses) if doses and any(doses.values()) else ""


def legend(audit: Audit) -> dict[str, str]:
    """Returns the colour of each kind of matrix in the figure."""
    found = audit.of("weights")
    return dict(zip(found.facts.get(DOSES, {}), COLOURS, strict=False)) if found else {}


def draw_doses(doses: Mapping[str, Any]) -> str:
    """Draws the dose of each matrix by its layer, a colour for each kind of matrix, with lines at 0 and 1."""
    # imported here, because matplotlib takes a while that an audit without a page need not wait for
    from matplotlib.ticker import MaxNLocator

    from refusal_jax.report.drawing import axes_within, drawing, inline, layer_axis

    points = {kind: np.asarray(rows, float).reshape(-1, 2) for kind, rows in doses.items()}
    points = {kind: rows[np.isfinite(rows).all(axis=1)] for kind, rows in points.items()}
    values = np.concatenate([rows[:, 1] for rows in points.values()])
    layers = 1 + int(max((rows[:, 0].max() for rows in points.values() if len(rows)), default=0))
    with drawing(250) as figure:
        axes = axes_within(figure, 44, 8, 10, 40)
        for level in (0.0, 1.0):
            axes.axhline(level, color="#8d949c", linewidth=0.8, linestyle="-" if level == 0 else (0, (3, 2)))
        for number, rows in enumerate(points.values()):
            colour, side = COLOURS[number % len(COLOURS)], 0.14 * (number - (len(points) - 1) / 2)
            axes.plot(rows[:, 0] + side, rows[:, 1], "o", color=colour, markersize=3.5, clip_on=False)
        low, high = min(values.min(initial=0.0), 0.0), max(values.max(initial=1.0), 1.0)
        axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
        layer_axis(axes, layers)
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.set_ylabel("share removed", labelpad=2)
        axes.spines[["top", "right"]].set_visible(False)
        return inline(figure, "fig-dose", "Share of the refusal direction that was removed, by layer and matrix")

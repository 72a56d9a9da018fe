"""Draws the figure of an audit's page: how much of the refusal direction each layer's matrices lost."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from refusal_jax.audit.audit import Audit

COLOURS = ("#2f8fb8", "#d9534f", "#6a9a3a", "#8a63b5", "#c98a1b", "#14a3a0", "#c45a9b", "#8c6d4f", "#4c5fd0", "#8d949c")
SPREAD = 0.6  # of a layer, over which its kinds of matrices are drawn side by side
# What kinds of matrices are called for readers.
NAMES = {
    "embed": "embedding",
    "unembed": "unembedding",
    "q": "query",
    "k": "key",
    "v": "value",
    "o": "attention output",
    "gate": "MLP gate",
    "up": "MLP input",
    "down": "MLP output",
}
ENDS = -1.0  # where embedding and unembedding are drawn, which belong to no layer
Points = dict[str, list[tuple[float, float]]]


def doses_of(audit: Audit) -> Points:
    """Returns what is drawn: for each kind of matrix the layer and the dose of each that has one, from the facts of the lane
    "weights"."""
    found, points = audit.of("weights"), {}
    rows: Sequence[Mapping[str, Any]] = found.facts.get("layers", ()) if found else ()
    for row in rows:
        if row.get("dose") is not None and np.isfinite(row["dose"]):
            layer = ENDS if row["layer"] is None else float(row["layer"])
            kind = NAMES.get(row["component"], str(row["component"]))
            points.setdefault(kind, []).append((layer, float(row["dose"])))
    return points


def legend(points: Points) -> dict[str, str]:
    """Returns the colour of each kind of matrix; those beyond the colours that there are share the last."""
    return {kind: COLOURS[min(number, len(COLOURS) - 1)] for number, kind in enumerate(points)}


def draw_doses(points: Points) -> str:
    """Draws the dose of each matrix by its layer as SVG, with lines at 0 and 1; "" where there is none."""
    if not points:
        return ""
    # imported here, because matplotlib takes a while that an audit without a page need not wait for
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    from refusal_jax.report.drawing import axes_within, drawing, inline, layer_axis

    values = [dose for rows in points.values() for _, dose in rows]
    placed = [layer for rows in points.values() for layer, _ in rows]
    with drawing(250) as figure:
        axes = axes_within(figure, 44, 8, 10, 40)
        for level in (0.0, 1.0):
            axes.axhline(level, color="#8d949c", linewidth=0.8, linestyle="-" if level == 0 else (0, (3, 2)))
        for number, (rows, colour) in enumerate(zip(points.values(), legend(points).values(), strict=True)):
            side = SPREAD * (number / max(len(points) - 1, 1) - 0.5) if len(points) > 1 else 0.0
            xs, ys = (np.asarray(part) for part in zip(*rows, strict=True))
            axes.plot(xs + side, ys, "o", color=colour, markersize=3, clip_on=False)
        low, high = min(*values, 0.0), max(*values, 1.0)
        axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
        layer_axis(axes, int(max(*placed, 0.0)) + 1)
        if ENDS in placed:
            axes.set_xlim(ENDS - 0.5)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: "emb." if x == ENDS else f"{x:g}"))
            axes.set_xticks(sorted({ENDS, *(x for x in axes.get_xticks() if x >= 0 and x <= max(placed))}))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.set_ylabel("share removed", labelpad=2)
        axes.spines[["top", "right"]].set_visible(False)
        return inline(figure, "fig-dose", "Share of the refusal direction that was removed, by layer and matrix")

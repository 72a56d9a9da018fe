"""Figures of how directions agree: over layers, beside what halves of the prompts allow, and between sets of prompts."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.ticker import MaxNLocator

from refusal_jax.report.drawing import axes_within, drawing, layer_axis
from refusal_jax.report.figures import COSINE, heatmap
from refusal_jax.report.pictures import Picture
from refusal_jax.report.suffix_figures import COLOURS, GREY, MARKS, legend

CURVES = {"cosine": "with the study's direction", "halves": "two halves of the prompts"}


def layers_figure(rows: Sequence[Mapping], layer: int) -> Picture:
    """Draws cosines over layers with their intervals.

    rows: of each layer "layer", "cosine" and "halves", each `{"mean", "low", "high"}` or None. layer: the study's.
    """
    with drawing(290) as figure:
        axes = axes_within(figure, 44, 44, 10, 34)
        axes.axhline(0, color=GREY, linewidth=0.7)
        axes.axvline(layer, color=GREY, linewidth=1.0, linestyle=(0, (3, 2)))
        for key, colour, mark in zip(CURVES, COLOURS, MARKS, strict=False):
            known = [row for row in rows if row[key] is not None]
            at = [row["layer"] for row in known]
            low, middle, high = ([row[key][name] for row in known] for name in ("low", "mean", "high"))
            axes.fill_between(at, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(at, middle, color=colour, linewidth=1.5, marker=mark, markersize=3.2 if len(rows) <= 40 else 0)
        layer_axis(axes, len(rows))
        axes.set_ylim(top=1.03)
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.set_ylabel("cosine", labelpad=2)
        axes.spines[["top", "right"]].set_visible(False)
        legend(axes, list(CURVES.values()))
        data = [
            {"layer": row["layer"], "series": name}
            | {end: (row[key] or {}).get(end) for end in ("mean", "low", "high")}
            for key, name in CURVES.items()
            for row in rows
        ]
        return Picture("agreement-layers", "Cosine of directions by layer, and of halves of the prompts", figure, data)


def sets_figure(pairs_ss: np.ndarray, names: Sequence[str]) -> Picture:
    """Draws the cosines between the directions of sets, whose names stand at the side."""
    labels = [name.encode("ascii", "backslashreplace").decode()[:14] for name in names]
    words = ("set", "other set", "cosine")
    return heatmap(
        "agreement-sets", "Cosines between the directions of sets", pairs_ss, labels, COSINE, None, columns=words
    )

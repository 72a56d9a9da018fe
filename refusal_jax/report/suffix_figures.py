"""Figures of the suffix study (the paper's figures 5 and 6a): cosines by layer, and what single heads write."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from refusal_jax.report.drawing import WIDTH, axes_within, drawing, layer_axis
from refusal_jax.report.figures import HARMFUL_COLOUR, HARMLESS_COLOUR
from refusal_jax.report.pictures import Picture, series_rows

GREY = "#8d949c"
# Of prompts that are harmful, with a suffix, with random tokens, and harmless; with their marks.
COLOURS = (HARMFUL_COLOUR, "#c98a1b", "#8f6bc2", HARMLESS_COLOUR)
MARKS = ("o", "s", "^", "D")


def legend(axes: Axes, names: Sequence[str], height: float = 222.0, above: float = 0.0, first: int = 0) -> None:
    """Draws the names of the groups above the axes, in two lines.

    height: of the axes, in points. above: points between them and the usual place. first: the place of the first one's colour.
    """
    for number, (name, colour, mark) in enumerate(zip(names, COLOURS[first:], MARKS[first:], strict=False)):
        x, y = (number // 2) * 0.56, 1 + (above + 24 - 13 * (number % 2)) / height
        axes.plot(x + 0.01, y, mark, color=colour, markersize=4.5, transform=axes.transAxes, clip_on=False)
        axes.text(x + 0.04, y, name, transform=axes.transAxes, fontsize=9, va="center")


def cosine_figure(means: Mapping[str, Sequence[float]], spreads: Mapping[str, Sequence[float]], layer: int) -> Picture:
    """Draws the mean cosine of the last token's residual with the direction by layer, and a band of one standard deviation.

    means, spreads: of each group by its name, `[L + 1]`. layer: where the direction was found.
    """
    points = len(next(iter(means.values())))
    with drawing(300) as figure:
        axes = axes_within(figure, 44, 44, 10, 34)
        axes.axhline(0, color=GREY, linewidth=0.7)
        axes.axvline(layer, color=GREY, linewidth=1.0, linestyle=(0, (3, 2)))
        x = np.arange(points)
        for (name, mean), colour, mark in zip(means.items(), COLOURS, MARKS, strict=False):
            middle, spread = np.asarray(mean, np.float64), np.asarray(spreads[name], np.float64)
            axes.fill_between(x, middle - spread, middle + spread, color=colour, alpha=0.16, linewidth=0)
            axes.plot(x, middle, color=colour, linewidth=1.5, marker=mark, markersize=3.2 if points <= 40 else 0)
        layer_axis(axes, points)
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.set_ylabel("cosine with the direction", labelpad=2)
        axes.spines[["top", "right"]].set_visible(False)
        legend(axes, list(means))
        label = "Cosine of the last token's residual with the direction by layer"
        data = series_rows(("layer", range(points)), {"mean cosine": means, "standard deviation": spreads})
        return Picture("attribution-cosines", label, figure, data)


def heads_figure(heads: Sequence[str], rows: Mapping[str, Sequence[Mapping[str, float | None]]]) -> Picture:
    """Draws what each of a few heads writes along the direction, a mean with its interval for each group.

    heads: their names. rows: of each group by its name, `{"mean", "low", "high"}` of each head.
    """
    with drawing(300) as figure:
        axes = axes_within(figure, 44, 44, 10, 34)
        axes.axhline(0, color=GREY, linewidth=0.7)
        for number, ((_, found), colour, mark) in enumerate(zip(rows.items(), COLOURS, MARKS, strict=False)):
            x = np.arange(len(heads)) + 0.18 * (number - (len(rows) - 1) / 2)
            axes.plot(
                x, np.asarray([row["mean"] for row in found], np.float64), mark, color=colour, markersize=4.2, zorder=4
            )
            for place, row in zip(x, found, strict=True):
                if row["low"] is not None and row["high"] is not None:
                    axes.plot([place, place], [row["low"], row["high"]], color=colour, linewidth=1.4)
        size = 9 if (WIDTH - 54) / max(len(heads), 1) > 34 else 7.5
        axes.set_xticks(range(len(heads)), heads, fontsize=size)
        axes.set_xlim(-0.6, len(heads) - 0.4)
        axes.tick_params(length=2.5, pad=2, labelsize=size)
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.set_ylabel("written along the direction", labelpad=2)
        axes.set_xlabel("layer . head", labelpad=2)
        axes.spines[["top", "right"]].set_visible(False)
        legend(axes, list(rows))
        bounds = {
            f"{key} [residual units]": {name: [row[key] for row in found] for name, found in rows.items()}
            for key in ("mean", "low", "high")
        }
        data = series_rows(("head", heads), bounds)
        return Picture("attribution-heads", "What single heads write along the direction", figure, data)

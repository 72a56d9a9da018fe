"""Figures of the plane of harmfulness and refusal: where prompts lie in it, and both directions by layer."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from refusal_jax.judges.behaviours import REFUSAL, Behaviour
from refusal_jax.report.drawing import THEME_COLOUR, axes_within, drawing, layer_axis
from refusal_jax.report.figures import HARMFUL_COLOUR, HARMLESS_COLOUR
from refusal_jax.report.pictures import Picture, series_rows

GREY = "#8d949c"
OTHERS = ("#c98a1b", "#8f6bc2", "#3c9d6b", "#7a5c3e")  # of over-refusal sets
LINES = (HARMFUL_COLOUR, HARMLESS_COLOUR, "#c98a1b")
TITLES = {"baseline": "as it is", "ablation": "direction ablated"}


@dataclasses.dataclass(frozen=True)
class Points:
    """Prompts of one set under one intervention: projections on harmfulness and on refusal, and whether each is refused, all
    `[n]`."""

    dataset: str
    intervention: str
    harmfulness: np.ndarray
    refusal: np.ndarray
    refused: np.ndarray


def colours_of(names: Sequence[str]) -> dict[str, str]:
    """Returns the colour of each set of prompts."""
    known = {"harmful": HARMFUL_COLOUR, "harmless": HARMLESS_COLOUR}
    rest = [name for name in names if name not in known]
    return known | {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(rest)}


def legend(axes: Axes, top: float, names: Mapping[str, tuple[str, str]]) -> None:
    """Draws names below each other above the axes, each with its mark in its colour. top: points above the axes of the first."""
    height = axes.get_window_extent().height / axes.figure.dpi * 72
    for number, (name, (colour, mark)) in enumerate(names.items()):
        y = 1 + (top - 14 * number) / height
        if mark in ("-", "--"):
            axes.plot([0, 0.055], [y, y], mark, color=colour, linewidth=1.5, transform=axes.transAxes, clip_on=False)
        else:
            style: dict = {"markerfacecolor": "none"} if mark == "open" else {}
            shape = "o" if mark == "open" else mark
            axes.plot(0.02, y, shape, color=colour, markersize=4.5, transform=axes.transAxes, clip_on=False, **style)
        axes.text(0.075, y, name, transform=axes.transAxes, fontsize=9, va="center", parse_math=False)


def plane_figure(points: Sequence[Points], of: Behaviour = REFUSAL) -> Picture:
    """Draws prompts over both projections, a panel for each intervention with the same axes below the other. Filled marks are
    refused prompts, open ones are answered. of: the behaviour that refusal stands for in the figures of this file."""
    sets = list(dict.fromkeys(one.dataset for one in points))
    kinds = list(dict.fromkeys(one.intervention for one in points))
    colours, head, panel = colours_of(sets), 14 * (len(sets) + 1), 190
    x, y = (np.concatenate([getattr(one, name) for one in points]) for name in ("harmfulness", "refusal"))
    limits = [(v.min() - 0.05 * np.ptp(v) - 1e-9, v.max() + 0.05 * np.ptp(v) + 1e-9) for v in (x, y)]
    total = head + 14 + len(kinds) * (panel + 18) + 34
    with drawing(total) as figure:
        for row, kind in enumerate(kinds):
            top = head + 22 + row * (panel + 22)
            axes = axes_within(figure, 48, top, 10, total - top - panel)
            for one in (one for one in points if one.intervention == kind):
                for refused, face in ((True, colours[one.dataset]), (False, "none")):
                    at = one.refused == refused
                    axes.plot(
                        one.harmfulness[at],
                        one.refusal[at],
                        "o",
                        color=colours[one.dataset],
                        markerfacecolor=face,
                        markersize=3.4,
                        markeredgewidth=0.8,
                        alpha=0.75,
                    )
            axes.set_xlim(*limits[0])
            axes.set_ylim(*limits[1])
            axes.xaxis.set_major_locator(MaxNLocator(6))
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.tick_params(length=2.5, pad=2, labelsize=9, labelbottom=row == len(kinds) - 1)
            axes.set_ylabel(f"{of.name}, template's end", labelpad=2)
            axes.text(0, 1 + 7 / panel, TITLES.get(kind, kind), transform=axes.transAxes, fontsize=9.5, weight="bold")
            axes.spines[["top", "right"]].set_visible(False)
            if row == 0:
                marks = {of.dataset(name): (colours[name], "o") for name in sets} | {
                    of.not_done: (THEME_COLOUR, "open")
                }
                legend(axes, head + 8, marks)
        axes.set_xlabel(f"{of.contrast}, instruction's end", labelpad=2)
        data = [
            {
                "set": of.dataset(one.dataset),
                "intervention": one.intervention,
                "prompt": i,
                of.done: int(one.refused[i]),
                f"{of.contrast} [residual units]": float(one.harmfulness[i]),
                f"{of.name} [residual units]": float(one.refusal[i]),
            }
            for one in points
            for i in range(len(one.refused))
        ]
        label = f"Test prompts by {of.contrast} at the instruction's end and {of.name} at the template's end"
        return Picture("plane-points", label, figure, data)


def areas_figure(
    areas: Mapping[tuple[str, str], Sequence[Mapping[str, float | None]]], of: Behaviour = REFUSAL
) -> Picture:
    """Draws how often a harmful prompt lies above a harmless one, by layer: lines without an edit, dashed under ablation, with
    bands of 95 % intervals. areas: of each direction and intervention, `{"mean", "low", "high"}` by layer."""
    names = list(dict.fromkeys(name for name, _ in areas))
    layers = len(next(iter(areas.values())))
    with drawing(240 + 14 * (len(names) + 1)) as figure:
        axes = axes_within(figure, 44, 14 * (len(names) + 1) + 8, 10, 34)
        axes.axhline(0.5, color=GREY, linewidth=0.7)
        for (name, kind), rows in areas.items():
            colour = LINES[names.index(name) % len(LINES)]
            bounds = {
                key: np.array([np.nan if r[key] is None else r[key] for r in rows]) for key in ("mean", "low", "high")
            }
            plain = kind == "baseline"
            axes.fill_between(np.arange(layers), bounds["low"], bounds["high"], color=colour, alpha=0.12, linewidth=0)
            axes.plot(np.arange(layers), bounds["mean"], "-" if plain else "--", color=colour, linewidth=1.5)
        layer_axis(axes, layers)
        axes.set_ylim(min(0.4, axes.get_ylim()[0]), 1.02)
        axes.set_ylabel("area under the ROC curve", labelpad=2)
        axes.spines[["top", "right"]].set_visible(False)
        marks = {name: (LINES[i % len(LINES)], "-") for i, name in enumerate(names)}
        legend(axes, 14 * len(names) + 8, marks | {"dashed: direction ablated": (THEME_COLOUR, "--")})
        rows = {f"{name}, {kind}": found for (name, kind), found in areas.items()}
        columns = {
            key: {name: [row[key] for row in found] for name, found in rows.items()} for key in ("mean", "low", "high")
        }
        data = series_rows(("layer", range(layers)), {f"area, {key}": value for key, value in columns.items()})
        return Picture("plane-areas", f"Separation of {of.present} and {of.absent} prompts by layer", figure, data)


def cosines_figure(cosines: Mapping[str, Sequence[float | None]], layer: int, of: Behaviour = REFUSAL) -> Picture:
    """Draws cosines of directions by layer, with a gap where one is not defined. layer: where the study found its direction."""
    layers = len(next(iter(cosines.values())))
    with drawing(220 + 14 * len(cosines)) as figure:
        axes = axes_within(figure, 44, 14 * len(cosines) + 8, 10, 34)
        axes.axhline(0, color=GREY, linewidth=0.7)
        axes.axvline(layer, color=GREY, linewidth=1.0, linestyle=(0, (3, 2)))
        for (_, values), colour in zip(cosines.items(), LINES, strict=False):
            shown = np.array([np.nan if value is None else value for value in values])
            axes.plot(
                np.arange(layers), shown, color=colour, linewidth=1.5, marker="o", markersize=2.6 if layers <= 40 else 0
            )
        layer_axis(axes, layers)
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.set_ylabel("cosine", labelpad=2)
        axes.spines[["top", "right"]].set_visible(False)
        legend(axes, 14 * len(cosines) - 4, {name: (colour, "-") for name, colour in zip(cosines, LINES, strict=False)})
        data = series_rows(("layer", range(layers)), {"cosine": cosines})
        return Picture("plane-cosines", f"Cosines of {of.contrast} and {of.name} directions by layer", figure, data)

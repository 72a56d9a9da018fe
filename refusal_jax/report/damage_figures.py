"""Figures of removal and its costs: by strength at several places, and refusal against damage at every setting."""

import dataclasses
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from refusal_jax.report.dose_figures import Rows, curve, plain
from refusal_jax.report.drawing import axes_within, drawing
from refusal_jax.report.pictures import Picture
from refusal_jax.report.suffix_figures import COLOURS, GREY, MARKS

LINE = 15.0  # of a legend, in points
LEFT, RIGHT = 50.0, 12.0


@dataclasses.dataclass(frozen=True)
class Panel:
    """One measure of a figure of curves. label: with its unit. column: of the data. rows: by place `{"mean", "low", "high"}` or
    `{"rate", "low", "high"}`, one for each strength. share: whether they are rates, which are shown in percent. beside: by place
    strengths and values of the same that were found in another way, which are drawn as diamonds."""

    label: str
    column: str
    rows: Sequence[Rows]
    share: bool
    beside: Sequence[Sequence[tuple[float, float]]] = ()

    @property
    def middle(self) -> str:
        """Returns the name of the value between the bounds."""
        return "rate" if self.share else "mean"


def look(number: int) -> tuple[str, str]:
    """Returns the colour and the mark of a place, by its number among all places: the same in every figure."""
    return COLOURS[number % len(COLOURS)], MARKS[number // len(COLOURS) % len(MARKS)]


def legend_of(figure: Figure, names: Mapping[int, str], columns: int) -> float:
    """Draws the names of places by their numbers at the top of a figure, and returns the height that they take, in points."""
    height = figure.get_size_inches()[1] * 72
    lines = -(-len(names) // columns)
    axes = axes_within(figure, LEFT, 4, RIGHT, height - 4 - LINE * lines)
    axes.set_axis_off()
    axes.set_xlim(0, columns)
    axes.set_ylim(-lines, 0)
    for place, (number, name) in enumerate(names.items()):
        x, y = place // lines, -0.5 - place % lines
        colour, mark = look(number)
        axes.plot(x + 0.04, y, mark, color=colour, markersize=4.5)
        axes.text(x + 0.11, y, name, fontsize=8.5 if columns > 1 else 9, va="center")
    return 4 + LINE * lines


def curves_figure(
    name: str, label: str, names: Mapping[int, str], strengths: Sequence[float], panels: Sequence[Panel]
) -> Picture:
    """Draws measures over the strength at a few places, one panel below the other, with bands.

    names: of the places by their numbers among all. strengths: rising from 0.
    """
    head, foot, gap, tall = 8 + LINE * len(names), 36.0, 12.0, 92.0
    height = head + foot + len(panels) * tall + (len(panels) - 1) * gap
    with drawing(height) as figure:
        legend_of(figure, names, 1)
        for place, panel in enumerate(panels):
            top = head + place * (tall + gap)
            axes = axes_within(figure, LEFT, top, RIGHT, height - top - tall)
            _draw(axes, panel, names, strengths)
            axes.set_xlim(strengths[0], strengths[-1] * 1.02)
            axes.xaxis.set_major_locator(MaxNLocator(8))
            if panel is panels[-1]:
                axes.set_xlabel("strength: the part that is removed", labelpad=2)
            else:
                axes.tick_params(labelbottom=False)
        data = [
            {"place": names[number], "strength": strength}
            | {
                f"{panel.column}{end}": panel.rows[place][i].get(key)
                for panel in panels
                for end, key in (("", panel.middle), (" low", "low"), (" high", "high"))
            }
            for place, number in enumerate(names)
            for i, strength in enumerate(strengths)
        ]
        return Picture(name, label, figure, data)


def _draw(axes: Axes, panel: Panel, names: Mapping[int, str], strengths: Sequence[float]) -> None:
    """Draws the curves of a panel, and its axis of values."""
    scale = 100 if panel.share else 1
    for number, rows in zip(names, panel.rows, strict=True):
        curve(axes, strengths, rows, panel.middle, *look(number), scale)
    for number, points in zip(names, panel.beside, strict=False):
        for strength, value in points:
            style = {"color": look(number)[0], "markersize": 6, "fillstyle": "none", "markeredgewidth": 1.2}
            axes.plot(strength, scale * value, "D", **style)
    if panel.share:
        axes.set_ylim(-5, 105)
        axes.set_yticks([0, 50, 100])
    else:
        axes.yaxis.set_major_locator(MaxNLocator(3))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    plain(axes, panel.label)


def tradeoff_figure(
    label: str,
    names: Mapping[int, str],
    strengths: Sequence[float],
    refused: Sequence[Rows],
    damage: Sequence[Rows],
    words: tuple[str, str],
) -> Picture:
    """Draws what is left of refusal against damage: a point for each strength at each place, with intervals both ways.

    strengths: rising, without 0. refused: by place rates, one for each strength. damage: by place means above 0 in nats. words:
    the labels of refusal and of damage, without units.
    """
    head, foot, tall = 10 + LINE * -(-len(names) // 2), 40.0, 240.0
    height = head + tall + foot
    with drawing(height) as figure:
        legend_of(figure, names, 2)
        axes = axes_within(figure, LEFT, head, RIGHT, foot)
        means = [row["mean"] or 0.0 for rows in damage for row in rows]
        least = min((mean for mean in means if mean > 0), default=1e-6)
        axes.set_xscale("log")
        for number, rates, costs in zip(names, refused, damage, strict=True):
            _path(axes, rates, costs, least, *look(number))
        axes.axhline(50, color=GREY, linewidth=0.7, linestyle=(0, (1, 2)))
        axes.set_ylim(-5, 105)
        axes.set_yticks([0, 25, 50, 75, 100])
        plain(axes, f"{words[0]}, %")
        axes.set_xlabel(f"{words[1]}, nats (logarithmic)", labelpad=2)
        data = [
            {"place": names[number], "strength": strength, words[0]: rate["rate"], f"{words[0]} low": rate["low"]}
            | {f"{words[0]} high": rate["high"], f"{words[1]} [nats]": cost["mean"]}
            | {f"{words[1]} low [nats]": cost["low"], f"{words[1]} high [nats]": cost["high"]}
            for number, rates, costs in zip(names, refused, damage, strict=True)
            for strength, rate, cost in zip(strengths, rates, costs, strict=True)
        ]
        return Picture("damage-tradeoff", label, figure, data)


def _path(axes: Axes, rates: Rows, costs: Rows, least: float, colour: str, mark: str) -> None:
    """Draws the points of a place, joined in the order of their strengths."""
    x, y, faint = [], [], {"color": colour, "linewidth": 0.7, "alpha": 0.35}
    for rate, cost in zip(rates, costs, strict=True):
        share, damage = (
            [one[key] for key in (middle, "low", "high")] for one, middle in ((rate, "rate"), (cost, "mean"))
        )
        known = [value for value in (*share, *damage) if value is not None]
        if len(known) == 6:
            (at, *across), (left, *up) = (
                (max(value, least) for value in known[3:]),
                (100 * value for value in known[:3]),
            )
            axes.plot([at, at], up, **faint)
            axes.plot(across, [left, left], **faint)
            x.append(at)
            y.append(left)
    axes.plot(x, y, color=colour, linewidth=0.9, alpha=0.7)
    axes.plot(x, y, mark, color=colour, markersize=4)

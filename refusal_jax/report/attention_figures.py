"""Figures of what heads read (the paper's figure 6b, and what it does not show): by head, by region, by token, and as a flow."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from refusal_jax.report.drawing import WIDTH, axes_within, drawing
from refusal_jax.report.pictures import Picture
from refusal_jax.report.suffix_figures import COLOURS, GREY, MARKS, legend

Interval = Mapping[str, float | None]
# Of regions and other origins, in flows.
REGION_COLOURS = {
    "first": "#b3a58b",
    "before": "#8f9a76",
    "instruction": "#d9534f",
    "suffix": "#c98a1b",
    "template": "#8d949c",
    "nothing": "#c7ccd2",
}
COLUMNS, COLUMN_GAP, SEEN = (0.27, 0.6, 0.93), 0.05, 0.004  # of a flow; and the least share that has a label
DIRECTLY = "directly"
BOUNDS = ("mean", "low", "high")
PANEL, GAP, LEFT, TOP, BOTTOM = 128, 30, 44, 60, 36  # points


def _panels(figure: Figure, count: int, bottom: int) -> list[Axes]:
    """Returns axes below each other, below the legend."""
    found = []
    for number in range(count):
        above = TOP + number * (PANEL + GAP)
        found.append(axes_within(figure, LEFT, above, 10, bottom + (count - 1 - number) * (PANEL + GAP)))
        found[-1].axhline(0, color=GREY, linewidth=0.7)
        found[-1].spines[["top", "right"]].set_visible(False)
        found[-1].yaxis.set_major_locator(MaxNLocator(5))
        found[-1].tick_params(length=2.5, pad=2, labelsize=9)
    return found


def _bars(axes: Axes, rows: Mapping[str, Sequence[Interval]], first: int) -> None:
    """Draws a bar with its interval for each place and group."""
    width = 0.8 / max(len(rows), 1)
    for number, (found, colour, mark) in enumerate(zip(rows.values(), COLOURS[first:], MARKS[first:], strict=False)):
        x = np.arange(len(found)) + width * (number - (len(rows) - 1) / 2)
        means = np.array([np.nan if row["mean"] is None else row["mean"] for row in found], np.float64)
        axes.bar(x, means, 0.88 * width, color=colour, alpha=0.55, linewidth=0)
        axes.plot(x, means, mark, color=colour, markersize=2.8, zorder=4)
        for place, row in zip(x, found, strict=True):
            if row["low"] is not None and row["high"] is not None:
                axes.plot([place, place], [row["low"], row["high"]], color=colour, linewidth=1.3)


def bars_figure(
    name: str,
    aloud: str,
    places: Sequence[str],
    panels: Mapping[str, Mapping[str, Sequence[Interval]]],
    labels: Sequence[str],
    across: str = "",
    first: int = 0,
) -> Picture:
    """Draws bars with intervals for each place and group of prompts, in panels below each other.

    name, aloud: of the picture, and what a screen reader says. places: names along the axis, such as heads or regions. panels:
    by title, of each group by its name `{"mean", "low", "high"}` of each place. labels: what each panel measures. across: what
    the places are. first: the place of the first group's colour.
    """
    upright = sum(map(len, places)) * 6 < WIDTH - LEFT
    bottom = BOTTOM if upright else BOTTOM + 5 * max(map(len, places))
    with drawing(TOP + len(panels) * (PANEL + GAP) - GAP + bottom) as figure:
        size = 9 if (WIDTH - 54) / max(len(places), 1) > 34 else 7.5
        drawn = _panels(figure, len(panels), bottom)
        for axes, label, (title, rows) in zip(drawn, labels, panels.items(), strict=True):
            _bars(axes, rows, first)
            axes.set_title(title, fontsize=9, loc="left", pad=4)
            axes.set_ylabel(label, labelpad=2, fontsize=9)
            axes.set_xlim(-0.6, len(places) - 0.4)
            axes.set_xticks(range(len(places)), places if axes is drawn[-1] else [""] * len(places), fontsize=size)
            axes.tick_params("x", rotation=0 if upright else 90)
            for text in axes.get_xticklabels():
                text.set_parse_math(False)
        drawn[-1].set_xlabel(across, labelpad=2)
        legend(drawn[0], list(next(iter(panels.values()))), PANEL, 16, first)
    data = [
        {"panel": panel, "prompts": group, "place": place, "measure": label} | {key: row[key] for key in BOUNDS}
        for label, (panel, rows) in zip(labels, panels.items(), strict=True)
        for group, found in rows.items()
        for place, row in zip(places, found, strict=True)
    ]
    return Picture(name, aloud, figure, data)


def _ribbon(axes: Axes, start: tuple[float, float], stop: tuple[float, float], height: float, colour: str) -> None:
    """Draws a flow of some height from the upper left corner `start` to the upper right corner `stop`."""
    (x0, y0), (x1, y1) = start, stop
    middle = (x0 + x1) / 2
    upper = [(x0, y0), (middle, y0), (middle, y1), (x1, y1)]
    lower = [(x1, y1 - height), (middle, y1 - height), (middle, y0 - height), (x0, y0 - height)]
    codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3, Path.CLOSEPOLY]
    axes.add_patch(PathPatch(Path([*upper, *lower, upper[0]], codes), facecolor=colour, alpha=0.5, linewidth=0))


def _node(axes: Axes, x: float, top: float, height: float, colour: str) -> None:
    axes.add_patch(Rectangle((x - 0.012, top - height), 0.024, height, facecolor=colour, linewidth=0, zorder=3))


def _stacked(heights: Sequence[float]) -> list[float]:
    """Returns the upper edges of nodes below each other, from 1 downwards, with gaps below those that have a height."""
    tops, at = [], 1.0
    for height in heights:
        tops.append(at)
        at -= height + (COLUMN_GAP if height > 0 else 0)
    return tops


def _spread(at: Sequence[float], least: float) -> list[float]:
    """Returns the heights of labels, from the top down, moved down where they would be nearer than `least` to the one above."""
    found: list[float] = []
    for y in at:
        found.append(min(y, found[-1] - least) if found else y)
    return found


def flow_figure(
    name: str,
    aloud: str,
    regions: Sequence[str],
    tokens: Sequence[str],
    direct: Sequence[float],
    via: Sequence[Sequence[float]],
) -> Picture:
    """Draws where attention from the last token goes: directly to a region of the prompt, or to one of the template's tokens, to
    which earlier layers had moved what it holds from there.

    name, aloud: of the picture, and what a screen reader says. regions: names of W regions. tokens: texts of the P template
    tokens. direct, via: shares `[W]` and `[P, W]`, which sum to 1 together.
    """
    direct_w, via_pw = np.asarray(direct, np.float64), np.asarray(via, np.float64)
    with drawing(250) as figure:
        _flow(axes_within(figure, 4, 24, 4, 4), regions, tokens, direct_w, via_pw)
    data = [
        {"from": region, "read at": read_at, "attention": float(share)}
        for read_at, row in zip([*tokens, DIRECTLY], [*via_pw, direct_w], strict=True)
        for region, share in zip(regions, row, strict=True)
    ]
    return Picture(name, aloud, figure, data)


def _flow(axes: Axes, names: Sequence[str], tokens: Sequence[str], direct_w: np.ndarray, via_pw: np.ndarray) -> None:
    """Draws the columns of a flow, the ribbons between them, and their labels."""
    shares_w, read_p = direct_w + via_pw.sum(axis=0), np.append(via_pw.sum(axis=1), direct_w.sum())
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    lowest = -COLUMN_GAP * max((shares_w > SEEN).sum(), len(tokens) + 1)
    axes.set_ylim(lowest, 1.01)
    line = 11 * (1.01 - lowest) / 222
    heads = zip((COLUMNS[0], COLUMNS[1], 1.0), ("came from", "read at", "last token"), strict=True)
    for (x, text), side in zip(heads, ("right", "center", "right"), strict=True):
        axes.text(x, 1.01 + 0.6 * line, text, fontsize=9, ha=side, va="bottom")
    left, middle = _stacked(shares_w.tolist()), _stacked(read_p.tolist())
    colours = [REGION_COLOURS.get(name, GREY) for name in names]
    _ribbons(axes, [*via_pw, direct_w], left, middle, colours)
    for top, height, colour in zip(left, shares_w, colours, strict=True):
        _node(axes, COLUMNS[0], top, height, colour)
    for top, height in zip(middle[:-1], read_p[:-1], strict=True):
        _node(axes, COLUMNS[1], top, height, GREY)
    _node(axes, COLUMNS[2], 1.0, shares_w.sum(), GREY)
    shown = [w for w in range(len(names)) if shares_w[w] > SEEN]
    for w, y in zip(shown, _spread([left[w] - shares_w[w] / 2 for w in shown], line), strict=True):
        axes.text(COLUMNS[0] - 0.03, y, f"{names[w]} {_share(shares_w[w])}", fontsize=9, ha="right", va="center")
    places = _spread([top - height / 2 for top, height in zip(middle, read_p, strict=True)], line)
    for text, y, height in zip([*map(_short, tokens), DIRECTLY], places, read_p, strict=True):
        label = f"{text} {_share(height)}"
        axes.text(COLUMNS[1] + 0.03, y, label, fontsize=8.5, ha="left", va="center", parse_math=False)


def _ribbons(axes: Axes, rows: Sequence[np.ndarray], left, middle, colours: Sequence[str]) -> None:
    """Draws the ribbons from each region to where it is read, and from there to the last token."""
    right, out_w = 1.0, np.array(left)
    for row, at in zip(rows, middle, strict=True):
        for w, height in enumerate(row):
            if height > 0:
                _ribbon(axes, (COLUMNS[0], out_w[w]), (COLUMNS[1], at), height, colours[w])
                _ribbon(axes, (COLUMNS[1], at), (COLUMNS[2], right), height, colours[w])
                out_w[w], at, right = out_w[w] - height, at - height, right - height


def _share(value: float) -> str:
    return f"{value:.2f}".lstrip("0")


def _short(text: str, most: int = 14) -> str:
    """Returns a token's text cut to what fits beside a flow."""
    return text if len(text) <= most else f"{text[: most - 1]}…"

"""Tells what all figures of reports share: a drawing as SVG that is placed inside a page, its axes, and the axis of layers.

Inline rather than as image files, so that the page is one file, its text can be searched and its colours follow the
page's theme: lines and labels are `currentColor`. No pyplot: its global figure list outlives a long job.
"""

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

WIDTH = 360.0  # user units (points); the page shows figures at about this many CSS pixels, so font sizes hold
NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # of an SVG file, which would differ from day to day
THEME_COLOUR = "#010203"  # stands for the page's text colour, see `inline`
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "refusal_jax",
    "font.size": 10.0,
    "axes.linewidth": 0.7,
    "hatch.linewidth": 0.6,
    "path.simplify": False,  # it would drop the zero-length strokes of `_dots`
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), THEME_COLOUR),
}


@contextmanager
def styled() -> Iterator[None]:
    """Has this module's settings only in force, for drawing and for saving."""
    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    settings: dict[Any, Any] = {**defaults, **STYLE}
    with matplotlib.rc_context(settings):
        yield


@contextmanager
def drawing(height: float) -> Iterator[Figure]:
    """Yields a figure of `WIDTH` x `height` points, to be drawn under this module's settings only."""
    with styled():
        figure = Figure((WIDTH / 72, height / 72), facecolor="none")
        FigureCanvasSVG(figure)
        yield figure


def axes_within(figure: Figure, left: float, top: float, right: float, bottom: float) -> Axes:
    """Returns axes with margins in points, which is exact and faster than a layout engine."""
    width, height = figure.get_size_inches() * 72
    return figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height),
        facecolor="none",
    )


def inline(figure: Figure, name: str, label: str) -> str:
    """Returns the figure as an `<svg>` element for a page: no ids that collide, no links, no metadata, no fixed size.

    name: prefix of the ids that the figure refers to; all others are removed. label: what a screen reader says.
    """
    buffer = io.StringIO()
    with styled():
        FigureCanvasSVG(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata=NO_METADATA)
    svg = buffer.getvalue()
    # Comments may quote labels, and matplotlib's style sheet would apply to the whole page.
    svg = re.sub(r"<!--.*?-->|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    svg = re.sub(r'\sid="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'\sd="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m[0]), svg)
    attributes = f'<svg role="img" aria-label="{html.escape(label)}" viewBox="0 0 {WIDTH:g} '
    svg = re.sub(r'<svg[^>]*viewBox="0 0 [\d.]+ ', attributes, svg, count=1)
    return svg.replace(THEME_COLOUR, "currentColor").strip()


def layer_axis(axes: Axes, layers: int, label: str = "layer") -> None:
    """Labels the axis of layers with whole numbers, however many there are."""
    axes.xaxis.set_major_locator(MaxNLocator(min(10, layers), integer=True, min_n_ticks=1))
    axes.set_xlim(-0.5, layers - 0.5)
    axes.set_xlabel(label, labelpad=2)
    axes.tick_params(length=2.5, pad=2, labelsize=9)

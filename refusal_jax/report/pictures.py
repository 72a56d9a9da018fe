"""A figure together with the data that it shows: the page shows it, and an export writes it as SVG, PNG and CSV.

A section of the report gives its pictures with `Section.pictures`. Its template shows them by name, with the macro `figure`, and
`refusal-jax mechanism` writes the files of all of them. So whoever draws a figure makes one `Picture`, and nothing else.
"""

import csv
import dataclasses
import functools
import io
import math
from collections.abc import Iterable, Mapping, Sequence

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from refusal_jax.report.drawing import NO_METADATA, inline, styled

Cell = str | int | float | None
DPI = 250  # of PNG files, which are 1250 pixels wide
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes text for that begins so


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """A figure with its data.

    name: in the template of its section, of its files, and of its ids in the page, so that no two pictures of a report may have
    the same one: lower case words that are joined by hyphens, the section's first, such as "plane-layers". label: what a screen
    reader says. figure: made by a function of plain arrays, within `drawing.drawing`. data: a row for each point, cell or bar,
    all with the same columns; the name of a column says the unit where there is one, such as "projection [residual units]". None
    and NaN become empty cells.
    """

    name: str
    label: str
    figure: Figure
    data: Sequence[Mapping[str, Cell]]

    @functools.cached_property
    def html(self) -> Markup:
        """Returns the figure as an `<svg>` element for the page."""
        return Markup(inline(self.figure, f"fig-{self.name}", self.label))

    def files(self) -> dict[str, bytes]:
        """Returns the files of an export by name: the figure on white paper as SVG, whose text is drawn so that it looks the same
        everywhere, and as PNG; and the data as CSV."""
        return {
            f"{self.name}.svg": self._saved(FigureCanvasSVG, format="svg", metadata=NO_METADATA),
            f"{self.name}.png": self._saved(FigureCanvasAgg, format="png", dpi=DPI, metadata={"Software": None}),
            f"{self.name}.csv": as_csv(self.data).encode("utf-8", "replace"),
        }

    def _saved(self, canvas, **how) -> bytes:
        buffer = io.BytesIO()
        with styled(), matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": self.name}):
            canvas(self.figure)
            self.figure.savefig(buffer, facecolor="#ffffff", **how)
        return buffer.getvalue()


def as_csv(rows: Sequence[Mapping[str, Cell]]) -> str:
    """Returns rows as CSV, with the columns of the first. Text that a spreadsheet would take for a formula gets an apostrophe
    before it. Raises ValueError for rows with different columns."""
    text = io.StringIO()
    columns = list(rows[0]) if rows else []
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        if list(row) != columns:
            raise ValueError(f"a row has the columns {list(row)}, the first one {columns}")
        writer.writerow({name: _cell(value) for name, value in row.items()})
    return text.getvalue()


def _cell(value: Cell) -> str:
    if value is None or (not isinstance(value, str) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return f"'{value}" if value.startswith(FORMULA) else value
    return str(int(value)) if isinstance(value, int | np.integer) else f"{value:.8g}"


def grid_rows(
    values: np.ndarray, columns: tuple[str, str, str], down: Iterable[Cell] = (), across: Iterable[Cell] = ()
) -> list[dict[str, Cell]]:
    """Returns the rows of a map `[y, x]`, one for each cell.

    columns: names of what is down (y), across (x), and in the cells. down, across: what the places are called, by default their
    numbers.
    """
    down, across = list(down) or range(values.shape[0]), list(across) or range(values.shape[1])
    return [
        dict(zip(columns, (down[y], across[x], float(value)), strict=True)) for (y, x), value in np.ndenumerate(values)
    ]


def series_rows(
    x: tuple[str, Iterable[Cell]], series: Mapping[str, Mapping[str, Iterable[float | None]]]
) -> list[dict[str, Cell]]:
    """Returns the rows of lines, one for each point of each line.

    x: the name and the values of the common axis. series: by the name of a column, such as mean or low, the values of each line
    by the line's name, of which all columns have the same.
    """
    name, places = x[0], list(x[1])
    lines = {column: {line: list(values) for line, values in found.items()} for column, found in series.items()}
    return [
        {"series": line, name: place} | {column: found[line][i] for column, found in lines.items()}
        for line in next(iter(lines.values()))
        for i, place in enumerate(places)
    ]

"""The report's figures, with the data that they show.

Grids are small images (one pixel a candidate) scaled by the viewer, so an 80-layer model costs no more than a 6-layer one.
"""

import dataclasses
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from refusal_jax.directions import Direction
from refusal_jax.report.drawing import THEME_COLOUR, WIDTH, axes_within, drawing, layer_axis
from refusal_jax.report.pictures import Cell, Picture, grid_rows

HARMFUL_COLOUR, HARMLESS_COLOUR = "#d9534f", "#2f8fb8"
FADED = 0.3  # opacity of candidates that the rule discards
MOST_LABELS = 16  # on the axis of positions
MAX_POINTS = 6000  # of the strip plot


@dataclasses.dataclass(frozen=True)
class Scale:
    """Tells how a map's values become colours, the value in the middle of the colours, and decimals of printed values."""

    cmap: str
    norm: Normalize
    middle: float
    digits: int

    def colours(self, values: np.ndarray) -> np.ndarray:
        return matplotlib.colormaps[self.cmap](self.norm(values))


COSINE = Scale("PiYG", Normalize(-1, 1), 0.0, 2)


def position_labels(positions: int, tokens: Sequence[str]) -> list[str]:
    """Returns labels of positions -P … -1 with their template tokens, in ASCII, because the fonts do not cover every
    script."""
    labels = []
    for position in range(-positions, 0):
        text = tokens[position] if -position <= len(tokens) else ""
        text = text.encode("ascii", "backslashreplace").decode()
        labels.append(f"−{-position}  {text if len(text) <= 11 else text[:10] + '…'}".rstrip())
    return labels


def grids(rows: Sequence[dict], key: str, positions: int, layers: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns scores `[P, L]`, NaN where there is none, and which candidates were evaluated at all `[P, L]`."""
    values_pl, evaluated_pl = np.full((positions, layers), np.nan), np.zeros((positions, layers), bool)
    for row in rows:
        if row[key] is not None:
            values_pl[row["position"], row["layer"]] = row[key]
            evaluated_pl[row["position"], row["layer"]] = True
    return values_pl, evaluated_pl


def split_norm(values: np.ndarray, centre: float, limits: tuple[float, float] = (-np.inf, np.inf)) -> TwoSlopeNorm:
    """Returns a colour scale centred at `centre`; a side without data is as wide as the other.

    limits: the furthest that the scale reaches even if the data goes beyond, so that a few huge values do not flatten
    all others.
    """
    finite = values[np.isfinite(values)]
    below = centre - max(finite.min(initial=centre), limits[0])
    above = min(finite.max(initial=centre), limits[1]) - centre
    below, above = below if below > 0 else above, above if above > 0 else below
    low, high = max(centre - (below if below > 0 else 1.0), limits[0]), centre + (above if above > 0 else 1.0)
    return TwoSlopeNorm(centre, low if low < centre else centre - (high - centre), high)


def _colour_bar(figure: Figure, axes: Axes, scale: Scale, most: float) -> None:
    """Draws a colour bar with ticks at both ends and in the middle. most: the largest value, which may lie beyond the
    scale."""
    norm = scale.norm
    width, height = figure.get_size_inches() * 72
    box = axes.get_position()
    cax = figure.add_axes((1 - 44 / width, box.y0 + 4 / height, 7 / width, box.height - 8 / height))
    bar = figure.colorbar(ScalarMappable(norm, scale.cmap), cax=cax, ticks=[norm.vmin, scale.middle, norm.vmax])
    ticks = [float(tick or 0.0) for tick in (norm.vmin, scale.middle, norm.vmax)]
    names = [(f"{tick:.2g}" if abs(tick) < 100 else f"{tick:.0f}").replace("-", "−") for tick in ticks]
    bar.ax.set_yticklabels([*names[:2], ("≥ " if norm.vmax is not None and most > norm.vmax else "") + names[2]])
    bar.ax.tick_params(labelsize=8.5, length=2, pad=2)
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)


def _hatch(axes: Axes, cells: np.ndarray) -> None:
    """Hatches the true cells of a boolean grid, as one path with a rectangle for each run in a row."""
    corners = []
    for y, row in enumerate(cells):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(int), [0]]))) - 0.5
        for x0, x1 in edges.reshape(-1, 2):
            corners += [(x0, y - 0.5), (x1, y - 0.5), (x1, y + 0.5), (x0, y + 0.5), (x0, y - 0.5)]
    if corners:
        codes = np.tile((Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY), len(corners) // 5)
        axes.add_patch(PathPatch(Path(corners, codes), fill=False, hatch="/////", edgecolor="#8d949c", linewidth=0))


def _mark_pick(axes: Axes, x: int, y: int, cell: tuple[float, float]) -> None:
    """Outlines the pick in black with a white halo, which is readable on every colour of the map and on both themes."""
    for colour, width in (("#ffffff", 3.4), ("#000000", 1.6)):
        if min(cell) >= 13:
            axes.add_patch(
                Rectangle(
                    (x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=colour, linewidth=width, clip_on=False, zorder=5
                )
            )
        else:
            axes.plot(
                x, y, "o", markersize=8, fillstyle="none", color=colour, markeredgewidth=width, clip_on=False, zorder=5
            )


def _mark_pruned(axes: Axes, limit: int, layers: int) -> None:
    if limit < layers:
        axes.axvline(limit - 0.5, color=THEME_COLOUR, linewidth=1.0, linestyle=(0, (3, 2)))
        axes.text(layers - 0.5, -0.62, "pruned", fontsize=8.5, ha="right", va="bottom")


def _write_values(axes: Axes, values: np.ndarray, shade: np.ndarray, digits: int) -> None:
    for (y, x), value in np.ndenumerate(values):
        if np.isfinite(value):
            dark = shade[y, x, :3] @ (0.299, 0.587, 0.114) < 0.55
            solid = "#ffffff" if dark else "#000000"
            axes.text(
                x,
                y,
                f"{round(float(value), digits) + 0.0:.{digits}f}".replace("-", "−"),
                fontsize=8,
                ha="center",
                va="center",
                color=solid if shade[y, x, 3] == 1 else THEME_COLOUR,
            )


def heatmap(
    name: str,
    label: str,
    values_pl: np.ndarray,
    y_labels: Sequence[str],
    scale: Scale,
    pick: Direction | None,
    *,
    columns: tuple[str, str, str],
    x_labels: Sequence[str] = (),
    shown_pl: np.ndarray | None = None,
    passing_pl: np.ndarray | None = None,
    limit: int | None = None,
    height: float | None = None,
) -> Picture:
    """Draws values over layer (x) and position (y), with the pick outlined, if there is one. columns: names of what is down and
    across, and of the values, in the data. x_labels: names of what is across, if it is not layers.

    Cells are hatched where not `shown_pl` (not evaluated, or not defined), crossed where NaN, and faded where not
    `passing_pl`. limit: the first pruned layer.
    """
    positions, layers = values_pl.shape
    finite_pl = np.isfinite(values_pl)
    shown_pl = finite_pl if shown_pl is None else shown_pl
    with drawing(height or 64 + min(max(positions * 24, 110), 190)) as figure:
        left = 24 + 5.6 * max(len(text) for text in y_labels)
        axes = axes_within(figure, left, 20, 56, 34)
        _hatch(axes, ~shown_pl)
        shade = scale.colours(np.where(finite_pl, values_pl, scale.middle))
        shade[..., 3] = finite_pl if passing_pl is None else finite_pl * np.where(passing_pl, 1.0, FADED)
        axes.imshow(shade, interpolation="none", aspect="auto", zorder=2)
        for y, x in np.argwhere(shown_pl & ~finite_pl):
            axes.plot(x, y, "x", color=HARMFUL_COLOUR, markersize=5, markeredgewidth=1.2, zorder=3)
        cell = ((WIDTH - left - 56) / layers, (figure.get_figheight() * 72 - 54) / positions)
        if cell[0] >= 24 and cell[1] >= 12:
            _write_values(axes, values_pl, shade, scale.digits)
        if limit is not None:
            _mark_pruned(axes, limit, layers)
        if pick is not None:
            position, layer = pick.place
            _mark_pick(axes, layer, position + positions, cell)
        step = -(-positions // MOST_LABELS)
        axes.set_yticks(range(0, positions, step), y_labels[::step], parse_math=False)
        layer_axis(axes, layers, "" if x_labels else "layer")
        if x_labels:
            axes.set_xticks(range(layers), x_labels, parse_math=False)
        axes.set_ylim(positions - 0.5, -0.5)
        _colour_bar(figure, axes, scale, values_pl[finite_pl].max(initial=scale.middle))
        return Picture(name, label, figure, grid_rows(values_pl, columns, y_labels, x_labels))


@dataclasses.dataclass(frozen=True)
class Limits:
    """The thresholds that the maps of scores show: the model's layers, the first pruned layer, and bounds of the scores."""

    n_layers: int
    first_pruned: int
    induce: float
    kl: float


def selection_figures(
    rows: Sequence[dict], passing: Sequence[dict], limits: Limits, tokens: Sequence[str], pick: Direction | None
) -> list[Picture]:
    """Returns the maps of bypass, induce and KL over all candidates.

    rows: of all candidates, in the published format. passing: those that no threshold discards. tokens: the post-instruction
    tokens' texts.
    """
    positions = max(-row["position"] for row in rows)
    layers = max(limits.n_layers, 1 + max(row["layer"] for row in rows))
    passing_pl = np.zeros((positions, layers), bool)
    for row in passing:
        passing_pl[row["position"], row["layer"]] = True
    kl_range = (0.0, 10 * limits.kl)
    figures = []
    for key, name, title, cmap, middle, bounds, digits in (
        ("refusal_score", "bypass", "Bypass score", "RdBu_r", 0.0, (-np.inf, np.inf), 1),
        ("steering_score", "induce", "Induce score", "RdBu_r", limits.induce, (-np.inf, np.inf), 1),
        ("kl_div_score", "kl", "KL divergence", "PRGn_r", limits.kl, kl_range, 2),
    ):
        values_pl, evaluated_pl = grids(rows, key, positions, layers)
        spread = np.append(values_pl, 0.0) if key == "kl_div_score" else values_pl  # its scale starts at 0
        drawn = heatmap(
            f"selection-{name}",
            f"{title} of each candidate direction over layer and position",
            values_pl,
            position_labels(positions, tokens),
            Scale(cmap, split_norm(spread, middle, bounds), middle, digits),
            pick,
            columns=("position", "layer", f"{title.lower().replace('kl', 'KL')} [nats]"),
            shown_pl=evaluated_pl,
            passing_pl=passing_pl if key == "refusal_score" else None,
            limit=limits.first_pruned,
        )
        figures.append(drawn)
    return figures


def cosines(vectors: np.ndarray, others: np.ndarray, tiny: float) -> np.ndarray:
    """Returns cosines `[..., M]` of `vectors` `[..., D]` with `others` `[M, D]`; NaN where a norm is at most `tiny`.

    Layer-0 differences at template positions are zero vectors: their cosine is not defined, rather than 0/0.
    """
    norms, other_norms = np.linalg.norm(vectors, axis=-1), np.linalg.norm(others, axis=-1)
    products = norms[..., None] * other_norms
    defined = (norms > tiny)[..., None] & (other_norms > tiny)
    return np.where(defined, vectors @ others.T / np.where(defined, products, 1.0), np.nan)


def cosine_figures(diffs_pld: np.ndarray, tokens: Sequence[str], pick: Direction) -> list[Picture]:
    """Returns the similarity of the candidates: each with the pick, and between layers at the picked position."""
    tiny = 1e-9 * np.linalg.norm(diffs_pld, axis=-1).max(initial=0.0)
    position, layer = pick.place
    here_ld = diffs_pld[position]
    return [
        heatmap(
            "geometry-with-pick",
            "Cosine similarity of each candidate direction with the selected one",
            cosines(diffs_pld, here_ld[[layer]], tiny)[..., 0],
            position_labels(len(diffs_pld), tokens),
            COSINE,
            pick,
            columns=("position", "layer", "cosine"),
            height=294,
        ),
        layer_similarity(cosines(here_ld, here_ld, tiny), pick),
    ]


def layer_similarity(values_ll: np.ndarray, pick: Direction) -> Picture:
    """Draws a square map over pairs of layers, hatched where the similarity is not defined."""
    (_, layer), layers, finite_ll = pick.place, len(values_ll), np.isfinite(values_ll)
    with drawing(294) as figure:
        axes = axes_within(figure, 40, 20, 80, 34)
        _hatch(axes, ~finite_ll)
        shade = COSINE.colours(np.where(finite_ll, values_ll, 0.0))
        shade[..., 3] = finite_ll
        axes.imshow(shade, interpolation="none", aspect="auto", zorder=2)
        _mark_pick(axes, layer, layer, (240 / layers, 240 / layers))
        if layers <= 8:
            _write_values(axes, values_ll, shade, COSINE.digits)
        layer_axis(axes, layers)
        axes.yaxis.set_major_locator(MaxNLocator(min(10, layers), integer=True, min_n_ticks=1))
        axes.set_ylim(-0.5, layers - 0.5)
        axes.set_ylabel("layer", labelpad=2)
        _colour_bar(figure, axes, COSINE, 1.0)
        label = "Cosine similarity of the directions of each pair of layers"
        return Picture("geometry-layers", label, figure, grid_rows(values_ll, ("layer", "other layer", "cosine")))


def _dots(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, size: float) -> None:
    """Draws dots as zero-length strokes of one path, which takes a fifth of the bytes of as many markers."""
    points = np.column_stack([x.ravel(), y.ravel()])
    points = points[np.isfinite(points).all(axis=1)]
    if len(points):
        path = Path(np.repeat(points, 2, axis=0), np.tile((Path.MOVETO, Path.LINETO), len(points)))
        axes.add_patch(
            PathPatch(path, fill=False, edgecolor=colour, linewidth=size, capstyle="round", alpha=0.75, clip_on=False)
        )


def projection_figure(
    harmful_nl: np.ndarray, harmless_nl: np.ndarray, pick: Direction, sides: tuple[str, str] = ("harmful", "harmless")
) -> Picture:
    """Draws a strip plot of both sides' activations along the direction, per layer, with the means as lines."""
    layers = harmful_nl.shape[1]
    most = max(8, MAX_POINTS // (2 * layers))
    size = float(np.clip(110 / layers, 1.8, 4.0))
    with drawing(294) as figure:
        axes = axes_within(figure, 52, 28, 10, 46)
        axes.axhline(0, color="#8d949c", linewidth=0.7)
        axes.axvline(pick.place[1], color="#8d949c", linewidth=1.0, linestyle=(0, (3, 2)))
        for values_nl, colour, side in ((harmful_nl, HARMFUL_COLOUR, -1), (harmless_nl, HARMLESS_COLOUR, 1)):
            n = len(values_nl)
            if not n:
                continue
            few = values_nl[np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int))]
            spread = (np.arange(len(few)) * 0.618034) % 1 - 0.5  # even and without chance
            x = np.arange(layers) + 0.2 * side + 0.24 * spread[:, None]
            _dots(axes, x, few, colour, size)
            axes.plot(np.arange(layers), values_nl.mean(axis=0), color=colour, linewidth=1.2, zorder=4)
        finite = np.concatenate([harmful_nl.ravel(), harmless_nl.ravel()])
        finite = finite[np.isfinite(finite)]
        if finite.size:
            margin = 0.05 * (np.ptp(finite) or 1.0)
            axes.set_ylim(finite.min() - margin, finite.max() + margin)
        layer_axis(axes, layers)
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.set_ylabel("projection on the direction", labelpad=2)
        for x, colour, text in (
            (0.0, HARMFUL_COLOUR, sides[0]),
            (0.04 + 0.02 * max(len(sides[0]), 10), HARMLESS_COLOUR, sides[1]),
        ):
            axes.plot(x + 0.01, 1.06, "o", color=colour, markersize=5, transform=axes.transAxes, clip_on=False)
            axes.text(x + 0.04, 1.06, text, transform=axes.transAxes, fontsize=9, va="center", parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
        label = "Projections of validation activations on the direction, per layer"
        return Picture("geometry-projections", label, figure, projection_rows(harmful_nl, harmless_nl, sides))


def projection_rows(
    harmful_nl: np.ndarray, harmless_nl: np.ndarray, sides: tuple[str, str] = ("harmful", "harmless")
) -> list[dict[str, Cell]]:
    """Returns the rows of the data of projections: one for each prompt and layer. sides: what the two groups are called."""
    columns = "prompt", "layer", "projection [residual units]"
    return [
        {"group": group} | row
        for group, values_nl in zip(sides, (harmful_nl, harmless_nl), strict=True)
        for row in grid_rows(values_nl, columns)
    ]

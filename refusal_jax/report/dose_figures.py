"""Figures of how much must be done to a direction: refusal and damage by dose, and refusal by the number of directions."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from refusal_jax.judges.behaviours import REFUSAL, Behaviour
from refusal_jax.report.drawing import axes_within, drawing
from refusal_jax.report.pictures import Picture, series_rows
from refusal_jax.report.suffix_figures import COLOURS, GREY, MARKS

Rows = Sequence[Mapping[str, float | None]]
ENDS = {"mean": "", "low": " low", "high": " high"}  # of names of columns


def curve(
    axes: Axes, x: Sequence[float], rows: Rows, middle: str, colour: str, mark: str = "", scale: float = 1.0
) -> None:
    """Draws rows `{middle, "low", "high"}` over x as a line with a band, where they are known."""
    known = [i for i, row in enumerate(rows) if row[middle] is not None]
    values = {key: [scale * (rows[i].get(key) or 0.0) for i in known] for key in (middle, "low", "high")}
    bounded = all(rows[i].get(key) is not None for i in known for key in ("low", "high"))
    at = [x[i] for i in known]
    if bounded:
        axes.fill_between(at, values["low"], values["high"], color=colour, alpha=0.18, linewidth=0)
    axes.plot(at, values[middle], color=colour, linewidth=1.6, marker=mark, markersize=3.4)


def _mark_half(axes: Axes, half: Mapping[str, float | None], most: float) -> None:
    """Marks one half, and the place where it is reached with its interval, which may be open above."""
    axes.axhline(50, color=GREY, linewidth=0.7, linestyle=(0, (1, 2)))
    if half["low"] is not None:
        high = half["high"]
        axes.axvspan(half["low"], most if high is None else high, color=GREY, alpha=0.18, linewidth=0)
    if half["at"] is not None:
        axes.axvline(half["at"], color=GREY, linewidth=1.1, linestyle=(0, (3, 2)))


def plain(axes: Axes, label: str) -> None:
    """Labels the axis of values, and leaves out what frames the axes above and on the right."""
    axes.set_ylabel(label, labelpad=2)
    axes.tick_params(length=2.5, pad=2, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def dose_figure(
    kind: str,
    doses: Sequence[float],
    refused: Rows,
    kl: Rows,
    half: Mapping[str, float | None],
    colour: str,
    replies: Sequence[tuple[float, float]] = (),
    of: Behaviour = REFUSAL,
) -> Picture:
    """Draws the share of prompts that are refused over the dose, and below it the damage.

    kind: "ablation" or "addition", of the doses. refused: rates `{"rate", "low", "high"}`, one a dose. kl: means `{"mean",
    "low", "high"}` in nats. half: `{"at", "low", "high"}`. replies: doses and rates that were counted in replies.
    of: the behaviour that refusal stands for here.
    """
    with drawing(330) as figure:
        above, below = axes_within(figure, 46, 10, 12, 140), axes_within(figure, 46, 208, 12, 36)
        _mark_half(above, half, doses[-1])
        curve(above, doses, refused, "rate", colour, "o", 100)
        for dose, rate in replies:
            above.plot(dose, 100 * rate, "D", markersize=6, fillstyle="none", color=colour, markeredgewidth=1.3)
        above.set_ylim(-4, 104)
        above.set_yticks([0, 25, 50, 75, 100])
        plain(above, f"{of.done}, %")
        curve(below, doses, kl, "mean", GREY, "o")
        below.set_ylim(bottom=0)
        below.yaxis.set_major_locator(MaxNLocator(4))
        plain(below, "KL, nats")
        below.set_xlabel("dose", labelpad=2)
        for axes in (above, below):
            axes.set_xlim(doses[0], doses[-1] * 1.02)
            axes.xaxis.set_major_locator(MaxNLocator(8))
        above.tick_params(labelbottom=False)
        rates = {key: {of.done: [row[key] for row in refused]} for key in ("rate", "low", "high")}
        moved = {f"KL{end} [nats]": {of.done: [row[key] for row in kl]} for key, end in ENDS.items()}
        data = series_rows((f"dose of {kind}", doses), rates | moved)
        return Picture(f"dose-{kind}", f"{of.cases_title} and damage by the dose of {kind}", figure, data)


def rank_figure(curves: Mapping[str, Rows], half: Mapping[str, float | None], of: Behaviour = REFUSAL) -> Picture:
    """Draws the share of prompts that are refused over the number of ablated directions, from none on, for kinds of directions.

    curves: rates `{"rate", "low", "high"}` of each kind by its name. half: `{"at", "low", "high"}` of the first kind. of: the
    behaviour that refusal stands for here.
    """
    most = max(len(rows) for rows in curves.values()) - 1
    with drawing(290) as figure:
        axes = axes_within(figure, 46, 58, 12, 36)
        _mark_half(axes, half, most)
        for number, ((name, rows), colour, mark) in enumerate(zip(curves.items(), COLOURS, MARKS, strict=False)):
            curve(axes, range(len(rows)), rows, "rate", colour, mark, 100)
            y = 1 + (46 - 15 * number) / (290 - 94)
            axes.plot(0.01, y, mark, color=colour, markersize=4.5, transform=axes.transAxes, clip_on=False)
            axes.text(0.04, y, name, transform=axes.transAxes, fontsize=9, va="center")
        axes.set_ylim(-4, 104)
        axes.set_yticks([0, 25, 50, 75, 100])
        axes.set_xlim(-0.1, most + 0.3)
        axes.xaxis.set_major_locator(MaxNLocator(min(10, most), integer=True, min_n_ticks=1))
        axes.set_xlabel("ablated directions", labelpad=2)
        plain(axes, f"{of.done}, %")
        data = [
            {"kind": name, "directions": number} | {key: row[key] for key in ("rate", "low", "high")}
            for name, rows in curves.items()
            for number, row in enumerate(rows)
        ]
        return Picture("rank-curves", f"{of.cases_title} by the number of ablated directions", figure, data)

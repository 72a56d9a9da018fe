"""Draws the monitor's charts: the share of refusals by day with its confidence sequence, its reference, alarms, and counts."""

import dataclasses
import datetime
from collections.abc import Sequence

from refusal_jax.monitor.sequences import confidence_sequence

LONGEST = 180  # days of a chart
DRIFT_COLOUR, RECOVERY_COLOUR, SHARE_COLOUR = "#d9534f", "#3f9a5a", "#2f8fb8"
HEIGHT = 210.0
EPOCH = datetime.date(1970, 1, 1)


@dataclasses.dataclass(frozen=True)
class Day:
    """One day, since 1970 in UTC: how many judged replies, and how many of them refuse."""

    day: int
    count: int
    n: int


@dataclasses.dataclass(frozen=True)
class Chart:
    """Holds what a chart shows. reference: the share that is compared with; low and high: the range of no change, both None
    while it is learnt. alerts: days with whether a drift began there."""

    title: str
    days: tuple[Day, ...]
    reference: float | None
    low: float | None
    high: float | None
    alerts: tuple[tuple[float, bool], ...]


def sequence_of(days: Sequence[Day], breaks: Sequence[float], confidence: float) -> list[tuple[float, float, float]]:
    """Returns the share of all replies so far and the bounds of its confidence sequence at the end of each day; counting begins
    anew with each alert, at the days `breaks`."""
    found, count, n, last = [], 0, 0, None
    for one in days:
        if last is not None and any(last < int(at) <= one.day for at in breaks):
            count = n = 0
        count, n, last = count + one.count, n + one.n, one.day
        found.append((count / n if n else 0.0, *confidence_sequence(count, n, confidence)))
    return found


def draw(chart: Chart, name: str, confidence: float) -> str:
    """Draws a chart as SVG; "" where nothing was judged. name: of the drawing in the page."""
    days = tuple(one for one in chart.days if one.n)[-LONGEST:]
    if not days:
        return ""
    # imported here, because matplotlib takes a while that a monitor without a page need not wait for
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    from refusal_jax.report.drawing import axes_within, drawing, inline

    x = [one.day for one in days]
    share, low, high = (
        [100 * row[index] for row in sequence_of(days, [at for at, _ in chart.alerts], confidence)]
        for index in range(3)
    )
    daily = [100 * one.count / one.n for one in days]
    with drawing(HEIGHT) as figure:
        axes = axes_within(figure, 42, 8, 8, 84)
        if chart.reference is not None:
            axes.axhline(100 * chart.reference, color="#8d949c", linewidth=1.0, linestyle=(0, (4, 3)))
            if chart.low is not None and chart.high is not None:
                axes.axhspan(100 * chart.low, 100 * chart.high, color="#8d949c", alpha=0.13, linewidth=0)
        axes.fill_between(x, low, high, color=SHARE_COLOUR, alpha=0.25, linewidth=0)
        axes.plot(x, share, "-", color=SHARE_COLOUR, linewidth=1.4)
        axes.plot(x, daily, "o", color=SHARE_COLOUR, markersize=2.6, alpha=0.75)
        for at, begins in chart.alerts:
            if at >= x[0]:
                colour = DRIFT_COLOUR if begins else RECOVERY_COLOUR
                axes.axvline(at, color=colour, linewidth=1.3, linestyle="-" if begins else (0, (2, 2)))
        shown = [*daily, *(100 * end for end in (chart.reference, chart.low, chart.high) if end is not None)]
        axes.set_ylim(max(min(shown) - 5, -2.0), min(max(shown) + 5, 101.0))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_ylabel("refuses, %", labelpad=2)
        counts = axes_within(figure, 42, HEIGHT - 74, 8, 24)
        counts.bar(x, [one.n for one in days], width=0.9, color="#8d949c", alpha=0.6)
        counts.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        counts.set_ylabel("judged", labelpad=2)
        for one in (axes, counts):
            one.set_xlim(x[0] - 0.7, max(x[-1], x[0] + 1) + 0.7)
            one.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
            one.tick_params(length=2.5, pad=2, labelsize=9)
            one.spines[["top", "right"]].set_visible(False)
        axes.set_xticklabels([])
        counts.xaxis.set_major_formatter(FuncFormatter(lambda day, _: date(int(day))))
        return inline(figure, name, f"Share of refusals by day, {chart.title}")


def date(day: int) -> str:
    """Returns a day since 1970 as YYYY-MM-DD; "" for one that no calendar has."""
    try:
        return str(EPOCH + datetime.timedelta(days=day))
    except OverflowError:
        return ""

"""Figures of cones: what each of their directions does to refusal, and how much of one direction others carry."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from refusal_jax.judges.behaviours import REFUSAL, Behaviour
from refusal_jax.report.drawing import THEME_COLOUR, axes_within, drawing, layer_axis
from refusal_jax.report.figures import HARMFUL_COLOUR, HARMLESS_COLOUR
from refusal_jax.report.pictures import Picture, series_rows

GREY = "#8d949c"
LINES = ("#c98a1b", "#8f6bc2", HARMFUL_COLOUR, "#3c9d6b", HARMLESS_COLOUR, "#7a5c3e")


def mediation_picture(groups: Mapping[int, Sequence[Mapping]], of: Behaviour = REFUSAL) -> Picture:
    """Returns the figure with its data, a row for each direction of each cone; groups, of: as in
    `mediation_figure`."""
    data = [
        {"dimension": dimension, "direction": number, "drawn": int(number > dimension), "kl [nats]": row["kl"]}
        | {f"{name}, {key}": row[name][key] for name in ("ablated", "added") for key in ("rate", "low", "high")}
        for dimension, rows in groups.items()
        for number, row in enumerate(rows, 1)
    ]
    return Picture("cones-mediation", f"What directions of cones do to {of.name}", mediation_figure(groups, of), data)


def mediation_figure(groups: Mapping[int, Sequence[Mapping]], of: Behaviour = REFUSAL) -> Figure:
    """Draws, for each direction of each cone, the share of harmful prompts still refused under ablation, and that of harmless
    prompts refused under addition, with their intervals.

    groups: directions by the cone's dimension, the basis first, each `{"ablated", "added"}` of `{"rate", "low", "high"}`. of:
    the behaviour that refusal stands for here.
    """
    with drawing(240) as figure:
        axes = axes_within(figure, 42, 34, 8, 34)
        at, ticks = 0.0, []
        for dimension, rows in groups.items():
            places = at + np.arange(len(rows))
            ticks.append((float(places.mean()), str(dimension)))
            for name, colour, mark, shift in (
                ("ablated", HARMFUL_COLOUR, "o", -0.15),
                ("added", HARMLESS_COLOUR, "s", 0.15),
            ):
                for number, (place, row) in enumerate(zip(places + shift, rows, strict=True)):
                    found = row[name]
                    axes.plot([place, place], [100 * found["low"], 100 * found["high"]], color=colour, linewidth=1.0)
                    filled = colour if number < dimension else "none"
                    axes.plot(place, 100 * found["rate"], mark, color=colour, markerfacecolor=filled, markersize=3.6)
            at += len(rows) + 1.5
            axes.axvline(at - 1.25, color=GREY, linewidth=0.5) if dimension != max(groups) else None
        axes.axhline(50, color=GREY, linewidth=0.8, linestyle=(0, (3, 2)))
        axes.set_xticks([place for place, _ in ticks], [name for _, name in ticks])
        axes.set_xlim(-1, at - 1)
        axes.set_ylim(-4, 104)
        axes.set_ylabel(f"% {of.done}", labelpad=2)
        axes.set_xlabel("dimension of the cone", labelpad=2)
        axes.tick_params(length=2.5, pad=2, labelsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        for number, (name, colour, mark) in enumerate(
            ((f"{of.present}, ablated", HARMFUL_COLOUR, "o"), (f"{of.absent}, added", HARMLESS_COLOUR, "s"))
        ):
            axes.plot(
                0.02 + 0.48 * number, 1.09, mark, color=colour, markersize=4.5, transform=axes.transAxes, clip_on=False
            )
            axes.text(0.05 + 0.48 * number, 1.09, name, transform=axes.transAxes, fontsize=9, va="center")
        return figure


def change_picture(changes: Mapping[str, Sequence[float]]) -> Picture:
    """Returns the figure with its data, a row for each layer of each direction; changes: as in `change_figure`."""
    layers = range(len(next(iter(changes.values()))))
    data = series_rows(("layer", layers), {"change of the cosine": changes})
    return Picture(
        "cones-independence", "Change of the cosine with the direction by layer", change_figure(changes), data
    )


def change_figure(changes: Mapping[str, Sequence[float]]) -> Figure:
    """Draws by how much the cosine of the residual with the study's direction changes at each layer while another direction is
    ablated, a line for each.

    changes: mean changes `[L]` by the name of the ablated direction.
    """
    with drawing(200 + 14 * len(changes)) as figure:
        axes = axes_within(figure, 46, 12 + 14 * len(changes), 10, 34)
        axes.axhline(0, color=GREY, linewidth=0.7)
        height = axes.get_position().height * figure.get_figheight() * 72
        for number, (name, values) in enumerate(changes.items()):
            colour = THEME_COLOUR if number == len(changes) - 1 else LINES[number % len(LINES)]
            style = (0, (2, 2)) if number == len(changes) - 1 else "solid"
            axes.plot(np.arange(len(values)), values, color=colour, linewidth=1.5, linestyle=style)
            y = 1 + (12 + 14 * (len(changes) - 1 - number)) / height
            axes.plot([0.0, 0.06], [y, y], color=colour, linestyle=style, transform=axes.transAxes, clip_on=False)
            axes.text(0.08, y, name, transform=axes.transAxes, fontsize=9, va="center", parse_math=False)
        layer_axis(axes, len(next(iter(changes.values()))))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_ylabel("change of the cosine", labelpad=2)
        axes.spines[["top", "right"]].set_visible(False)
        return figure

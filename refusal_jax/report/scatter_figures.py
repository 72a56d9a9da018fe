"""The figure of prompts in the residual stream: a small panel for each of a few layers."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from matplotlib.ticker import MaxNLocator

from refusal_jax.judges.behaviours import REFUSAL, Behaviour
from refusal_jax.report.drawing import THEME_COLOUR, axes_within, drawing
from refusal_jax.report.pictures import Picture
from refusal_jax.report.plane_figures import colours_of, legend


@dataclasses.dataclass(frozen=True)
class Panel:
    """One layer: the shares of the variance, the prompts' components `[n, 2]`, and those of the unit direction `[2]`."""

    layer: int
    shares: tuple[float, float]
    along_nc: np.ndarray
    direction_c: np.ndarray


def scatter_figure(
    panels: Sequence[Panel], splits: Sequence[str], refused: np.ndarray | None, of: Behaviour = REFUSAL
) -> Picture:
    """Draws the panels in two columns. splits: of each prompt, such as "harmful_train". refused: whether each prompt is, for
    filled and open marks; None where it is not known. of: the behaviour that refusal stands for here."""
    sides = np.array([split.rpartition("_")[0] for split in splits])
    names = list(dict.fromkeys(sides.tolist()))
    colours, head = colours_of(names), 14 * (len(names) + (refused is not None)) + 10
    lines, panel, gap = -(-len(panels) // 2), 132, 34
    total = head + lines * (panel + gap)
    with drawing(total) as figure:
        for i, one in enumerate(panels):
            row, column = divmod(i, 2)
            top, left = head + row * (panel + gap) + 16, 30 + column * 178
            axes = axes_within(figure, left, top, 360 - left - 146, total - top - panel + 4)
            for name in names:
                for filled in (True, False):
                    at = (sides == name) & (np.full(len(sides), filled) if refused is None else refused == filled)
                    face = colours[name] if filled else "none"
                    axes.plot(
                        *one.along_nc[at].T,
                        "o",
                        color=colours[name],
                        markerfacecolor=face,
                        markersize=2.4,
                        alpha=0.6,
                        markeredgewidth=0.6,
                    )
            span = 0.45 * np.ptp(one.along_nc, axis=0).max()
            ends = np.array([[0.0, 0.0], one.direction_c * span])
            axes.plot(*ends.T, color=THEME_COLOUR, linewidth=1.4, zorder=5)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.tick_params(length=2, pad=1.5, labelsize=7.5)
            axes.spines[["top", "right"]].set_visible(False)
            shares = " + ".join(f"{100 * share:.0f}" for share in one.shares)
            axes.text(0, 1 + 6 / panel, f"layer {one.layer}: {shares} %", transform=axes.transAxes, fontsize=9)
            if i == 0:
                marks = {of.dataset(name): (colours[name], "o") for name in names}
                legend(axes, head - 4, marks if refused is None else marks | {of.not_done: (THEME_COLOUR, "open")})
        data = [
            {
                "layer": one.layer,
                "split": f"{of.dataset(split.rpartition('_')[0])}_{split.rpartition('_')[2]}",
                "prompt": i,
                of.done: None if refused is None else int(refused[i]),
                "first component [residual units]": float(one.along_nc[i, 0]),
                "second component [residual units]": float(one.along_nc[i, 1]),
            }
            for one in panels
            for i, split in enumerate(splits)
        ]
        return Picture("scatter-layers", "Prompts along their first two principal components by layer", figure, data)

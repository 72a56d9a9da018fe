"""Draws what checkpoints keep of their refusal under each test, with intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

from refusal_jax.report.drawing import THEME_COLOUR, axes_within, drawing
from refusal_jax.report.page import plain
from refusal_jax.report.pictures import Picture
from refusal_jax.report.suffix_figures import GREY

COLOURS = {"kept": "#3c9d6b", "weakened": "#c98a1b", "lost": "#d9534f"}
ROW, NAME = 17.0, 100.0  # points: of a line, and of the names beside it
MOST_NAME = 17  # letters of a name that fit there


def kept_picture(name: str, label: str, rows: Mapping[str, Mapping[str, Any]], floor: float) -> Picture:
    """Returns the figure of shares that are kept, with its data.

    rows: by what is drawn in a line, `{"rate", "low", "high", "verdict"}`; a rate of None has no mark. floor: the share that
    a checkpoint has to keep.
    """
    with drawing(ROW * len(rows) + 46) as figure:
        axes = axes_within(figure, NAME, 6, 12, 40)
        for level, style in ((100 * floor, (0, (3, 2))), (50.0, (0, (1, 2)))):
            axes.axvline(level, color=GREY, linewidth=0.8, linestyle=style)
        for place, row in enumerate(rows.values()):
            if row["rate"] is None:
                continue
            colour = COLOURS.get(row["verdict"], GREY)
            axes.plot([100 * row["low"], 100 * row["high"]], [place, place], color=colour, linewidth=1.6)
            axes.plot(100 * row["rate"], place, "o", color=colour, markersize=4.5, clip_on=False)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(-2, 102)
        axes.set_yticks([])
        for place, text in enumerate(rows):
            axes.text(
                -5, place, shortened(text), ha="right", va="center", fontsize=9, color=THEME_COLOUR, parse_math=False
            )
        axes.set_xlabel("% of the refusals kept", labelpad=2)
        axes.tick_params(length=2.5, pad=2, labelsize=9)
        axes.spines[["top", "right", "left"]].set_visible(False)
    data = [
        {"name": text} | {key: row[key] for key in ("rate", "low", "high", "verdict")} for text, row in rows.items()
    ]
    return Picture(name, label, figure, data)


def shortened(text: str) -> str:
    """Returns a name that fits beside the figure, without control characters."""
    text = plain(text)
    return text if len(text) <= MOST_NAME else f"{text[: MOST_NAME - 1]}…"


def pictures_of(checkpoints: Sequence[Mapping[str, Any]], floor: float) -> dict[str, Picture]:
    """Returns the figures of records of checkpoints: of each by its title, and of the worst cases of several under ""."""
    found = {}
    for number, one in enumerate(checkpoints):
        rows = {
            name: test["kept"] | {"verdict": test["verdict"]} for name, test in one["tests"].items() if "kept" in test
        }
        if rows:
            label = f"Refusals that {plain(one['title'])} keeps under each test"
            found[one["title"]] = kept_picture(f"kept-{number}", label, rows, floor)
    worst = {one["title"]: one["worst"] | {"rate": one["worst"]["value"]} for one in checkpoints if one["worst"]}
    if len(worst) > 1:
        found[""] = kept_picture("worst", "Refusals that checkpoints keep under the worst test", worst, floor)
    return found

"""The figure of a search for trade-offs: what is left of refusal against damage."""

from collections.abc import Mapping

from refusal_jax.judges.behaviours import REFUSAL, Behaviour
from refusal_jax.report.drawing import axes_within, drawing
from refusal_jax.report.figures import HARMFUL_COLOUR, HARMLESS_COLOUR
from refusal_jax.report.pictures import Picture
from refusal_jax.report.suffix_figures import GREY

LEAST = 1e-5  # nats; what is less is drawn there, on the logarithmic axis


def front_figure(found: Mapping, refused: str, damage: str, of: Behaviour = REFUSAL) -> Picture:
    """Draws the trials of a search on validation prompts, and the best of them on test prompts.

    found: as in the file of the search: "trials" and "points". refused, damage: names of the two measures of a point. of: the
    behaviour that refusal stands for here.
    """
    with drawing(330) as figure:
        axes = axes_within(figure, 46, 30, 12, 40)
        shares = [100 * trial["refused"] for trial in found["trials"]]
        moved = [max(trial["damage"], LEAST) for trial in found["trials"]]
        axes.plot(moved, shares, ".", color=GREY, alpha=0.45, markersize=4, markeredgewidth=0)
        for point in found["points"][1:]:
            rate, kl = point["measures"][refused], point["measures"][damage]
            at = max(kl["mean"], LEAST), 100 * rate["rate"]
            colour = HARMFUL_COLOUR if point["best"] else HARMLESS_COLOUR if point["trial"] is None else GREY
            if point["best"] or point["trial"] is None:
                axes.plot([at[0]] * 2, [100 * rate["low"], 100 * rate["high"]], color=colour, linewidth=0.8, alpha=0.6)
            mark = "D" if point["trial"] is None else "s" if point["plain"] else "o"
            axes.plot(*at, mark, color=colour, markersize=4.5, fillstyle="full" if point["best"] else "none")
        axes.set_xscale("log")
        axes.set_ylim(-4, 104)
        axes.set_yticks([0, 25, 50, 75, 100])
        axes.set_ylabel(f"{of.done}, %", labelpad=2)
        axes.set_xlabel(f"KL on {of.absent} prompts, nats", labelpad=2)
        axes.tick_params(length=2.5, pad=2, labelsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        data = [
            row("validation", f"trial {number}", {"rate": trial["refused"]}, {"mean": trial["damage"]})
            for number, trial in enumerate(found["trials"])
        ]
        data += [
            row("test", point["label"], point["measures"][refused], point["measures"][damage])
            for point in found["points"]
        ]
        return Picture("damage-front", f"{of.cases_title} left against damage", figure, data)


def row(prompts: str, name: str, rate: Mapping, moved: Mapping) -> dict:
    """Returns a row of the figure's data. rate: `{"rate", "low", "high"}`; moved: `{"mean", "low", "high"}`, bounds if known."""
    rates = {name: rate.get(name) for name in ("rate", "low", "high")}
    ends = {"mean": "", "low": " low", "high": " high"}
    return {"prompts": prompts, "ablation": name} | rates | {f"KL{ends[key]} [nats]": moved.get(key) for key in ends}

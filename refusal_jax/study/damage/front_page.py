"""Shows the best trade-offs of refusal and damage that the search found: sentences, a table, and the trials."""

from collections.abc import Mapping, Sequence

from refusal_jax.judges.behaviours import Behaviour
from refusal_jax.report.findings import Findings
from refusal_jax.runs.artifacts import FRONT
from refusal_jax.study.damage.grid_page import change_in_words, loss_measure
from refusal_jax.study.damage.shared import KL, OVER_REFUSED, REFUSED
from refusal_jax.study.mechanism.dose import in_nats, in_percent


def in_share(share: float) -> str:
    """Returns a share in words, such as 12.5 %."""
    return f"{100 * share:.3g} %"


def verdict(row: Mapping, found: Mapping) -> str:
    """Returns whether a level that was reached on validation prompts is kept on test prompts, in words."""
    rate = in_percent(found["points"][row["point"]]["measures"][REFUSED])
    kept = {True: "keeps the level there", False: "does not keep the level there"}
    return f"On test prompts it leaves {rate}; it {kept.get(row['holds'], 'may or may not keep the level there')}"


def sentence(row: Mapping, found: Mapping, of: Behaviour) -> str:
    """Returns what is best at one level, in words."""
    start = f"At most {in_share(row['level'])} of {of.present} validation prompts {of.done}:"
    tried = len(found["trials"])
    if row["point"] is None:
        return f"{start} none of {tried} partial ablations comes to that."
    if found["trials"][0]["refused"] <= row["level"]:
        return f"{start} the unedited model is at that level already ({in_share(found['trials'][0]['refused'])})."
    best = found["points"][row["point"]]
    told = [
        f"{start} least is damaged by trial {best['trial']} of {tried}, with a KL of {in_nats(best['measures'][KL])} nats on "
        f"{of.absent} test prompts. {verdict(row, found)}."
    ]
    if row["plain"] is None:
        told.append("No single strength at all layers comes to that level.")
    elif row["plain"] == row["point"]:
        told.append("That is one strength at all layers and sites.")
    else:
        plain = found["points"][row["plain"]]
        told.append(
            f"One strength at all layers, {strength(plain):g}, takes {in_nats(plain['measures'][KL])} nats"
            + (f", {in_nats(row['saved'])} more on the same prompts." if row["saved"]["low"] is not None else ".")
        )
    return " ".join(told)


def strength(point: Mapping) -> float:
    """Returns the greatest strength of a point; 0 for none."""
    return max((kernel["most"] for kernel in point["kernels"].values()), default=0.0)


def kernels_in_words(point: Mapping) -> list[str]:
    """Returns where and how strongly a point ablates, in words, site by site."""
    told = []
    for site, kernel in point["kernels"].items():
        most, position, least, distance = (kernel[name] for name in ("most", "position", "least", "distance"))
        if distance == 0:
            told.append(f"{'embedding' if site == 'resid_pre' else site} {most:.2f}")
        else:
            told.append(f"{site} {most:.2f} at layer {position:.1f}, {least:.2f} at ± {distance:.1f}")
    return told or ["nothing"]


def nothing_to_remove(found: Mapping, of: Behaviour) -> str:
    """Returns that the model shows nothing on validation prompts, in words, or "" if it does."""
    return (
        "" if found["trials"][0]["refused"] else f"The model {of.verb_on} none of the {of.present} validation prompts."
    )


def told(found: Mapping, of: Behaviour) -> list[str]:
    """Returns the sentences of all levels."""
    if none := nothing_to_remove(found, of):
        return [none]
    return [sentence(row, found, of) for row in found["levels"]]


def lines(findings: Findings) -> list[str]:
    """Returns the numbers for a terminal."""
    found, of = findings.run.read_json(FRONT), findings.behaviour
    n = {split: " and ".join(map(str, sides.values())) for split, sides in found["prompts"].items()}
    head = f"Best trade-offs, searched on {n['val']} {of.present} and {of.absent} validation prompts and measured on {n['test']}"
    return ["", f"{head} test prompts:", *(f"  {text}" for text in told(found, of))]


def table(found: Mapping) -> list[dict]:
    """Returns the rows of the table: unedited, the paper's ablation, and the best trials by what they leave of refusal."""
    known, best = found["points"][:2], [point for point in found["points"][2:] if point["best"]]
    loss = loss_measure(found)
    best.sort(key=lambda point: -found["trials"][point["trial"]]["refused"])
    return [
        {
            "label": point["label"],
            "kernels": kernels_in_words(point) if point["trial"] is not None else [],
            "validation": None if point["trial"] is None else found["trials"][point["trial"]],
            "refused": point["measures"][REFUSED],
            "over_refused": point["measures"][OVER_REFUSED],
            "kl": point["measures"][KL],
            "loss": point["measures"][loss] if loss else None,
        }
        for point in [*known, *best]
    ]


def values(findings: Findings) -> dict:
    """Returns what the report shows beside the figure."""
    found = findings.run.read_json(FRONT)
    return {
        "front": found,
        "sentences": told(found, findings.behaviour),
        "rows": table(found),
        "in_percent": in_percent,
        "in_nats": in_nats,
        "in_share": in_share,
        "change_in_words": change_in_words,
    }


def pictures(findings: Findings) -> Sequence:
    """Returns the figure of the trials and of the front."""
    from refusal_jax.report.front_figures import front_figure  # imports matplotlib, which other stages need not pay for

    found = findings.run.read_json(FRONT)
    return [front_figure(found, REFUSED, KL, findings.behaviour)]

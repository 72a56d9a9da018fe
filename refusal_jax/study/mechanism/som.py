"""Several directions of a self-organising map, ablated together (arXiv 2511.08379)."""

import pathlib
import time

import numpy as np

from refusal_jax.edits import Edits
from refusal_jax.judges.statistics import Rate
from refusal_jax.mechanism.activations import activations
from refusal_jax.mechanism.edited_prompts import EditedPrompts
from refusal_jax.mechanism.som import grow_subsets, padded, train_map
from refusal_jax.report.findings import Section
from refusal_jax.runs.artifacts import DIRECTION, FILTER, MEANS, METADATA, PROMPTS, SETUP, SOM, SOM_DIRECTIONS
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.stage import Stage
from refusal_jax.study.mechanism.shared import MechanismStudy


def skipped(study: MechanismStudy) -> str:
    """Returns why there can be no map, "" if there can be one."""
    nodes, kept = study.settings.som.side**2, len(study.instructions("harmful_train"))
    if kept < nodes:
        return f"A map of {nodes} nodes needs as many {study.behaviour.kept_present} training prompts, and the study kept {kept}."
    return study.without_tokens


def map_directions(study: MechanismStudy) -> tuple[np.ndarray, np.ndarray]:
    """Returns the directions of the map at the place of the study's direction, float64 `[n, D]`, and how many prompts each is the
    nearest to."""
    settings, (position, layer) = study.settings.som, study.direction().place
    prompts = study.instructions("harmful_train")
    found = train_map(
        activations(study.model, prompts, [(position, layer)], study.sizes.forward)[:, 0],
        settings.side,
        steps=settings.steps,
        rate=settings.rate,
        radius=settings.radius,
        seed=settings.seed,
    )
    return found.nodes_nd - study.run.read_tensors(MEANS)["harmless"][position, layer], found.wins_n


def best(rows: list[dict], kl_threshold: float) -> dict:
    """Returns the subset that leaves the fewest refusals, the smallest of several, among those that the KL threshold accepts if
    there are any."""
    accepted = [row for row in rows if row["kl"] <= kl_threshold] or rows
    return min(accepted, key=lambda row: (row["ablated"]["successes"], len(row["numbers"])))


def search(study: MechanismStudy, ledger: Ledger) -> None:
    """Writes the directions of the map, and for each number of them the subset that leaves the least refusal."""
    begun, most = time.monotonic(), study.settings.som.most
    directions_nd, wins_n = map_directions(study)
    rows, ids = study.sizes.select, study.refusal_ids()
    harmful, harmless = (
        EditedPrompts.build(study.model, study.instructions(split), rows, ids)
        for split in ("harmful_val", "harmless_val")
    )

    def edits(subsets) -> Edits:
        return Edits.ablate(padded([directions_nd[list(subset)] for subset in subsets], max(most, 2)))

    chosen = grow_subsets(len(directions_nd), most, lambda subsets: harmful.read(edits(subsets)).scores_mn.mean(axis=1))
    subsets = [subset for subset, _ in chosen]
    refused_mn = harmful.read(edits(subsets)).scores_mn > 0
    kl_m = harmless.read(edits(subsets)).kl_mn.mean(axis=1)
    found = [
        {
            "numbers": list(subset),
            "score": score,
            "kl": float(kl),
            "ablated": Rate.of(refused_n.astype(int).tolist()).row,
        }
        for (subset, score), refused_n, kl in zip(chosen, refused_mn, kl_m, strict=True)
    ]
    kl_threshold = study.config.select.kl_threshold
    picked = best(found, kl_threshold)
    record = {"subsets": found, "picked": len(picked["numbers"]), "wins": wins_n.tolist(), "kl_threshold": kl_threshold}
    chosen_kd = directions_nd[picked["numbers"]]
    tensors = {"map": directions_nd.astype(np.float32), "directions": chosen_kd.astype(np.float32)}
    study.run.write_tensors(SOM_DIRECTIONS, tensors)
    study.run.write_json(SOM, record | {"seconds": time.monotonic() - begun})


def lines(findings) -> list[str]:
    """Returns what is left of refusal for each number of directions, for a terminal."""
    found, of = findings.run.read_json(SOM), findings.behaviour
    out = ["", f"Directions of a self-organising map ({len(found['wins'])} nodes in use), ablated together:"]
    for row in found["subsets"]:
        rate, many = row["ablated"], len(row["numbers"])
        out.append(
            f"  {many} direction{'s' if many > 1 else ' '}: {100 * rate['rate']:.1f} % {of.done} ({100 * rate['low']:.1f} to "
            f"{100 * rate['high']:.1f}), mean score {row['score']:.2f}, KL {row['kl']:.4f}"
            + (" (picked)" if many == found["picked"] else "")
        )
    return out


STAGE = Stage(
    "som",
    search,
    reads=(PROMPTS, SETUP, FILTER, MEANS, METADATA, DIRECTION),
    writes=(SOM, SOM_DIRECTIONS),
    skipped=skipped,
    given=lambda study: study.settings.som.to_dict(),
    about="Finds several directions at once with a self-organising map of harmful activations.",
    section=Section(
        pathlib.Path(__file__).with_name("som.html.jinja"),
        {"som": "Self-organising map"},
        lambda findings: {"som": findings.run.read_json(SOM)},
        lines=lines,
        of_direction=True,
        needs=(SOM,),
    ),
)

"""Finds how many directions must be ablated until half of the refusals are gone, beside random directions and principal
components."""

import dataclasses
import pathlib

import numpy as np

from refusal_jax.judges.behaviours import REFUSAL, Behaviour
from refusal_jax.judges.statistics import Rate, bounded, mean_interval
from refusal_jax.mechanism.activations import activations
from refusal_jax.mechanism.dose import Response, half_place, respond
from refusal_jax.mechanism.edited_prompts import EditedPrompts, planned_passes
from refusal_jax.mechanism.ranks import ablations, left_over, mean_difference, principal_components, random_directions
from refusal_jax.plan.programs import Group, Program, Shapes
from refusal_jax.progress import Progress
from refusal_jax.report.findings import Findings, Section
from refusal_jax.runs.artifacts import DIRECTION, FILTER, METADATA, PROMPTS, RANK, RANK_DIRECTIONS, SETUP
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.stage import Stage
from refusal_jax.study.mechanism.dose import in_nats, in_percent
from refusal_jax.study.mechanism.settings import RankSettings
from refusal_jax.study.mechanism.shared import MechanismStudy

FOUND, RANDOM, COMPONENTS = "found", "random", "components"
KINDS = {
    FOUND: "differences in means, one after another",
    RANDOM: "random directions",
    COMPONENTS: "principal components within kinds",
}


def training(study: MechanismStudy) -> tuple[list[str], list[str]]:
    """Returns the training prompts that the study kept, harmful and harmless, at most as many as the settings say."""
    most = study.settings.rank.n_train
    return study.instructions("harmful_train")[:most], study.instructions("harmless_train")[:most]


@dataclasses.dataclass
class Breaking:
    """The test prompts under ablation of more and more directions of a kind, until it is clear with how many refusal breaks.

    harmful, harmless: of which refusals and damage are read. most: number of directions. base: of both without any.
    """

    study: MechanismStudy
    ledger: Ledger
    harmful: EditedPrompts
    harmless: EditedPrompts
    most: int
    base: tuple[Response, Response]

    def add(self, kind: str, basis_jd: np.ndarray, count: int, so_far: list[tuple[Response, Response]]) -> bool:
        """Measures the ablation of the first `count` directions, appends that, and returns whether the interval is closed."""
        edits, both = ablations(basis_jd, [count], self.most), []
        for side, prompts in (("harmful", self.harmful), ("harmless", self.harmless)):
            part = f"{kind}.{side}.{count}"

            def save(rows: list[dict], part: str = part) -> None:
                self.ledger.append([{"part": part, **row} for row in rows])

            known = [row for row in self.ledger.rows if row.get("part") == part]
            both.append(respond(prompts, edits, known, save))
        so_far.append((both[0], both[1]))
        return half_of(so_far)["high"] is not None

    def found(self) -> tuple[np.ndarray, list]:
        """Returns the directions that are found one after another, and what their ablation does."""
        rows, place = self.study.sizes.forward, self.study.direction().place
        harmful, harmless = training(self.study)
        known = {row["number"]: row for row in self.ledger.rows if "number" in row}
        basis_jd, so_far, first = np.zeros((0, self.study.model.config.d_model)), [self.base], 0.0
        with Progress("rank: directions", self.most, "direction") as bar:
            for number in range(self.most):
                if number in known:
                    next_d, first = np.asarray(known[number]["direction"], np.float64), known[number]["first"]
                else:
                    edits = ablations(basis_jd, [number], self.most) if number else None
                    difference_d = mean_difference(self.study.model, harmful, harmless, place, rows, edits)
                    first = first or float(np.linalg.norm(difference_d))
                    next_d = left_over(difference_d, basis_jd, first)
                    if next_d is None:
                        break
                    self.ledger.append([{"number": number, "direction": next_d.tolist(), "first": first}])
                basis_jd = np.concatenate([basis_jd, next_d[None]])
                bar.update(1)
                if self.add(FOUND, basis_jd, number + 1, so_far):
                    break
        return basis_jd, so_far

    def control(self, kind: str, basis_jd: np.ndarray) -> list:
        """Returns what the ablation of more and more of other directions does."""
        so_far = [self.base]
        with Progress(f"rank: {KINDS[kind]}", len(basis_jd), "direction") as bar:
            for count in range(1, len(basis_jd) + 1):
                done = self.add(kind, basis_jd, count, so_far)
                bar.update(1)
                if done:
                    break
        return so_far


def half_of(so_far: list[tuple[Response, Response]]) -> dict:
    """Returns with how many directions half of the refusals are gone, as `dose.half_place` does."""
    refused_mn = np.concatenate([harmful.refused_mn for harmful, _ in so_far])
    places = np.arange(len(refused_mn), dtype=np.float64)
    return half_place(places, refused_mn[:, refused_mn[0]], between=False)


def measure(study: MechanismStudy, ledger: Ledger) -> None:
    """Writes the directions, and what the ablation of more and more of them does, beside the controls."""
    settings, (position, layer) = study.settings.rank, study.direction().place
    d_model, rows = study.model.config.d_model, study.sizes.forward
    most = min(settings.most, d_model - 1)
    sides = [study.edited_prompts(f"{side}_test", settings.n_prompts) for side in ("harmful", "harmless")]
    base = [respond(prompts, ablations(np.zeros((1, d_model)), [1], most)) for prompts in sides]
    work = Breaking(study, ledger, sides[0], sides[1], most, (base[0], base[1]))
    basis_jd, found = work.found()
    curves = {FOUND: found, RANDOM: work.control(RANDOM, random_directions(most, d_model, settings.seed))}
    places = [(position, layer)]
    points = [activations(study.model, list(prompts), places, rows)[:, 0] for prompts in training(study)]
    curves[COMPONENTS] = work.control(COMPONENTS, principal_components(points, most))
    study.run.write_tensors(RANK_DIRECTIONS, {"directions": basis_jd.astype(np.float32)})
    study.run.write_json(RANK, as_json(study, basis_jd, curves, most))


def as_json(study: MechanismStudy, basis_jd: np.ndarray, curves: dict[str, list], most: int) -> dict:
    """Returns the numbers of the report."""
    direction = study.direction()
    harmful = curves[FOUND][0][0]
    return {
        "most": most,
        "prompts": {"harmful": harmful.scores_mn.shape[1], "harmless": curves[FOUND][0][1].scores_mn.shape[1]},
        "refused": int(harmful.refused_mn[0].sum()),
        "first_cosine": float(basis_jd[0] @ direction.raw_d / direction.norm) if len(basis_jd) else None,
        "half": {kind: half_of(so_far) for kind, so_far in curves.items()},
        "curves": {
            kind: [
                {
                    "directions": number,
                    "refused": bounded(Rate.of(one.refused_mn[0].tolist()).row),
                    "score": bounded(mean_interval(one.scores_mn[0])),
                    "kl": bounded(mean_interval(other.kl_mn[0])),
                }
                for number, (one, other) in enumerate(so_far)
            ]
            for kind, so_far in curves.items()
        },
    }


def in_words(found: dict, kind: str, of: Behaviour = REFUSAL) -> str:
    """Returns with how many directions of a kind half of the refusals are gone, with the interval, in words."""
    half, tried = found["half"][kind], found["curves"][kind][-1]["directions"]
    if not half["n"]:
        return f"the model {of.verb_on} none of the {of.present} prompts"
    if half["at"] is None:
        least = "" if half["low"] is None else f", interval from {half['low']:.0f} on"
        return f"not broken by {tried}{least}"
    high = "or more" if half["high"] is None else f"to {half['high']:.0f}"
    return f"broken by {half['at']:.0f} ({half['low']:.0f} {high})"


def lines(findings: Findings) -> list[str]:
    """Returns the numbers for a terminal."""
    found, of = findings.run.read_json(RANK), findings.behaviour
    out = [
        "",
        f"Rank to break: half of the {of.cases} of {found['refused']} {of.present} prompts, by ablation of several directions:",
    ]
    for kind, words in KINDS.items():
        last = found["curves"][kind][-1]
        out.append(
            f"  {words}: {in_words(found, kind, of)}; with {last['directions']} of them {in_percent(last['refused'])} {of.done}, "
            f"KL {in_nats(last['kl'])}"
        )
    return out


def pictures(findings: Findings) -> list:
    """Returns the curves."""
    from refusal_jax.report.dose_figures import (
        rank_figure,  # imports matplotlib, which the other stages need not pay for
    )

    found = findings.run.read_json(RANK)
    curves = {KINDS[kind]: [row["refused"] for row in found["curves"][kind]] for kind in KINDS}
    return [rank_figure(curves, found["half"][FOUND], findings.behaviour)]


def values(findings: Findings) -> dict:
    """Returns what the report shows beside the curves."""
    found = findings.run.read_json(RANK)
    ends = [
        (words, in_words(found, kind, findings.behaviour), found["curves"][kind][-1]) for kind, words in KINDS.items()
    ]
    return {"rank": found, "ends": ends, "in_nats": in_nats, "in_percent": in_percent}


def programs(shapes: Shapes, rows: int) -> list[Program]:
    """Returns the pass over the test prompts under one subspace in `rows` rows, for `plan`, as if refusal never broke."""
    settings = RankSettings()
    n = min(shapes.work.config.data.n_test, settings.n_prompts)
    edits = len(KINDS) * 2 * settings.most
    return [planned_passes("ranks", shapes, rows, n, edits, alone=True, directions=settings.most)]


def skipped(study: MechanismStudy) -> str:
    """Returns why there is nothing to count, "" if there is."""
    return study.without_tokens


STAGE = Stage(
    "rank",
    measure,
    reads=(PROMPTS, SETUP, FILTER, METADATA, DIRECTION),
    writes=(RANK, RANK_DIRECTIONS),
    skipped=skipped,
    given=lambda study: study.settings.rank.to_dict(),
    programs=Group("ranks", "select", programs, assumed="refusal breaks with no fewer directions than the most"),
    about="Counts how many directions must be ablated until half of the refusals are gone, beside random ones (rank to break).",
    section=Section(
        pathlib.Path(__file__).with_name("rank.html.jinja"),
        {"rank": "Rank to break"},
        values,
        lines=lines,
        pictures=pictures,
        of_direction=True,
        needs=(RANK,),
    ),
)

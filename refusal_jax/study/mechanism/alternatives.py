"""One table of directions that were found in other ways, beside the study's own: what ablation leaves of refusal on test prompts,
what addition makes of it, and what both do to harmless prompts."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping

import numpy as np

from refusal_jax.chat.messages import Prompt
from refusal_jax.edits import Edits, orthonormal
from refusal_jax.judges.behaviours import REFUSAL, Behaviour
from refusal_jax.judges.judge import Judge, reply_shows
from refusal_jax.judges.statistics import PairedRates, Rate, bounded, mean_interval
from refusal_jax.judges.text import PAPERS, TEXT_JUDGES
from refusal_jax.mechanism.edited_prompts import EditedPrompts
from refusal_jax.mechanism.som import padded
from refusal_jax.plan.programs import Group
from refusal_jax.report.findings import Findings, Section
from refusal_jax.runs.artifacts import (
    ALTERNATIVES,
    CONE_BASES,
    CONES,
    COSMIC,
    DIRECTION,
    MEANS,
    METADATA,
    PROMPTS,
    SOM,
    SOM_DIRECTIONS,
)
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.stage import Stage
from refusal_jax.study import completions
from refusal_jax.study.edited_replies import edited_replies
from refusal_jax.study.mechanism.shared import MechanismStudy

OWN = "difference in means"
NONE = "none"  # what the unedited model does, to which harmless replies are compared
# How a reply comes about: which prompts are asked, and whether the directions are ablated or added.
HARMFUL_ABLATED, HARMLESS_ABLATED, HARMLESS_ADDED = KINDS = ("harmful ablated", "harmless ablated", "harmless added")


@dataclasses.dataclass(frozen=True)
class Alternative:
    """Directions that are ablated together, `[J, D]` with their norms. layer: where the only one is added, None for several.
    seconds: that it took to find them. note: what else is to be said of them, as a clause."""

    name: str
    rows_jd: np.ndarray
    layer: int | None
    seconds: float
    note: str = ""

    def cosine(self, own_d: np.ndarray) -> float:
        """Returns the cosine with the study's direction; of several directions, the length of its part within their span."""
        own_d = own_d / np.linalg.norm(own_d)
        if len(self.rows_jd) == 1:
            return float(self.rows_jd[0] @ own_d / np.linalg.norm(self.rows_jd[0]))
        return float(np.linalg.norm(orthonormal(self.rows_jd[None])[0] @ own_d))


def alternatives(study: MechanismStudy) -> list[Alternative]:
    """Returns the study's direction, and those that the parts before this one have found."""
    run, direction = study.run, study.direction()
    stages = run.manifest["stages"]
    spent = sum(stages[name]["seconds"] for name in ("activations", "selection") if name in stages)
    found = [Alternative(OWN, direction.raw_jd, direction.layer, spent)]
    if run.exists(COSMIC) and (pick := run.read_json(COSMIC)["pick"]):
        chosen_d = run.read_tensors(MEANS)["mean_diffs"][pick["position"], pick["layer"]]
        found.append(Alternative("COSMIC's selection", chosen_d[None], pick["layer"], run.read_json(COSMIC)["seconds"]))
    if run.exists(CONE_BASES):
        cones, bases = run.read_json(CONES), run.read_tensors(CONE_BASES)
        seconds = {cone["dimension"]: cone["seconds"] for cone in cones["cones"]}
        single_jd = direction.norm * bases["basis_1"].astype(np.float64)
        found.append(Alternative("by gradient (RDO)", single_jd, direction.layer, seconds[1]))
        if (k := max(cones["dimension"], 2)) in seconds:
            whole_jd, held = bases[f"basis_{k}"].astype(np.float64), cones["dimension"] == k
            spent, note = (
                sum(seconds[i] for i in range(1, k + 1)),
                "" if held else f"it is no cone of {study.behaviour.name}",
            )
            found.append(Alternative(f"cone of dimension {k}", whole_jd, None, spent, note))
    if run.exists(SOM_DIRECTIONS):
        map_jd = run.read_tensors(SOM_DIRECTIONS)["directions"].astype(np.float64)
        layer = direction.layer if len(map_jd) == 1 else None
        many = f"{len(map_jd)} direction{'s' if len(map_jd) > 1 else ''}"
        found.append(Alternative(f"map (SOM), {many}", map_jd, layer, run.read_json(SOM)["seconds"]))
    return found


def edits_of(found: list[Alternative], n_layers: int) -> dict[tuple[str, str], Edits]:
    """Returns the one-row edit of each alternative by its name and the kind of reply, and those of the unedited model."""
    width = max(2, *(len(one.rows_jd) for one in found))
    none = Edits.none(found[0].rows_jd.shape[1])
    edits = {(NONE, kind): none for kind in KINDS[:2]}
    for one in found:
        ablated = Edits.ablate(padded([one.rows_jd], width))
        edits |= {(one.name, HARMFUL_ABLATED): ablated, (one.name, HARMLESS_ABLATED): ablated}
        if one.layer is not None:
            edits[one.name, HARMLESS_ADDED] = Edits.add(one.rows_jd[0], one.layer)
    return edits


def judge_of(study: MechanismStudy) -> Judge:
    """Returns the first of the study's judges that looks for phrases, or the paper's; that of another behaviour."""
    judge = study.reply_judge(next((TEXT_JUDGES[name] for name in study.config.judges if name in TEXT_JUDGES), PAPERS))
    assert judge is not None, "without one the part is skipped"
    return judge


def replies(
    study: MechanismStudy, edits: dict[tuple[str, str], Edits], ledger: Ledger
) -> dict[tuple[str, str], list[dict]]:
    """Returns for each edit a row for each test prompt, with whether the reply refuses and a hash of it. The replies themselves
    are not kept: those to harmful prompts are needed for nothing else."""
    judge, keys = judge_of(study), list(edits)
    sides = {side: study.instructions(f"{side}_test", kept_only=False) for side in ("harmful", "harmless")}
    texts = [*sides["harmful"], *sides["harmless"]]

    def numbers(kind: str) -> range:
        """Returns which of the texts are asked for a kind of reply."""
        first = 0 if kind.split()[0] == "harmful" else len(sides["harmful"])
        return range(first, first + len(sides[kind.split()[0]]))

    def read(prompt: Prompt, reply: Mapping) -> dict:
        said = reply["response"]
        digest = hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        return {"refused": reply_shows(judge, said), "said": digest}

    read_rows = edited_replies(
        study,
        ledger,
        texts,
        Edits.concat([edits[key] for key in keys]),
        [(m, i) for m, (_, kind) in enumerate(keys) for i in numbers(kind)],
        read,
        max_new_tokens=study.settings.alternatives.max_new_tokens,
        title="alternatives",
    )
    return {key: [read_rows[m, i] for i in numbers(key[1])] for m, key in enumerate(keys)}


def compare(study: MechanismStudy, ledger: Ledger) -> None:
    """Writes the table."""
    found, own_d = alternatives(study), study.direction().raw_d
    edits = edits_of(found, study.model.config.n_layers)
    said = replies(study, edits, ledger)
    harmless = EditedPrompts.build(
        study.model, study.instructions("harmless_test", kept_only=False), study.sizes.select
    )
    kl_mn = harmless.read(Edits.concat([edits[one.name, HARMFUL_ABLATED] for one in found])).kl_mn

    def refused(name: str, kind: str) -> list[int]:
        return [int(row["refused"]) for row in said[name, kind]]

    unedited = [row["said"] for row in said[NONE, HARMLESS_ABLATED]]
    rows = []
    for one, kl_n in zip(found, kl_mn, strict=True):
        pair = PairedRates.of(refused(OWN, HARMFUL_ABLATED), refused(one.name, HARMFUL_ABLATED))
        kept = [
            int(row["said"] == before) for row, before in zip(said[one.name, HARMLESS_ABLATED], unedited, strict=True)
        ]
        added = Rate.of(refused(one.name, HARMLESS_ADDED)).row if one.layer is not None else None
        rows.append(
            {
                "name": one.name,
                "directions": len(one.rows_jd),
                "cosine": one.cosine(own_d),
                "ablated": Rate.of(refused(one.name, HARMFUL_ABLATED)).row,
                "difference": {"mean": pair.difference, "low": pair.interval[0], "high": pair.interval[1]},
                "added": added,
                "kl": bounded(mean_interval(kl_n)),
                "kept": Rate.of(kept).row,
                "seconds": one.seconds,
                "note": one.note,
            }
        )
    before = {kind: Rate.of(refused(NONE, kind)).row for kind in KINDS[:2]}
    record = {"rows": rows, "unedited": before, "judge": judge_of(study).name}
    study.run.write_json(ALTERNATIVES, record | {"max_new_tokens": study.settings.alternatives.max_new_tokens})


def verdict(row: dict, of: Behaviour = REFUSAL) -> str:
    """Returns how an alternative compares with the study's direction in words: better or worse only where the interval of the
    paired difference allows it."""
    if row["name"] == OWN:
        return "the study's own"
    low, high = row["difference"]["low"], row["difference"]["high"]
    words = f"leaves less {of.name}" if high < 0 else f"leaves more {of.name}" if low > 0 else "no difference shown"
    return f"{words}; {row['note']}" if row["note"] else words


def percent(row: dict | None) -> str:
    """Returns a rate with its interval in words, "–" where there is none."""
    return f"{100 * row['rate']:.1f} % ({100 * row['low']:.0f} to {100 * row['high']:.0f})" if row else "–"


def lines(findings: Findings) -> list[str]:
    """Returns the table for a terminal."""
    found, of = findings.run.read_json(ALTERNATIVES), findings.behaviour
    width = max(len(row["name"]) for row in found["rows"])
    out = [
        "",
        f"Other ways to find directions ({of.kept_present} test prompts under ablation, {of.absent} ones under addition):",
    ]
    for row in found["rows"]:
        out.append(
            f"  {row['name']:<{width}}  cosine {row['cosine']:5.3f}, ablated {percent(row['ablated'])}, added "
            f"{percent(row['added'])}, KL {row['kl']['mean']:.4f}, answers kept {100 * row['kept']['rate']:.0f} %, "
            f"{row['seconds']:.0f} s: {verdict(row, of)}"
        )
    return out


def values(findings: Findings) -> dict:
    """Returns what the report shows of the table."""
    found, of = findings.run.read_json(ALTERNATIVES), findings.behaviour
    return {"alternatives": found, "verdict": lambda row: verdict(row, of), "percent": percent}


def reads(study: MechanismStudy) -> list[str]:
    """Returns the study's files, and those of the parts before this one that are done: it asks for none that is not."""
    parts = (COSMIC, SOM, SOM_DIRECTIONS, CONES, CONE_BASES)
    return [PROMPTS, MEANS, METADATA, DIRECTION, *(name for name in parts if study.run.exists(name))]


STAGE = Stage(
    "alternatives",
    compare,
    reads=reads,
    writes=(ALTERNATIVES,),
    skipped=lambda study: study.without_reply_judge,
    given=lambda study: study.settings.alternatives.to_dict(),
    programs=Group("alternatives", "generation", completions.programs, assumed="its replies cost what the study's did"),
    about="Compares the directions of cosmic, som and cones with the study's: cosines, refusals, damage.",
    section=Section(
        pathlib.Path(__file__).with_name("alternatives.html.jinja"),
        {"alternatives": "Alternatives"},
        values,
        lines=lines,
        of_direction=True,
        needs=(ALTERNATIVES,),
    ),
)

"""Directions and cones that are found by gradient, their dimension, and their independence (arXiv 2502.17420)."""

import math
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from refusal_jax.chat.padding import bucket
from refusal_jax.judges.behaviours import REFUSAL, Behaviour
from refusal_jax.judges.statistics import bounded, mean_interval
from refusal_jax.judges.text import EXTENDED
from refusal_jax.mechanism.cone_targets import NoTargets, cone_data
from refusal_jax.mechanism.cones import (
    ConeRecipe,
    Trained,
    direction_losses,
    find_cones,
    gram_schmidt,
    unit,
)
from refusal_jax.mechanism.direction_loss import losses_and_gradients
from refusal_jax.mechanism.edited_prompts import EditedPrompts
from refusal_jax.mechanism.independence import cosine_changes, dependence
from refusal_jax.mechanism.mediation import Mediation, cone_holds, dimension, mediations
from refusal_jax.models.hf_config import load_config
from refusal_jax.plan.programs import Group, Program, Shapes
from refusal_jax.progress import Progress
from refusal_jax.report.findings import Findings, Section
from refusal_jax.runs.artifacts import CONE_BASES, CONES, DIRECTION, FILTER, METADATA, PROMPTS, SETUP
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.stage import Stage
from refusal_jax.study.mechanism.settings import ConeSettings
from refusal_jax.study.mechanism.shared import MechanismStudy


def recipe_of(settings: ConeSettings) -> ConeRecipe:
    """Returns how cones are trained on this machine."""
    on_cpu = jax.default_backend() == "cpu"
    names = ("steps", "rate", "ablation", "addition", "retain", "patience")
    few = {"batch": settings.batch or (4 if on_cpu else 16), "samples": settings.samples or (4 if on_cpu else 8)}
    return ConeRecipe(**few, **{name: settings[name] for name in names})


def skipped(study: MechanismStudy) -> str:
    """Returns why no cone can be trained, "" if one can."""
    if load_config(study.folder).n_experts:
        return "Cones are trained by gradient, and the loop over experts of this model has none."
    return study.without_tokens or study.without_reply_judge


def train_cones(study: MechanismStudy, ledger: Ledger) -> None:
    """Writes the cones of dimension 1, 2 and so on, until one does not mediate refusal, with what each of its directions does."""
    begun, settings = time.monotonic(), study.settings.cones
    try:
        trained, tested, own = trained_cones(study, ledger)
    except NoTargets as none:
        study.run.write_json(CONES, {"none": str(none)})
        return
    direction, threshold = study.direction(), study.config.select.kl_threshold
    holds = {k: cone_holds(found, threshold) for k, found in tested.items()}
    cones = [
        {
            "dimension": k,
            "holds": holds[k],
            "steps": len(trained[k].losses),
            "loss": min(trained[k].losses),
            "seconds": trained[k].seconds,
            "cosines": (trained[k].basis_kd @ unit(direction.raw_jd)[0]).tolist(),
            "directions": [one.row(threshold) for one in found],
        }
        for k, found in tested.items()
    ]
    largest = max(trained)
    record = {"cones": cones, "dimension": dimension(holds), "largest": largest, "tried": settings.dimensions}
    record |= {"kl_threshold": threshold, "layer": direction.layer, "norm": direction.norm, "own": own.row(threshold)}
    record["independence"] = independence(study, trained, settings.seed)
    bases = {f"basis_{k}": cone.basis_kd.astype(np.float32) for k, cone in trained.items()}
    held = bases[f"basis_{max(record['dimension'], 1)}"]
    study.run.write_tensors(CONE_BASES, bases | {"directions": held})
    study.run.write_json(CONES, record | {"seconds": time.monotonic() - begun})


def trained_cones(
    study: MechanismStudy, ledger: Ledger
) -> tuple[dict[int, Trained], dict[int, list[Mediation]], Mediation]:
    """Returns the cones by dimension, the effects of their directions, and those of the study's direction. Raises NoTargets as
    `cone_data` does."""
    settings, direction, model, ids = study.settings.cones, study.direction(), study.model, study.refusal_ids()
    recipe, norm, (_, layer) = recipe_of(settings), direction.norm, direction.place
    sides = study.instructions("harmful_train"), study.instructions("harmless_train")
    judge, rows = study.reply_judge(EXTENDED), study.sizes.generation
    assert judge is not None, "without one the part is skipped"
    data = cone_data(
        model, direction, *sides, tokens=settings.target_tokens, rows=rows, judge=judge, of=study.behaviour
    )
    harmful, harmless = (
        EditedPrompts.build(model, study.instructions(split), study.sizes.select, ids)
        for split in ("harmful_val", "harmless_val")
    )

    def test(units_md: np.ndarray) -> list[Mediation]:
        return mediations(harmful, harmless, units_md, layer, norm)

    def losses(index: np.ndarray, units_md: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return direction_losses(model, data, index, units_md, layer, norm, recipe, study.sizes.loss)

    def save(dimension: int, cone: Trained) -> None:
        basis, losses = cone.basis_kd.tolist(), list(cone.losses)
        ledger.append([{"dimension": dimension, "basis": basis, "losses": losses, "seconds": cone.seconds}])

    known = {
        row["dimension"]: Trained(np.asarray(row["basis"]), tuple(row["losses"]), row["seconds"]) for row in ledger.rows
    }
    with Progress("cones", recipe.steps * settings.dimensions, "step") as bar:
        cones = find_cones(
            losses,
            data.retain.count,
            test,
            np.random.default_rng(settings.seed).normal(size=model.config.d_model),
            recipe,
            dimensions=settings.dimensions,
            drawn=settings.drawn,
            seed=settings.seed,
            kl_threshold=study.config.select.kl_threshold,
            known=known,
            save=save,
            told=lambda step: bar.update(1),
        )
    return *cones, test(unit(direction.raw_jd))[0]


def independence(study: MechanismStudy, trained: dict[int, Trained], seed: int) -> list[dict]:
    """Returns for each direction how independent the study's direction and it are of each other, on harmful validation prompts:
    of the one that was found by gradient, of the basis of the largest cone, and of a random one that is orthogonal."""
    own_d, largest = unit(study.direction().raw_jd)[0], max(trained)
    random_d = gram_schmidt(np.stack([own_d, np.random.default_rng(seed).normal(size=len(own_d))]))[1]
    named = {"found by gradient": trained[1].basis_kd[0]}
    if largest > 1:
        named |= {f"direction {i} of the cone": basis_d for i, basis_d in enumerate(trained[largest].basis_kd, 1)}
    named["random, orthogonal"] = random_d
    units_jd = np.stack([own_d, *named.values()])
    prompts = study.instructions("harmful_val")
    changes_jjln = cosine_changes(study.model, prompts, units_jd, study.sizes.forward)
    both_jjn = dependence(changes_jjln)
    return [
        {
            "name": name,
            "cosine": float(units_jd[i] @ own_d),
            "dependence": bounded(mean_interval(both_jjn[0, i])),
            "of_own": changes_jjln[i, 0].mean(axis=1).tolist(),  # how the study's changes while this one is ablated
            "of_other": changes_jjln[0, i].mean(axis=1).tolist(),
        }
        for i, name in enumerate(named, 1)
    ]


def programs(shapes: Shapes, rows: int) -> list[Program]:
    """Returns the gradients of both losses for one step of each dimension, for `plan`, as if every dimension took all its
    steps."""
    work, settings = shapes.work, shapes.work.further.cones
    length = bucket(work.length + settings.target_tokens)
    batch, samples = settings.batch or 16, settings.samples or 8
    directions = sum(k + (samples if k > 1 else 0) for k in range(1, settings.dimensions + 1))

    def program(name: str, retain: bool, kinds: int) -> Program:
        def lower():
            inputs = *shapes.prompts(rows, length), shapes.edits(rows), shapes.array((rows, length), jnp.bool_)
            return losses_and_gradients.lower(shapes.decoder, *inputs, read=settings.target_tokens, retain=retain)

        calls = settings.steps * math.ceil(kinds * directions * batch / rows)
        layers, read = work.cfg.n_layers, settings.target_tokens
        return Program(name, lower, calls, rows, length, layers, steps=3.0 + retain, read=read)

    return [program("kept answers", True, 1), program("replies", False, 2)]


def in_words(found: dict, of: Behaviour = REFUSAL) -> str:
    """Returns the dimension of the cone in sentences."""
    k, last = found["dimension"], found["cones"][-1]
    few = "is open: there are too few validation prompts, or its effect is near the bounds."
    if not k and last["holds"] is None:
        return f"Whether the direction that was found by gradient mediates {of.name} {few}"
    if not k:
        head = f"No direction that was found by gradient mediates {of.name} on the validation prompts."
        head += " The study's own direction does, so that the training fell short." if found["own"]["holds"] else ""
    elif k == 1:
        head = f"{of.title} is mediated by a cone of one dimension: a single direction."
    else:
        head = f"{of.title} is mediated by a cone of {k} dimensions: the study's direction is not the only one."
    if last["holds"] is None:
        return f"{head} Whether one of {last['dimension']} does {few}"
    if last["holds"]:
        return f"{head} No larger one was tried." if found["tried"] == k else head
    failing = sum(row["holds"] is False for row in last["directions"])
    many = len(last["directions"])
    return (
        f"{head} Of a cone of dimension {last['dimension']}, {failing} of {many} directions do not mediate {of.name}."
    )


def share(row: dict) -> str:
    """Returns the range of rates of a cone's directions in words."""
    return f"{100 * row['rate']:.0f} %"


def lines(findings: Findings) -> list[str]:
    """Returns the cones and the independence of directions, for a terminal."""
    found, of = findings.run.read_json(CONES), findings.behaviour
    if "none" in found:
        return ["", f"Cones: {found['none']}"]
    out = ["", f"Cones: {in_words(found, of)}"]
    for cone in found["cones"]:
        left, made = ([row[side] for row in cone["directions"]] for side in ("ablated", "added"))
        worst, least = max(left, key=lambda row: row["rate"]), min(made, key=lambda row: row["rate"])
        out.append(
            f"  dimension {cone['dimension']}: at most {share(worst)} {of.done} under ablation, at least {share(least)} under "
            f"addition, over {len(left)} direction{'s' if len(left) > 1 else ''}; {cone['steps']} steps, {cone['seconds']:.0f} s"
        )
    for row in found["independence"]:
        out.append(
            f"  {row['name']}: cosine {row['cosine']:.3f} with the study's direction, dependence "
            f"{row['dependence']['mean']:.4f}"
        )
    return out


def values(findings: Findings) -> dict:
    """Returns what the report shows of the cones."""
    found = findings.run.read_json(CONES)
    return {"cones": found, "words": "" if "none" in found else in_words(found, findings.behaviour)}


def pictures(findings: Findings) -> list:
    """Returns the figures of what directions of cones do, and of their independence; none if there are no cones."""
    found = findings.run.read_json(CONES)
    if "none" in found:
        return []
    from refusal_jax.report import cone_figures  # imports matplotlib, which the other stages need not pay for

    return [
        cone_figures.mediation_picture(
            {cone["dimension"]: cone["directions"] for cone in found["cones"]}, findings.behaviour
        ),
        cone_figures.change_picture({row["name"]: row["of_own"] for row in found["independence"]}),
    ]


STAGE = Stage(
    "cones",
    train_cones,
    reads=(PROMPTS, SETUP, FILTER, METADATA, DIRECTION),
    writes=(CONES, CONE_BASES),
    skipped=skipped,
    given=lambda study: study.settings.cones.to_dict(),
    programs=Group("cones", "loss", programs, assumed="every cone takes all its steps"),
    about="Trains cones of directions that mediate refusal, by gradient, and finds their dimension.",
    section=Section(
        pathlib.Path(__file__).with_name("cones.html.jinja"),
        {"cones": "Cones"},
        values,
        lines=lines,
        of_direction=True,
        needs=(CONES,),
        pictures=pictures,
    ),
)

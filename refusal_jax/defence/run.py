"""Makes a defence from beginning to end: its data, the model before, the training or edit, the result, the model after."""

import dataclasses
import functools
import gc
import logging
import math
import pathlib
import shutil
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from refusal_jax import distributed, hub
from refusal_jax.chat.conditional import RECORD as CONDITIONAL
from refusal_jax.chat.conditional import STEERING, VECTORS, Conditional
from refusal_jax.chat.model import ChatModel, demo_model_path, load_model
from refusal_jax.checkpoints.fingerprint import checkpoint_fingerprint
from refusal_jax.checkpoints.opened import model_folder
from refusal_jax.defence.asked import asked_for
from refusal_jax.defence.catalogue import named
from refusal_jax.defence.data import DefenceData, read_data
from refusal_jax.defence.lessons import Lesson
from refusal_jax.defence.measure import compared, divergences, outcomes
from refusal_jax.defence.recipe import Recipe
from refusal_jax.defence.settings import DefenceSettings
from refusal_jax.defence.written import (
    ADAPTER,
    MODEL,
    Origin,
    is_exact,
    last_logits,
    mark_verified,
    outputs_of,
    write_edited,
    write_trained,
)
from refusal_jax.errors import UserError, VerificationError
from refusal_jax.export.staging import PROVENANCE
from refusal_jax.files import local_path
from refusal_jax.judges.judge import Judge
from refusal_jax.models.scores import kl_divergence
from refusal_jax.models.sharding import make_mesh
from refusal_jax.plan.planner import ON_CPU, WANTED
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.run import Run, versions
from refusal_jax.runs.stage import Stage
from refusal_jax.training.checkpoints import LOSSES
from refusal_jax.training.trainer import train

LOG = logging.getLogger(__name__)
DATA, BEFORE, RESULT, AFTER, RECORD = "data.json", "before.json", "result.json", "after.json", "defence.json"
CHECK = "check.safetensors"  # logits that the written result is compared with
TRAINING = "training"  # folder of the training's states
# The files by which a result is known to be there, and which one it is.
MARKED = {kind: (f"{kind}/{PROVENANCE}",) for kind in (MODEL, ADAPTER)} | {
    STEERING: (f"{STEERING}/{VECTORS}", f"{STEERING}/{CONDITIONAL}")
}
RESULTS = tuple(file for files in MARKED.values() for file in files)
SCHEMA = "refusal_jax/defence/1"
# The largest mean KL divergence, nats, of the written result from what was trained, by whether nothing is rounded: the source,
# whose dtype the result has, is in float32, and so is what computes.
MOST_KL = {True: 1e-5, False: 2e-2}


class Defence:
    """Holds what the stages of one defence share. source: the folder of the undefended checkpoint. judge: of replies. command:
    that makes the defence again, for cards."""

    def __init__(
        self, recipe: Recipe, settings: DefenceSettings, run: Run, source: pathlib.Path, judge: Judge, command: str
    ):
        self.recipe, self.settings, self.run, self.source, self.judge = recipe, settings, run, source, judge
        self.command = command

    @functools.cached_property
    def model(self) -> ChatModel:
        """Returns the undefended model, loaded on first use."""
        return self.loaded(self.source)

    @functools.cached_property
    def data(self) -> DefenceData:
        """Returns what the defence learns from, as the first stage has written it."""
        found = dict(self.run.read_json(DATA))
        lessons = {name: tuple(Lesson(**one) for one in found[name]) for name in ("refused", "answered", "complied")}
        names = ("refusals", "harmful_test", "harmless_test", "notes", "harmless")  # older runs lack the last one
        rest = {name: tuple(found.get(name, ())) for name in names}
        return DefenceData(**lessons, **rest, corpus=found["corpus"])

    @property
    def held_out(self) -> dict[str, tuple]:
        """Returns the held-out prompts by side."""
        return {"harmful": self.data.harmful_test, "harmless": self.data.harmless_test}

    @property
    def rows(self) -> int:
        """Returns how many replies are decoded at a time."""
        usual = ON_CPU if jax.default_backend() == "cpu" else WANTED
        return self.settings.batch_size or usual.generation

    @property
    def template(self) -> dict[str, Any]:
        """Returns the settings of the chat template."""
        return {name: self.settings[name] for name in ("chat_template", "thinking", "system_prompt")}

    @property
    def origin(self) -> Origin:
        """Returns what cards say of where the result comes from."""
        return Origin(self.recipe, self.source, self.command, template=self.template)

    def loaded(self, folder: pathlib.Path) -> ChatModel:
        """Returns the model in a folder, on the mesh of the settings."""
        settings = self.settings
        return load_model(folder, settings.dtype, mesh_of(settings), progress=distributed.first(), **self.template)

    def target(self, kind: str) -> pathlib.Path:
        """Returns the folder of a result, which is not there: one that an earlier run has left is removed."""
        folder = pathlib.Path(self.run.path(kind))
        if distributed.first() and folder.exists():
            shutil.rmtree(folder)
        return folder


def mesh_of(settings: DefenceSettings) -> jax.sharding.Mesh | None:
    """Returns the mesh that the settings ask for. Where they leave it open, rows and storage are divided as far as a part of the
    batch allows, and heads over the devices that are left; a process that has a CPU for itself uses one device.

    Raises UserError as `make_mesh` does.
    """
    given = {name: size for name, size in settings.mesh.items() if size}
    if given:
        return make_mesh(**given) if any(size != 1 for size in given.values()) else None
    count = jax.device_count()
    if count == 1 or (jax.default_backend() == "cpu" and jax.process_count() == 1):
        return None
    storage = math.gcd(count, settings.train.batch // settings.train.accumulate)
    return make_mesh(fsdp=storage, model=count // storage)


def gather_data(shared: Defence, ledger: Ledger) -> None:
    """Writes the prompts and replies that are learnt, and the held-out prompts."""
    settings = shared.settings
    data = read_data(shared.model, settings.data, lambda text: LOG.info(f"Data: {text}"), settings.max_new_tokens)
    shared.run.write_json(DATA, dataclasses.asdict(data))


def measure_before(shared: Defence, ledger: Ledger) -> None:
    """Writes what the undefended model does with the held-out prompts."""
    settings = shared.settings
    did = outcomes(shared.model, shared.held_out, shared.judge, settings.max_new_tokens, shared.rows)
    shared.run.write_json(BEFORE, did)


def defend_model(shared: Defence, ledger: Ledger) -> None:
    """Trains or edits the model, and writes the result."""
    start = time.monotonic()
    found = trained_result(shared) if shared.recipe.objective else edited_result(shared)
    for kind in found["outputs"]:
        if distributed.first():  # so that the stage is due again if the folder is gone
            for file in MARKED[kind]:
                shared.run.write(file, shared.run.storage.read(file))
    shared.run.write_json(RESULT, found | {"seconds": round(time.monotonic() - start, 3)})


def trained_result(shared: Defence) -> dict[str, Any]:
    """Trains the model and writes the result; returns what is recorded of it."""
    run, settings, recipe = shared.run, shared.settings, shared.recipe
    assert recipe.objective is not None
    notes: list[str] = []
    objective = recipe.objective(shared.model, shared.data, settings, notes.append)
    for text in notes:
        LOG.info(f"Data: {text}")
    given = {"recipe": recipe.name, "settings": recorded(settings), "data": run.hash(DATA)}
    given |= {"model": run.manifest["inputs"]["model"]}
    folder = pathlib.Path(run.path(TRAINING))
    trained = train(shared.model, objective, settings.train, folder, title=recipe.name, given=given)
    outputs = outputs_of(settings.output, settings.train.method)
    for kind in outputs:
        write_trained(shared.origin, trained, shared.target(kind), kind)
    after = dataclasses.replace(shared.model, decoder=trained.decoder)
    run.write_tensors(CHECK, {"logits": last_logits(after, shared.held_out)})
    if distributed.first():
        run.write(LOSSES, (folder / LOSSES).read_bytes())
    return {
        "outputs": outputs,
        "training": {
            "method": settings.train.method,
            "trained_parameters": trained.parameters,
            "first": trained.losses[0],
            "last": trained.losses[-1],
            "notes": notes,
        },
    }


def edited_result(shared: Defence) -> dict[str, Any]:
    """Edits the model by a recipe without training and writes the result; returns what is recorded of it."""
    settings, recipe = shared.settings, shared.recipe
    assert recipe.edit is not None
    change = recipe.edit(shared.model, shared.data, settings, lambda text: LOG.info(text))
    record: dict[str, Any] = {"outputs": [], "found": dict(change.found)}
    if change.steering is not None:
        folder = shared.target(STEERING)
        if distributed.first():
            change.steering.write(folder)
        record["outputs"].append(STEERING)
    if change.edit is not None:
        for kind in outputs_of(settings.output, "lora"):
            found = write_edited(shared.origin, change.edit, shared.held_out, shared.target(kind), kind)
            record["outputs"].append(kind)
            record.setdefault("verification", found)  # of the first kind, and of each by its name
            record.setdefault("verifications", {})[kind] = found
            if problems := found.get("problems"):
                raise VerificationError(f"The verification of {shared.run.path(kind)} failed: {'; '.join(problems)}.")
    return record


def measure_after(shared: Defence, ledger: Ledger) -> None:
    """Reads all results back, compares them with what was trained, and writes what the first does with the held-out prompts."""
    run, settings, outputs = shared.run, shared.settings, shared.run.read_json(RESULT)["outputs"]
    edits, model, kinds = None, shared.model, [kind for kind in outputs if kind != STEERING]
    if STEERING in outputs:
        edits = Conditional.read(pathlib.Path(run.path(STEERING)))
    checks = {kind: read_back(shared, kind)[1] for kind in kinds[1:]}
    if kinds:
        model, checks[kinds[0]] = read_back(shared, kinds[0])
    did = outcomes(model, shared.held_out, shared.judge, settings.max_new_tokens, shared.rows, edits)
    kl = divergences(shared.model, model, shared.data.harmless_test, edits)
    run.write_json(AFTER, {"did": did, "kl": kl.tolist(), "checks": checks})
    gc.collect()


def read_back(shared: Defence, kind: str) -> tuple[ChatModel, dict[str, float]]:
    """Returns the model of a written result and, if it was trained, how far it is from that; it then counts as verified.

    Raises VerificationError as `compared_with_trained` does.
    """
    folder = pathlib.Path(shared.run.path(kind))
    model = shared.loaded(folder if kind == MODEL else model_folder(str(folder), str(shared.source)))
    if shared.recipe.objective is None:
        return model, {}  # the export has verified it
    check = compared_with_trained(shared, model, kind)
    mark_verified(folder)
    return model, check


def compared_with_trained(shared: Defence, model: ChatModel, kind: str) -> dict[str, float]:
    """Returns how far a written result, read back as `model`, is from what was trained, at the last token of held-out prompts.

    Raises VerificationError if that is more than rounding explains.
    """
    want, found = shared.run.read_tensors(CHECK)["logits"], last_logits(model, shared.held_out)
    kl = float(np.mean(np.asarray(kl_divergence(want, found), np.float64)))
    exact = is_exact(shared.source) and {str(one.decoder.dtype) for one in (model, shared.model)} == {"float32"}
    check = {"max_logit_difference": float(np.abs(want - found).max()), "mean_kl": kl, "prompts": len(want)}
    if not kl <= MOST_KL[exact]:
        raise VerificationError(
            f"The result in {shared.run.path(kind)} is not what was trained: at {len(want)} held-out prompts its next tokens "
            f"diverge by {kl:.2e} nats, over {MOST_KL[exact]:.0e}. If the checkpoint's own weights are stored in less precision "
            "than the training's, train with a smaller effect on single weights, or write an adapter."
        )
    return check


def write_record(shared: Defence, ledger: Ledger) -> None:
    """Writes defence.json, after which the states of the training are needed no more."""
    run, recipe, data = shared.run, shared.recipe, shared.data
    result, after = run.read_json(RESULT), run.read_json(AFTER)
    sides = {
        name: len(getattr(data, name)) for name in ("refused", "answered", "complied", "harmful_test", "harmless_test")
    }
    run.write_json(
        RECORD,
        {
            "schema": SCHEMA,
            "recipe": {"name": recipe.name, "about": recipe.about, "source": recipe.source},
            "model": {
                "name": shared.settings.model or "the embedded model",
                "fingerprint": run.manifest["inputs"]["model"],
            },
            "settings": recorded(shared.settings),
            "data": {**sides, "notes": list(data.notes)},
            **{name: value for name, value in result.items()},
            "check": after["checks"].get(result["outputs"][0], {}),
            "checks": after["checks"],
            "measured": compared(run.read_json(BEFORE), after["did"], after["kl"]) | {"judge": shared.settings.judge},
            "versions": versions(),
        },
    )
    if not shared.settings.keep_states:
        shutil.rmtree(run.path(TRAINING), ignore_errors=True)


STAGES: tuple[Stage[Defence], ...] = (
    Stage("data", gather_data, writes=(DATA,)),
    Stage("before", measure_before, reads=(DATA,), writes=(BEFORE,)),
    Stage("defend", defend_model, reads=(DATA,), writes=(RESULT, CHECK, LOSSES, *RESULTS)),
    Stage("after", measure_after, reads=(DATA, RESULT, CHECK, *RESULTS), writes=(AFTER,)),
    Stage("record", write_record, reads=(DATA, BEFORE, RESULT, AFTER), writes=(RECORD,), alone=True),
)


def recorded(settings: DefenceSettings) -> dict[str, Any]:
    """Returns the settings that decide what comes of a defence."""
    values = settings.to_dict()
    del values["keep_states"], values["train"]["every"]
    return values


def defend(given: Mapping[str, Any], out: str | pathlib.Path, command: str = "") -> dict[str, Run]:
    """Makes the defences that `given["recipe"]` names, a name, several separated by commas, or "all", and returns their runs.

    given: settings, nested; what is left out is the recipe's own choice for the model. out: a local folder; of several recipes,
    each gets one of its name in it. All settings are checked before any work. The same call goes on with what was stopped, and
    does nothing for what is done. command: the command line, for the model cards. Of several processes all must call it alike,
    with a folder that all see.

    Raises UserError for settings, data or a model that cannot be used, and for a folder that holds something else;
    VerificationError, which is one, for a result that is not what was trained.
    """
    named(str(given.get("recipe", "")))  # before anything is fetched
    if "://" in str(out):
        raise UserError(f"{out} is an address: a defence writes a model, for which it needs a local folder. Pass one.")
    folder, runs = local_path(out), {}
    with hub.session({}):
        source = model_folder(str(given["model"])) if given.get("model") else demo_model_path()
        for one in asked_for(given, source):
            inputs = {"model": checkpoint_fingerprint(source), "judge": one.judge.fingerprint()}
            with Run.open(folder / one.name, recorded(one.settings), inputs) as run:
                shared = Defence(one.recipe, one.settings, run, source, one.judge, command)
                for stage in STAGES:
                    run.stage(stage, shared)
            runs[one.recipe.name] = run
    return runs

"""Adds the mechanism to a finished study, as further stages in its folder."""

import os
from collections.abc import Mapping
from typing import Any

from refusal_jax import distributed, hub
from refusal_jax.chat.model import demo_model_path
from refusal_jax.checkpoints.fingerprint import checkpoint_fingerprint
from refusal_jax.checkpoints.remote import checkpoint_folder
from refusal_jax.errors import UserError, setting
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.hf_config import load_config
from refusal_jax.plan.programs import USUAL_LENGTH, Workload
from refusal_jax.runs.artifacts import DIRECTION, NO_DIRECTION
from refusal_jax.runs.run import Run, check_alike, recorded_manifest
from refusal_jax.runs.stage import Stage
from refusal_jax.study.config import StudyConfig
from refusal_jax.study.mechanism.settings import MechanismSettings
from refusal_jax.study.mechanism.shared import MechanismStudy, mechanism_workload
from refusal_jax.study.mechanism.stages import GROUPS, PARTS, STAGES
from refusal_jax.study.study import FIGURES_STAGE, REPORT_STAGE, commits_of


def run_mechanism(settings: MechanismSettings | Mapping[str, Any], workdir: str | os.PathLike, model: str = "") -> Run:
    """Does the parts of the mechanism that `settings` names in the folder of a finished study, and writes its report anew;
    `worked` of the run names the stages that did work.

    workdir: a local folder or gs://BUCKET/FOLDER. model: where the study's model is now, if it has moved; "" is where the study
    read it. Of several processes (`distributed.start`) all must call it alike. A part that is done already is skipped unless
    what it rests on has changed. The report's figures are written as files whatever the parts are; the part "figures" does that
    alone.

    Raises UserError for unknown parts, for a folder that holds no finished study or one that found no direction, and for a model
    that is not the study's.
    """
    settings = MechanismSettings.of(settings)
    settings.check((*PARTS, FIGURES_STAGE.name))
    check_alike(distributed.gather_json({"config": settings.to_dict(), "inputs": {}}))
    manifest = recorded_manifest(workdir)
    if manifest is None:
        raise UserError(
            f"{workdir} holds no study. Name the folder of a finished one: refusal-jax study --workdir=DIR makes it."
        )
    config = StudyConfig.of(manifest["config"])
    with hub.session(commits_of(manifest), config.download):
        named = model or config.model
        folder = checkpoint_folder(named) if named else demo_model_path()
        load_config(folder)
        inputs = manifest["inputs"] | {"model": checkpoint_fingerprint(folder)}
        with Run.open(workdir, manifest["config"], inputs) as run:
            run.tell()
            check_finished(run)
            study = MechanismStudy(settings, config, run, folder, GROUPS)
            for stage in chosen(study):
                run.stage(stage, study)
            run.stage(REPORT_STAGE, study)
            run.stage(FIGURES_STAGE, study)
            return run


def workload(cfg: ModelConfig, dtype: str, config: StudyConfig, length: int = USUAL_LENGTH) -> Workload:
    """Returns the programs of all parts of the mechanism, under their own settings' defaults, for a study with this config."""
    return mechanism_workload(cfg, dtype, config, length, GROUPS, MechanismSettings())


def chosen(study: MechanismStudy) -> list[Stage[MechanismStudy]]:
    """Returns the stages of the parts that the settings name, and of those whose files these read, in order."""
    wanted, needed = [], set()
    for stage in reversed(STAGES):
        writes = stage.outputs(study)
        if not study.settings.parts or stage.name in study.settings.parts or needed & {*writes}:
            wanted.append(stage)
            needed |= {*stage.inputs(study)}
    return wanted[::-1]


def check_finished(run: Run) -> None:
    """Raises UserError unless a run has found a direction and written its report."""
    if run.exists(NO_DIRECTION):
        raise UserError(
            f"The study in {run.folder} found no direction, so that there is no mechanism to look at. Try again with other "
            f"settings of the selection; its report says what came near."
        )
    if not run.exists(DIRECTION) or REPORT_STAGE.name not in run.manifest["stages"]:
        raise UserError(
            f"The study in {run.folder} is not finished. Run its command again, which continues it, and then this one with "
            f"{setting('direction', run.folder)}."
        )

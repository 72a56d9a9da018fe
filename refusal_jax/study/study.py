"""The study: a list of stages, and the loop that runs those that are due in one run's folder."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from refusal_jax import hub
from refusal_jax.chat.messages import is_file
from refusal_jax.chat.model import demo_model_path
from refusal_jax.checkpoints.fingerprint import checkpoint_fingerprint
from refusal_jax.checkpoints.remote import checkpoint_folder
from refusal_jax.data.sampling import SPLITS
from refusal_jax.data.sources import resolve
from refusal_jax.errors import NoDirection, UserError
from refusal_jax.files import file_hash
from refusal_jax.judges.judge import Judge
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.hf_config import load_config
from refusal_jax.plan.programs import USUAL_LENGTH, Workload
from refusal_jax.runs.artifacts import FIGURES, NO_DIRECTION
from refusal_jax.runs.run import Run, recorded_manifest
from refusal_jax.study import completions, directions, evaluations, loss, projections, prompts, selection
from refusal_jax.study.ahead import Ahead
from refusal_jax.study.checks import check_settings
from refusal_jax.study.config import BehaviourSettings, StudyConfig
from refusal_jax.study.damage import stages as damage
from refusal_jax.study.mechanism import stages as mechanism
from refusal_jax.study.report import figures_of, report_on
from refusal_jax.study.shared import Study

SELECTING = (prompts.STAGE, directions.STAGE, selection.STAGE)  # all that a direction takes
STEPS = (
    *SELECTING,
    projections.STAGE,
    completions.STAGE,
    loss.STAGE,
    evaluations.STAGE,
)
COMMIT = "commit of "  # before a name on the hub, among the inputs that the manifest records
SHOWN = (*STEPS, *mechanism.STAGES, *damage.STAGES)  # those that add to the report
REPORT_STAGE = report_on(SHOWN)
FIGURES_STAGE = figures_of((*STEPS, *mechanism.STAGES), FIGURES)
STAGES = (*STEPS, REPORT_STAGE)
GROUPS = tuple(stage.programs for stage in STAGES if stage.programs)
RETRIED = {stage.name: stage.settings for stage in STAGES if stage.settings}
SECTIONS = tuple(stage.section for stage in SHOWN if stage.section)


def workload(cfg: ModelConfig, dtype: str, config: StudyConfig, length: int = USUAL_LENGTH) -> Workload:
    """Returns the programs of a study of a model, to be planned. dtype: of the weights. length: tokens that prompts are padded
    to."""
    return Workload(cfg, dtype, config, length, GROUPS)


def run_study(config: StudyConfig | Mapping[str, Any], workdir: str | os.PathLike) -> Run:
    """Runs or continues the study of `config` in `workdir`; `worked` of the run names the stages that did work.

    config: a study's settings, as nested dictionaries or ml_collections.ConfigDict too; they are copied.
    workdir: a local folder or gs://BUCKET/FOLDER. Of several processes (`distributed.start`) all must call it alike.

    Raises UserError for anything wrong with config, model, data or folder, before long work where it can be known; and
    NoDirection, after the report is written, if the study finds no direction.
    """
    config = StudyConfig.of(config)
    with hub.session(recorded_commits(workdir), config.download) as commits:
        judges = check_settings(config)
        folder = checkpoint_folder(config.model) if config.model else demo_model_path()
        load_config(folder)
        inputs = input_hashes(config, folder, judges)
        inputs |= {COMMIT + name: commit for name, commit in sorted(commits.items())}
        return run_stages(config, folder, judges, inputs, workdir)


def run_stages(
    config: StudyConfig, folder: pathlib.Path, judges: Sequence[Judge], inputs: dict[str, str], workdir
) -> Run:
    """Does what `run_study` does, once model, judges and data are found."""
    with Run.open(workdir, recorded_settings(config), inputs, RETRIED) as run:
        try:
            with Ahead(run, STAGES) as ahead:
                study = Study(config, run, folder, judges, GROUPS, ahead)
                for stage in STAGES:
                    ahead.reach(stage, study)
                    run.stage(stage, study)
        except UserError:
            if run.new and run.worked in ([], [prompts.STAGE.name]):  # nothing was computed yet
                run.discard()
            raise
        if run.exists(NO_DIRECTION):
            raise NoDirection(**run.read_json(NO_DIRECTION), run=run)
        return run


def recorded_settings(config: StudyConfig) -> dict[str, Any]:
    """Returns the settings as a run's manifest records them, without those that older versions did not have, where they are as
    by default."""
    settings = config.to_dict() | {"cache": ""}  # where copies are kept may change from run to run
    del settings["download"]  # and so may the way to the model
    if not settings["system_prompt"]:
        del settings["system_prompt"]  # a study of the time before there was one goes on
    if settings["behaviour"] == BehaviourSettings().to_dict():
        del settings["behaviour"]
    return settings


def recorded_commits(workdir: str | os.PathLike) -> dict[str, str]:
    """Returns the commits of repositories on the hub that the study in a folder began with, by name; none for a new study."""
    return commits_of(recorded_manifest(workdir))


def commits_of(manifest: dict | None) -> dict[str, str]:
    """Returns the commits that a manifest records, by name."""
    inputs = manifest["inputs"] if manifest else {}
    return {name.removeprefix(COMMIT): value for name, value in inputs.items() if name.startswith(COMMIT)}


def input_hashes(config: StudyConfig, folder: pathlib.Path, judges: Sequence[Judge]) -> dict[str, str]:
    """Returns the hash of every file and model that the study reads, by name. Raises UserError for a file that is missing."""
    inputs = {"model": checkpoint_fingerprint(folder)}
    for split in SPLITS:
        inputs[split] = _hash(resolve(config.data[split], split))
    template = [config.chat_template] if config.chat_template.endswith(".jinja") else []
    system = [config.system_prompt] if is_file(config.system_prompt) else []
    for file in (*config.loss.text_files, *config.loss.chat_files, *template, *system):
        inputs[file] = _hash(resolve(file, "loss"))
    for source in config.data.over_refusal:
        inputs[source] = _hash(resolve(source, "harmless_test"))
    for judge in judges:
        if fingerprint := judge.fingerprint():
            inputs[f"judge {judge.name}"] = fingerprint
    return inputs


def _hash(path: pathlib.Path) -> str:
    if not path.is_file():
        raise UserError(
            f"{path} is not a file. Check the path in the config (data, loss, chat_template or system_prompt)."
        )
    return file_hash(path)

"""Adds further stages to a finished study, in its folder: one idea for its mechanism and for the damage that removal does.

An `Addition` names the stages, their settings, and the study that they share. `run` does those that are asked for, with those
whose files they read, and writes the study's report anew, to which each stage adds its section.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Generic

from refusal_jax import distributed, hub
from refusal_jax.chat.model import demo_model_path
from refusal_jax.checkpoints.fingerprint import checkpoint_fingerprint
from refusal_jax.checkpoints.remote import checkpoint_folder
from refusal_jax.errors import UserError, setting
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.hf_config import load_config
from refusal_jax.plan.programs import USUAL_LENGTH, Group, Workload
from refusal_jax.runs.artifacts import DIRECTION, NO_DIRECTION
from refusal_jax.runs.run import Run, check_alike, recorded_manifest
from refusal_jax.runs.stage import Stage
from refusal_jax.study.config import StudyConfig
from refusal_jax.study.further import FurtherStudy, T
from refusal_jax.study.study import REPORT_STAGE, commits_of

FIGURES_PART = "figures"  # the part that writes figures as files, which is done whatever the parts are


@dataclasses.dataclass(frozen=True)
class Addition(Generic[T]):
    """Further stages of a finished study.

    needless: why there is nothing to do without a direction, as a clause. settings: the class of their settings. study: the class
    of what they share. stages: in the order in which they are done and shown. figures: the stage that writes their figures as
    files.
    """

    needless: str
    settings: type[T]
    study: type[FurtherStudy[T]]
    stages: tuple[Stage[Any], ...]
    figures: Stage[Any]

    @property
    def parts(self) -> tuple[str, ...]:
        """Returns the names of the stages."""
        return tuple(stage.name for stage in self.stages)

    @property
    def groups(self) -> tuple[Group, ...]:
        """Returns the programs of the stages, for `plan`."""
        return tuple(stage.programs for stage in self.stages if stage.programs)

    def run(self, settings: T | Mapping[str, Any], workdir: str | os.PathLike, model: str = "") -> Run:
        """Does the stages that `settings` names in the folder of a finished study, and writes its report anew; `worked` of the
        run names the stages that did work.

        workdir: a local folder or gs://BUCKET/FOLDER. model: where the study's model is now, if it has moved; "" is where the
        study read it. Of several processes (`distributed.start`) all must call it alike. A stage that is done already is skipped
        unless what it rests on has changed. The figures are written as files whatever the parts are; the part "figures" does that
        alone.

        Raises UserError for unknown parts, for a folder that holds no finished study or one that found no direction, and for a
        model that is not the study's.
        """
        settings = self.settings.of(settings)
        settings.check((*self.parts, FIGURES_PART))
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
                self.check_finished(run)
                study = self.study(settings, config, run, folder, self.groups)
                for stage in (*self.chosen(study), REPORT_STAGE, self.figures):
                    run.stage(stage, study)
                return run

    def workload(self, cfg: ModelConfig, dtype: str, config: StudyConfig, length: int = USUAL_LENGTH) -> Workload:
        """Returns the programs of all stages, under their own settings' defaults, for a study with this config."""
        return self.study.planned(cfg, dtype, config, length, self.groups, self.settings())

    def chosen(self, study: FurtherStudy[T]) -> list[Stage[Any]]:
        """Returns the stages that the settings name, and those whose files these read, in order."""
        wanted, needed = [], set()
        for stage in reversed(self.stages):
            writes = stage.outputs(study)
            if not study.settings.parts or stage.name in study.settings.parts or needed & {*writes}:
                wanted.append(stage)
                needed |= {*stage.inputs(study)}
        return wanted[::-1]

    def check_finished(self, run: Run) -> None:
        """Raises UserError unless a run has found a direction and written its report."""
        if run.exists(NO_DIRECTION):
            raise UserError(
                f"The study in {run.folder} found no direction, so that {self.needless}. Try again with other "
                f"settings of the selection; its report says what came near."
            )
        if not run.exists(DIRECTION) or REPORT_STAGE.name not in run.manifest["stages"]:
            raise UserError(
                f"The study in {run.folder} is not finished. Run its command again, which continues it, and then this one with "
                f"{setting('direction', run.folder)}."
            )

"""State that the stages of the mechanism share: the finished study, and their settings."""

import pathlib

from refusal_jax.plan.programs import Group
from refusal_jax.runs.run import Run
from refusal_jax.study.config import StudyConfig
from refusal_jax.study.mechanism.settings import MechanismSettings
from refusal_jax.study.shared import Study


class MechanismStudy(Study):
    """A finished study whose mechanism is looked at. settings: those of the mechanism; `config` has those of the study."""

    def __init__(
        self,
        settings: MechanismSettings,
        config: StudyConfig,
        run: Run,
        folder: pathlib.Path,
        groups: tuple[Group, ...] = (),
    ):
        super().__init__(config, run, folder, groups=groups)
        self.settings = settings

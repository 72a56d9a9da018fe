"""Adds the mechanism to a finished study, as further stages in its folder."""

import os
from collections.abc import Mapping
from typing import Any

from refusal_jax.runs.run import Run
from refusal_jax.study.additions import Addition
from refusal_jax.study.mechanism.settings import MechanismSettings
from refusal_jax.study.mechanism.shared import MechanismStudy
from refusal_jax.study.mechanism.stages import STAGES
from refusal_jax.study.study import FIGURES_STAGE

MECHANISM = Addition("there is no mechanism to look at", MechanismSettings, MechanismStudy, STAGES, FIGURES_STAGE)


def run_mechanism(settings: MechanismSettings | Mapping[str, Any], workdir: str | os.PathLike, model: str = "") -> Run:
    """Does the parts of the mechanism that `settings` names in the folder of a finished study, and writes its report anew; the
    arguments, the result and the errors are those of `Addition.run`."""
    return MECHANISM.run(settings, workdir, model)

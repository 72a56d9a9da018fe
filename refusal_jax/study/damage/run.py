"""Adds to a finished study what removing its direction damages, as further stages in its folder."""

import os
from collections.abc import Mapping
from typing import Any

from refusal_jax.runs.artifacts import REMOVAL_FIGURES
from refusal_jax.runs.run import Run
from refusal_jax.study.additions import Addition
from refusal_jax.study.damage.settings import DamageSettings
from refusal_jax.study.damage.shared import DamageStudy
from refusal_jax.study.damage.stages import STAGES
from refusal_jax.study.report import figures_of

FIGURES_STAGE = figures_of(STAGES, REMOVAL_FIGURES, "figures of damage")
DAMAGE = Addition("there is nothing to remove", DamageSettings, DamageStudy, STAGES, FIGURES_STAGE)


def run_damage(settings: DamageSettings | Mapping[str, Any], workdir: str | os.PathLike, model: str = "") -> Run:
    """Measures the parts of the damage that `settings` names in the folder of a finished study, and writes its report anew; the
    arguments, the result and the errors are those of `Addition.run`."""
    return DAMAGE.run(settings, workdir, model)

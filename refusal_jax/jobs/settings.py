"""The flag --config of jobs that take a study's settings, combined with the flags that set one of them."""

from ml_collections import config_flags

from refusal_jax.jobs import devices, optional_numbers
from refusal_jax.study import config as study_config
from refusal_jax.study.config import StudyConfig

optional_numbers.register()
CONFIG = config_flags.DEFINE_config_file(
    "config",
    study_config.__file__,
    "Config file, FILE or FILE:NAME for one of several in a file. Any of its settings, which are listed below, is overridden by "
    "--config.SECTION.FIELD=VALUE. Default: the paper's settings on the embedded model.",
)


def study_settings(model: str | None = None) -> StudyConfig:
    """Returns what --config, --mesh and --dtype ask for. model: replaces the config's. Raises UserError for malformed values."""
    config = StudyConfig.of(CONFIG.value)
    if model is not None:
        config.model = model
    if devices.DTYPE.value is not None:
        config.dtype = devices.DTYPE.value
    if (shape := devices.mesh_shape()) is not None:
        config.mesh.data, config.mesh.fsdp, config.mesh.model = shape
    return config

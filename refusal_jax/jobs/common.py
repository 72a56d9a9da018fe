"""Code that all jobs share: the flag --log_level, which is read before the job is imported, and the check of required
flags."""

from typing import TypeVar

from absl import flags

from refusal_jax.errors import UserError
from refusal_jax.jobs.command_line import flag_error
from refusal_jax.logs import LEVELS

T = TypeVar("T")
CHECKPOINT = (
    "Checkpoint: a folder, its name on the hub (ORG/NAME or ORG/NAME@REVISION), or its address (gs://BUCKET/FOLDER)."
)
FLAGS = flags.FlagValues()
LOG_LEVEL = flags.DEFINE_enum(
    "log_level",
    "info",
    list(LEVELS),
    "The least severe messages that are shown on stderr. A study's log.txt has at least those of level info; with debug it also "
    "has those of JAX and other libraries.",
    flag_values=FLAGS,
)


def parse(job: str, argv: list[str]) -> tuple[str, list[str]]:
    """Returns the level to log at and the arguments that are left for the job. Raises UserError for an unknown
    level."""
    FLAGS["log_level"].unparse()  # what an earlier job of this process was given
    try:
        left = FLAGS([f"refusal-jax {job}", *argv], known_only=True)
    except flags.Error as error:
        raise flag_error(job, error, FLAGS) from None
    return LOG_LEVEL.value, left[1:]


def required(flag: flags.FlagHolder[T | None], advice: str) -> T:
    """Returns the value of a flag without which the job cannot work. Raises UserError, with the advice, if it is not given."""
    if not flag.value:
        raise UserError(f"--{flag.name} is missing{advice}")
    return flag.value

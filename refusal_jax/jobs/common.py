"""The flag that every job has. It is read before the job is imported, which takes its own flags from the rest."""

from absl import flags

from refusal_jax.errors import UserError
from refusal_jax.logs import LEVELS

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
    """Returns the level to log at and the arguments that are left for the job. Raises UserError for a level that is none."""
    FLAGS["log_level"].unparse()  # what an earlier job of this process was given
    try:
        left = FLAGS([f"refusal-jax {job}", *argv], known_only=True)
    except flags.Error as error:
        raise UserError(f"{' '.join(str(error).split())} See `refusal-jax {job} --help`.") from None
    return LOG_LEVEL.value, left[1:]

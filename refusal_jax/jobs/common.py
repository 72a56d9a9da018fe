"""Code that all jobs share: the flags --log_level and --compile_cache, which are read before the job is imported, and the check
of required flags."""

from typing import TypeVar

import jax
from absl import flags

from refusal_jax.errors import UserError
from refusal_jax.files import local_path
from refusal_jax.jobs.command_line import flag_error
from refusal_jax.logs import LEVELS
from refusal_jax.stores import explained, is_in_store, open_store, store_address

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
COMPILE_CACHE = flags.DEFINE_string(
    "compile_cache",
    None,
    "Where compiled programs are kept and found again: a folder, or gs://BUCKET/FOLDER, which all hosts of a slice share. "
    "Default: what the environment variable JAX_COMPILATION_CACHE_DIR names, or else a folder in the user's cache.",
    flag_values=FLAGS,
)
STORES = ("gs", "s3")  # in which JAX can keep programs


def parse(job: str, argv: list[str]) -> tuple[str, list[str]]:
    """Returns the level to log at and the arguments that are left for the job, and has JAX keep programs where they say. Raises
    UserError for an unknown level, and as `keep_programs` does."""
    for name in ("log_level", "compile_cache"):
        FLAGS[name].unparse()  # what an earlier job of this process was given
    try:
        left = FLAGS([f"refusal-jax {job}", *argv], known_only=True)
    except flags.Error as error:
        raise flag_error(job, error, FLAGS) from None
    if COMPILE_CACHE.value:
        keep_programs(COMPILE_CACHE.value)
    return LOG_LEVEL.value, left[1:]


def keep_programs(place: str) -> None:
    """Has JAX keep compiled programs in a folder or in a bucket. Raises UserError for another kind of store, and for a bucket
    that cannot be used, which JAX would only warn of at every program."""
    address = store_address(place)
    if address and address.split("://")[0] not in STORES:
        raise UserError(
            f"{place} is no place for a compile cache: give a folder, or an address that begins with "
            f"{' or '.join(f'{scheme}://' for scheme in STORES)}."
        )
    if address:
        with explained(address, "Or name no compile cache: programs are then kept on this machine."):
            is_in_store(*open_store(address))
    jax.config.update("jax_compilation_cache_dir", address or str(local_path(place)))


def required(flag: flags.FlagHolder[T | None], advice: str) -> T:
    """Returns the value of a flag without which the job cannot work. Raises UserError, with the advice, if it is not given."""
    if not flag.value:
        raise UserError(f"--{flag.name} is missing{advice}")
    return flag.value

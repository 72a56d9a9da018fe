"""The `refusal-jax` command: finds the job, parses its flags, and turns bad input into one readable paragraph."""

import ast
import errno
import importlib
import importlib.util
import os
import pathlib
import sys
import textwrap
from collections.abc import Callable

JOBS = ("study", "plan", "export", "chat", "data", "evaluate", "lm_eval", "bench", "organism")
DISK_ERRORS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT)
USAGE = """refusal-jax JOB [--flags]: find, measure, edit and audit the refusal direction of chat models.

Jobs:
{jobs}

Start with `refusal-jax study --workdir=runs/first`, which needs nothing else. `refusal-jax JOB --help` explains a job.
Exit codes: 0 done, 1 a bug of ours (with a traceback), 2 bad input or environment (with a next step), 3 an export that failed
its verification, 75 another process of the run failed (start all again), 130 interrupted.
"""


def docstring(job: str) -> str:
    """A job's help text, read from its source: importing it would import jax."""
    path = importlib.util.find_spec(f"refusal_jax.jobs.{job}").origin
    return ast.get_docstring(ast.parse(pathlib.Path(path).read_text(encoding="utf-8")))


def usage() -> str:
    width = max(map(len, JOBS))
    return USAGE.format(jobs="\n".join(f"  {job:{width}}  {docstring(job).splitlines()[0]}" for job in JOBS))


# For a job that only compiles: no TPU is looked for, neither here nor on the network.
COMPILE_ONLY = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans may be made at a time
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any will do
    "TF_CPP_MIN_LOG_LEVEL": "3",  # that a program does not fit is said in our words
}


def prepare_environment(job: str) -> None:
    """A persistent compile cache and quiet libraries, unless the user's environment says otherwise."""
    if job == "plan":
        os.environ |= COMPILE_ONLY
    from refusal_jax.files import cache_folder

    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder("xla")))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that it found no PyTorch is no news here
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def help_text(job: str) -> str:
    from absl import flags

    from refusal_jax.jobs import common

    module = importlib.import_module(f"refusal_jax.jobs.{job}")
    shown = []
    own = flags.FLAGS.get_key_flags_for_module(module.__name__)
    for flag in [*sorted(own, key=lambda f: f.name), common.FLAGS["log_level"]]:
        default = "" if flag.default in (None, "") else f" (default: {flag.default_as_str.strip(chr(39))})"
        text = " ".join((flag.help or "").split()) + default
        shown.append(f"  --{flag.name}\n" + textwrap.indent(textwrap.fill(text, 100), " " * 6))
    return f"refusal-jax {job}: {docstring(job)}\n\nFlags:\n" + "\n".join(shown) + "\n"


def fail(message: str, exit_code: int = 2) -> int:
    from refusal_jax.errors import print_error

    print_error(message)
    return exit_code


def config_error(error: Exception):
    """What a config file that may raise anything, or an override of a field that is not there, did wrong."""
    from refusal_jax.errors import UserError

    reason = " ".join(str(error).split())
    return UserError(
        f"--config cannot be used ({type(error).__name__}: {reason}). Name a config file that exists and runs, such as "
        "configs/demo.py, and fields that refusal_jax/study/config.py has."
    )


def expanded(word: str) -> str:
    """Returns an argument, with a leading ~ of the file that --config names expanded, which absl opens itself."""
    from refusal_jax.files import local_path

    name, _, value = word.partition("=")
    return f"{name}={local_path(value)}" if name.lstrip("-") == "config" and value.startswith("~") else word


def prepare_job(job: str, argv: list[str]):
    """A job's module, with its flags parsed, and its action if it has any. Raises UserError for anything wrong with them, or
    with the config file that they name."""
    from absl import flags

    from refusal_jax.errors import UserError

    try:
        module = importlib.import_module(f"refusal_jax.jobs.{job}")  # reads the config of --config at once
    except ModuleNotFoundError:
        raise  # a broken installation
    except Exception as error:
        raise config_error(error) from None
    if getattr(module, "PASSED_ON", False):
        return module, argv
    argv = list(map(expanded, argv))
    try:
        left = flags.FLAGS([f"refusal-jax {job}", *argv])
        if "config" in flags.FLAGS:
            flags.FLAGS["config"].value.to_dict()  # a file that cannot be loaded only fails when its config is used
    except flags.Error as error:
        raise UserError(f"{' '.join(str(error).split())} See `refusal-jax {job} --help`.") from None
    except Exception as error:
        raise config_error(error) from None
    actions = getattr(module, "ACTIONS", ())  # what may follow the job's name
    if actions and left[1:2] and left[1] not in actions:
        raise UserError(f"{job} has no action {left[1]!r}: it has {', '.join(actions)}.")
    if left[1 + bool(actions) :]:
        raise UserError(f"unexpected argument {left[1 + bool(actions)]!r}: flags are written --name=value.")
    return module, left[1:]


def as_flags(job: str) -> Callable[[str], str | None]:
    """Returns how a job's flags spell settings, for `errors.spelt`: by a flag of that name or, where the job takes a study's
    config, by the field of it. A field is also spelt by a flag that has its last name."""
    from absl import flags

    names = {flag.name for flag in flags.FLAGS.get_key_flags_for_module(f"refusal_jax.jobs.{job}")}

    def spelling(name: str) -> str | None:
        path = name.removeprefix("config.")
        if path in names:
            return f"--{path}"
        if "config" in names and (path != name or path in flags.FLAGS["config"].value):
            return f"--config.{path}"
        last = path.rpartition(".")[2]
        return f"--{last}" if path != name and last in names else None

    return spelling


def verdict(error: BaseException) -> tuple[int, str]:
    """The exit code and the user's paragraph that an exception comes to."""
    from refusal_jax.errors import UserError

    if isinstance(error, UserError):
        return error.exit_code, str(error)
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return 2, (
            f"{error.filename or 'a file'} could not be used: {error.strerror}. Free space, or choose a folder "
            "that you may write to, and run the same command again."
        )
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; run the same command again, finished work of a study is kept."
    return 1, f"{type(error).__name__}: {error}"


def run_job(job: str, argv: list[str]) -> int:
    """Runs a job with its flags; the exit code."""
    from refusal_jax import distributed, logs
    from refusal_jax.errors import spelt
    from refusal_jax.jobs import common

    if any(arg in ("--help", "-h", "-help", "--helpfull") for arg in argv):
        print(help_text(job))
        return 0
    try:
        level, argv = common.parse(job, argv)
        with logs.shown(level):
            module, arguments = prepare_job(job, argv)
            with spelt(as_flags(job)):
                module.main(arguments)
            distributed.finish()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        code, message = verdict(error)
        distributed.leave(error, code, message)
        if code == 1:
            raise
        return fail(message, code)


def main() -> None:
    argv = sys.argv[1:]
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(usage())
        sys.exit(0)
    if argv[0] not in JOBS:
        sys.exit(
            fail(f"there is no job {argv[0]!r}. The jobs are {', '.join(JOBS)}; `refusal-jax` alone explains them.")
        )
    prepare_environment(argv[0])
    sys.exit(run_job(argv[0], argv[1:]))


if __name__ == "__main__":
    main()

"""The `refusal-jax` command: finds the job, parses its flags, and turns bad input into one readable paragraph."""

import errno
import importlib.util
import os
import sys

from refusal_jax.errors import UserError, did_you_mean, print_error, spelt
from refusal_jax.files import cache_folder
from refusal_jax.jobs import help
from refusal_jax.jobs.command_line import as_flags, canonical, prepare_job

JOBS = (
    "study",
    "audit",
    "gate",
    "monitor",
    "mechanism",
    "damage",
    "defend",
    "resist",
    "plan",
    "export",
    "chat",
    "data",
    "evaluate",
    "lm_eval",
    "bench",
    "organism",
)
PIPE_CLOSED = 141  # as a shell reports a process that SIGPIPE ended
INTERRUPTED = 130  # the exit code of a program that Ctrl-C ended
DISK_ERRORS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT)

# For a job that only compiles: no TPU is looked for, neither here nor on the network.
COMPILE_ONLY = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans may be made at a time
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any value works
    "TF_CPP_MIN_LOG_LEVEL": "3",  # that a program does not fit is said in our words
}
# On CPUs, XLA's emitters of fused loops through MLIR and LLVM's last optimisations double the time of compiling, and programs are
# no faster, since nearly all of their time goes to matrix products, which come from a library.
ON_CPUS = ("--xla_cpu_use_fusion_emitters=false", "--xla_backend_optimization_level=1")
ACCELERATORS = ("libtpu", "jax_plugins")  # packages, which know none of these flags or need not


def only_cpus() -> bool:
    """Returns whether JAX will run on CPUs, as its packages and the environment tell before it is imported."""
    asked = os.environ.get("JAX_PLATFORMS")
    if asked:
        return asked == "cpu"
    return "TPU_LIBRARY_PATH" not in os.environ and not any(map(importlib.util.find_spec, ACCELERATORS))


def prepare_environment(job: str) -> None:
    """Asks for a persistent compile cache, programs that compile fast, and quiet libraries, unless the user's environment says
    otherwise. JAX and others read it when they are imported, which nothing has done yet."""
    if job == "plan":
        os.environ |= COMPILE_ONLY
    elif only_cpus():
        given = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = " ".join(
            [*(flag for flag in ON_CPUS if flag.split("=")[0] not in given), given]
        ).strip()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder("xla")))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that it found no PyTorch is no news here
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def fail(message: str, exit_code: int = 2) -> int:
    """Prints what went wrong, and returns the exit code."""
    print_error(message)
    return exit_code


def verdict(error: BaseException) -> tuple[int, str]:
    """Returns the exit code and the message for the user that an exception leads to."""
    if isinstance(error, UserError):
        return error.exit_code, str(error)
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return 2, (
            f"{error.filename or 'a file'} could not be used: {error.strerror}. Free space, or choose a folder "
            "that you may write to, and run the same command again."
        )
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted; run the same command again, finished work of a study is kept."
    return 1, f"{type(error).__name__}: {error}"


def run_job(job: str, argv: list[str]) -> int:
    """Runs a job with its flags, and returns the exit code."""
    from refusal_jax import distributed, logs
    from refusal_jax.jobs import common

    if any(word in help.WORDS for word in argv):
        print(help.help_text(job))
        return 0
    try:
        level, argv = common.parse(job, canonical(job, argv))
        with logs.shown(level):
            module, arguments = prepare_job(job, argv)
            with spelt(as_flags(job)):
                code = module.main(arguments)  # None, but for a job whose result is an exit code
            distributed.finish()
        return code or 0
    except (Exception, KeyboardInterrupt) as error:
        code, message = verdict(error)
        distributed.leave(error, code, message)
        if code == 1:
            raise
        return fail(message, code)


def main() -> None:
    """Runs the job that the command line names, and exits with its code."""
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        code = PIPE_CLOSED
    if code == INTERRUPTED:
        sys.stderr.flush()
        os._exit(code)  # threads of XLA that compile go on, and crash where Python takes apart what they use
    sys.exit(code)


def run(argv: list[str]) -> int:
    """Runs the job that the command line names, and returns the exit code."""
    if not argv or argv[0] in (*help.WORDS, "help"):
        print(help.usage(JOBS))
        return 0
    job = argv[0].replace("-", "_")
    if job not in JOBS:
        message = (
            f"there is no job {argv[0]!r}.{did_you_mean(job, JOBS)} The jobs are {', '.join(JOBS)}; `refusal-jax` alone"
        )
        return fail(f"{message} explains them.")
    prepare_environment(job)
    return run_job(job, argv[1:])


if __name__ == "__main__":
    main()

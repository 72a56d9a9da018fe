"""The flags by which a job runs as several processes, on several hosts or on one.

On a TPU slice none of them is needed: start the same command on every host. Elsewhere give all processes the same
--coordinator and --num_processes, and each its own --process_id.
"""

from absl import flags

from refusal_jax import distributed

COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, needed for several processes outside a TPU slice."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes that run this command together.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Index of this process, from 0 to num_processes - 1.")
JOIN_SECONDS = flags.DEFINE_integer(
    "join_seconds", 300, "Seconds to wait at the start for the other processes.", lower_bound=1
)
HEARTBEAT_SECONDS = flags.DEFINE_integer(
    "heartbeat_seconds",
    30,
    "Seconds without a heartbeat after which a process counts as lost and the run stops.",
    lower_bound=2,
)


def join() -> None:
    """Joins the other processes that the flags or the TPU slice name, if any. It must be called before any other use of
    jax."""
    distributed.start(
        COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, JOIN_SECONDS.value, HEARTBEAT_SECONDS.value
    )

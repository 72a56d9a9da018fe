"""The flags by which a job runs as several processes, on several hosts or on one.

On a TPU slice none are needed: start the same command on every host. Elsewhere all processes get the same --coordinator
and --num_processes, and each its own --process_id.
"""

from absl import flags

from refusal_jax import distributed

COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, where several processes run outside a TPU slice."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes that run this command together.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
JOIN_SECONDS = flags.DEFINE_integer(
    "join_seconds", 300, "Seconds to wait for the other processes at the start.", lower_bound=1
)
HEARTBEAT_SECONDS = flags.DEFINE_integer(
    "heartbeat_seconds",
    30,
    "Seconds without a heartbeat after which a process counts as lost and the run stops.",
    lower_bound=2,
)


def join() -> None:
    """Joins the other processes that the flags or the TPU slice tell of, if any; before any other use of jax."""
    distributed.start(
        COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, JOIN_SECONDS.value, HEARTBEAT_SECONDS.value
    )

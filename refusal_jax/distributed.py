"""Runs one program in several processes: joins them, shares process 0's values, and ends all of them if one fails.

The engine is jax.distributed. Its coordinator lives in process 0, knows which processes are alive and keeps small values
that all can read; arrays travel by XLA's own collectives. Every process runs the same program on the same small numbers,
so what depends on a disk or a clock is decided in process 0 and shared. Alone, everything here does nothing.
"""

import contextlib
import ctypes
import dataclasses
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from typing import Any

import jax

from refusal_jax import logs
from refusal_jax.errors import UserError, print_error, setting

AGAIN = "Start the same command again in every process: finished work is kept."
GONE = "stopped without a word: it was killed (kill -9, out of memory, a preemption) or its host cannot be reached."
GRACE_SECONDS = 3.0  # time for processes to detect a shared failure themselves, and to shut down
FOREVER_MS = 10**9
LOST = 75  # exit code of a process that ends because another one did; launchers may then try again
KEYS = "refusal_jax/"
LOG = logging.getLogger(__name__)


@dataclasses.dataclass
class Session:
    """This process among several."""

    index: int
    count: int
    coordinator: str
    heartbeat_seconds: int
    client: Any  # jax's own client of the coordinator
    turn: int = 0  # values shared and gathered so far
    over: threading.Event = dataclasses.field(default_factory=threading.Event)  # nothing is to be watched any more
    speaking: threading.Lock = dataclasses.field(default_factory=threading.Lock)  # held by the thread that ends us

    def set(self, key: str, value: str) -> None:
        """Keeps a value with the coordinator, unless it has one already."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.client.key_value_set(KEYS + key, value)

    def wait_for(self, key: str) -> str:
        """Returns the value of a key, once it is there; it asks every second, so that signals are heard."""
        while True:
            try:
                return self.client.blocking_key_value_get(KEYS + key, 1000)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise

    def values(self, kind: str) -> dict[int, str]:
        """Returns the values of the keys `kind/N`, by N."""
        found = self.client.key_value_dir_get(f"{KEYS}{kind}/")
        return {int(key.rpartition("/")[2]): value for key, value in found}

    def name(self, index: int) -> str:
        """Returns the words by which users know a process."""
        host = self.values("host").get(index)
        return f"process {index} of {self.count}" + (f" ({host})" if host else "")


_session: Session | None = None


def several() -> bool:
    """Returns whether this is one of several processes."""
    return _session is not None


def first() -> bool:
    """Returns whether this process owns the files and talks to the user: it is process 0, or alone."""
    return _session is None or _session.index == 0


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    join_seconds: int = 300,
    heartbeat_seconds: int = 30,
) -> None:
    """Joins the other processes, if there are any; to be called before any other use of jax.

    Without arguments the processes are those of the TPU slice that this host belongs to, if it is a TPU VM: else it
    stays alone, as with num_processes=1. coordinator: "HOST:PORT" of process 0. join_seconds: how long to wait for the
    others. heartbeat_seconds: seconds without a heartbeat after which a process counts as lost. Raises UserError for
    arguments that do not go together, and if the processes do not meet (where JAX gives up by aborting, the process
    ends here, with the same words and exit code 2).
    """
    if num_processes == 1:
        return
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    if coordinator is None and num_processes is None and process_id is None:
        if _on_tpu_vm():
            _join({}, join_seconds, heartbeat_seconds)  # JAX finds them out
        return
    if coordinator is None or num_processes is None or process_id is None:
        flags = " and ".join(
            (setting(name) or name).removesuffix("=") for name, value in given.items() if value is None
        )
        raise UserError(
            f"{flags} missing: several processes need {setting('coordinator', 'HOST:PORT')} (of process 0), "
            f"{setting('num_processes', 'N')} and {setting('process_id', 'I')}, each its own from 0 to N-1."
        )
    _check(coordinator, num_processes, process_id)
    _join(given, join_seconds, heartbeat_seconds)


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(
            f"{setting('coordinator', coordinator)} is not HOST:PORT: name the host of process 0 and a free port of it."
        )
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"{setting('process_id', process_id)} is not among {setting('num_processes', num_processes)}: the processes are "
            f"numbered from 0 to {num_processes - 1}."
        )


def _on_tpu_vm() -> bool:
    """Returns whether this host has TPU chips and jax is to use them."""
    from jax._src import cloud_tpu_init  # what jax itself asks before it looks for the rest of a slice

    return cloud_tpu_init.running_in_cloud_tpu_vm and "tpu" in (jax.config.values["jax_platforms"] or "tpu")


def _join(given: dict, join_seconds: int, heartbeat_seconds: int) -> None:
    global _session
    from jax._src.distributed import global_state  # jax has no public name for its coordinator's client

    jax.config.update("jax_enable_recoverability", True)  # otherwise JAX aborts when another process is lost
    jax.config.update("jax_enable_preemption_service", False)  # the service would swallow SIGTERM
    if given:
        where, who = f"at {given['coordinator']}", f"process {given['process_id']} of {given['num_processes']}"
        advice = (
            "for every process, with the same coordinator and number of processes and each with its own process id, and "
            "check that the port is free on the host of process 0 and that the others reach it"
        )
        LOG.info(f"{who}: waiting for the others {where}, at most {join_seconds} seconds")
    else:
        where, who = "of this TPU slice", "one of them"
        advice = f"on every host of the slice, or use this host alone with {setting('num_processes', 1)}"
    apart = f"The processes {where} did not meet within {join_seconds} seconds (this is {who}). Start the same command {advice}."
    try:
        with _explained(apart, 2):
            jax.distributed.initialize(
                coordinator_address=given.get("coordinator"),
                num_processes=given.get("num_processes"),
                process_id=given.get("process_id"),
                cluster_detection_method="deactivate" if given else None,
                initialization_timeout=join_seconds,
                heartbeat_timeout_seconds=heartbeat_seconds,
                shutdown_timeout_seconds=heartbeat_seconds,
            )
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{apart} What went wrong ({type(error).__name__}): {reason}") from None
    if global_state.num_processes == 1:
        return
    _session = Session(
        global_state.process_id,
        global_state.num_processes,
        global_state.coordinator_address or "",
        heartbeat_seconds,
        global_state.client,
    )
    _session.set(f"host/{_session.index}", f"{socket.gethostname()}, pid {os.getpid()}")
    _on_abort(_coordinator_lost)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for watch in (_watch_failures, _watch_lives):
        threading.Thread(target=watch, args=(_session,), daemon=True).start()
    logs.set_process(_session.index)


def share(value: bytes | None) -> bytes:
    """Returns process 0's `value` in every process; what the others pass is ignored. All must call it, in the same order."""
    session = _session
    if session is not None:
        session.turn += 1
        key = f"shared/{session.turn}"
        if session.index:
            session.wait_for(key)
            return session.client.blocking_key_value_get_bytes(f"{KEYS}{key}/value", FOREVER_MS)
        session.client.key_value_set_bytes(f"{KEYS}{key}/value", value)
        session.client.key_value_set(KEYS + key, "there")
    assert value is not None, "process 0 passes the value"
    return value


def share_json(value) -> Any:
    """Returns process 0's `value` in every process, by way of JSON."""
    return value if _session is None else json.loads(share(json.dumps(value).encode()))


def gather_json(value) -> list:
    """Returns the `value` of every process, by way of JSON, in every process. All must call it, in the same order as `share`."""
    session = _session
    if session is None:
        return [value]
    session.turn += 1
    key = f"gathered/{session.turn}/"
    session.client.key_value_set(f"{KEYS}{key}{session.index}", json.dumps(value))
    if session.index:
        return share_json(None)
    return share_json([json.loads(session.wait_for(f"{key}{i}")) for i in range(session.count)])


def finish() -> None:
    """Waits until every process has reached this point, and leaves the group."""
    global _session
    session = _session
    if session is None:
        return
    session.client.wait_at_barrier("refusal_jax_finished", FOREVER_MS)
    session.over.set()
    _on_abort(lambda: os._exit(0))  # the work is done, whatever goes wrong while leaving
    if session.index == 0:  # the coordinator leaves last
        deadline = time.monotonic() + session.heartbeat_seconds
        while len(session.client.get_live_nodes(list(range(session.count)))) > 1 and time.monotonic() < deadline:
            time.sleep(0.05)
    jax.distributed.shutdown()
    _on_abort(None)
    _session = None
    logs.set_process(None)


def leave(error: BaseException, code: int, message: str) -> None:
    """Ends this process of several with exit code `code`, having told the user and the other processes why.

    A failure that all processes share is reported once, by process 0. Returns only if this process is alone.
    """
    session = _session
    if session is None:
        return
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
        # Most likely a collective that another process has left: then the watches will soon know which, and end us.
        time.sleep(session.heartbeat_seconds + 2 * GRACE_SECONDS)
    session.speaking.acquire()  # never released: from here on, only this thread ends the process
    ends = {
        1: f"failed of a bug, {message}; its own output has the traceback.",
        130: "was interrupted (Ctrl-C, or SIGTERM as before a preemption).",
    }
    failure = {"message": message, "how": ends.get(code, f"failed: {message}")}
    session.set(f"failed/{session.index}", json.dumps(failure))
    if code == 1:
        sys.excepthook(type(error), error, error.__traceback__)
    elif session.index == 0:
        print_error(message)
    elif not _said_by_first(session, message):
        print_error(f"{session.name(session.index)}: {message}")
    _depart(session, code)


def _said_by_first(session: Session, message: str) -> bool:
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline:
        said = session.values("failed").get(0)
        if said is not None:
            return json.loads(said)["message"] == message
        time.sleep(0.1)
    return False


def _depart(session: Session, code: int) -> None:
    """Ends the process at once, without the shutdown that JAX would wait for; the coordinator ends after the others."""
    deadline = time.monotonic() + 3 * GRACE_SECONDS
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        session.client.key_value_set(f"{KEYS}left/{session.index}", str(code))
        while session.index == 0 and time.monotonic() < deadline:
            gone = session.values("left").keys() | {
                i for i, f in session.values("failed").items() if json.loads(f)["how"] == GONE
            }
            if len(gone) == session.count:
                break
            time.sleep(0.1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _watch_failures(session: Session) -> None:
    """Ends this process when another one has failed, unless it is about to fail for the same reason."""
    while not session.over.wait(0.5):
        try:
            failed = session.values("failed")
        except jax.errors.JaxRuntimeError:  # the coordinator is lost, of which JAX makes an end
            return
        if not failed.keys() - {session.index}:
            continue
        time.sleep(GRACE_SECONDS)
        session.speaking.acquire()  # waits for good if the main thread is at it
        index, failure = min((i, json.loads(f)) for i, f in failed.items() if i != session.index)
        print_error(f"P{session.name(index)[1:]} {failure['how']} This process ends with it. {AGAIN}")
        _depart(session, LOST)


def _watch_lives(session: Session) -> None:
    """Tells all processes which ones are lost, by JAX's own heartbeats."""
    everybody = list(range(session.count))
    while not session.over.wait(1):
        try:
            alive = session.client.get_live_nodes(everybody)  # waits for all that are
        except jax.errors.JaxRuntimeError:
            return
        left = session.values("left").keys()
        for index in set(everybody) - alive.keys() - left:
            session.set(f"failed/{index}", json.dumps({"message": None, "how": GONE}))


def _coordinator_lost() -> None:
    """Explains the abort by which JAX ends a process whose coordinator is gone; for other aborts does nothing."""
    session = _session
    if session is None or session.index == 0:
        return
    host, _, port = session.coordinator.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=5):
        return
    _last_words(
        f"Process 0 of {session.count}, which the others depend on ({session.coordinator}), {GONE} "
        f"This process ends with it. {AGAIN}",
        LOST,
        2,
    )


def _last_words(message: str, code: int, stderr: int) -> None:
    with contextlib.suppress(OSError), open(stderr, "w", closefd=False) as file:
        print_error(message, file)
    os._exit(code)


@contextlib.contextmanager
def _explained(message: str, code: int):
    """Wraps a call into JAX that may abort the process, so that the user sees `message` and not a C++ stack trace."""
    old = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        _on_abort(lambda: _last_words(message, code, old))
        try:
            yield
        finally:
            _on_abort(None)
            os.dup2(old, 2)
            os.close(old)


_C_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
_handlers = []  # keeps the handlers alive, because C code holds no references


def _on_abort(explain) -> None:
    """Arranges for `explain` to be called when C++ code aborts this process (a Python signal handler would run too
    late); None removes it."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal.restype = ctypes.c_void_p
    if explain is None:
        libc.signal(signal.SIGABRT, None)
        return
    _handlers.append(_C_HANDLER(lambda number: explain()))
    libc.signal(signal.SIGABRT, ctypes.cast(_handlers[-1], ctypes.c_void_p))

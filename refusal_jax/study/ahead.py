"""Makes ready what later stages of a study need, such as compiled programs, in a thread, while the stages before them run."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from refusal_jax import distributed
from refusal_jax.runs.artifacts import NO_DIRECTION
from refusal_jax.runs.run import Run
from refusal_jax.runs.stage import Stage

LOG = logging.getLogger(__name__)


class Ahead:
    """The preparation of the stages of one run, a context manager; at its end what has not begun is given up.

    Preparing is for speed only. What fails is told in the log at the level of debugging, since the stage itself will say so.
    """

    def __init__(self, run: Run, stages: Sequence[Stage[Any]]):
        self.run, self.later = run, tuple(stages)
        self._pool = ThreadPoolExecutor(1, "ahead")
        self._tasks: dict[str, Future] | None = None

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_) -> None:
        # An error, or Ctrl-C, is told at once; the process ends when what has begun is done.
        self._pool.shutdown(wait=False, cancel_futures=True)

    def begin(self, shared: Any) -> None:
        """Begins to prepare the stages that come later and that the run has not met before; shared: as in `Run.stage`.

        Nothing is prepared where an earlier attempt found no direction, and at a second call. Of several processes all must
        call it, since all prepare the same.
        """
        if self._tasks is not None:
            return
        self._tasks, known = {}, self.run.manifest["stages"]
        names = [stage.name for stage in self.later if stage.name not in known and not self.run.exists(NO_DIRECTION)]
        names = distributed.share_json(names if distributed.first() else None)
        for stage in self.later:
            if stage.ahead and stage.name in names and (task := _tried(stage.name, stage.ahead, shared)):
                self._tasks[stage.name] = self._pool.submit(_tried, stage.name, task)

    def wait(self) -> None:
        """Waits until all that was begun is done: until then it holds the model."""
        wait((self._tasks or {}).values())

    def reach(self, stage: Stage[Any], shared: Any) -> None:
        """Waits until a stage, whose turn has come, is prepared, if it can be done; from here on only those after it are."""
        names = [later.name for later in self.later]
        self.later = self.later[names.index(stage.name) + 1 :]
        task = (self._tasks or {}).get(stage.name)
        if task is not None and not task.done() and not stage.skipped(shared):
            LOG.info(f"{stage.name}: waits until its programs are compiled")
            wait([task])


def _tried(name: str, work: Callable[..., Any], *args) -> Any:
    """Returns what the work of preparing a stage returns, None if it fails."""
    try:
        return work(*args)
    except Exception as error:
        LOG.debug(f"{name}: could not be prepared: {error}")

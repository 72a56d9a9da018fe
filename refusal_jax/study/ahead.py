"""Makes ready what later stages of a study need, such as compiled programs, in a thread, while the stages before them run."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from refusal_jax import distributed
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
        self._begun: dict[str, Future] = {}

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(cancel_futures=True)

    def begin(self, shared: Any) -> None:
        """Begins to prepare the stages that come later and have not been done; shared: as in `Run.stage`. Of several processes
        all must call it, since all prepare the same."""
        known = self.run.manifest["stages"]
        names = [stage.name for stage in self.later if stage.name not in known]
        names = distributed.share_json(names if distributed.first() else None)
        for stage in self.later:
            if stage.ahead and stage.name in names and stage.name not in self._begun:
                self._begun[stage.name] = self._pool.submit(_tried, stage.name, stage.ahead(shared))

    def reach(self, stage: Stage[Any]) -> None:
        """Waits until a stage, whose turn has come, is prepared; from here on only those after it are."""
        names = [later.name for later in self.later]
        self.later = self.later[names.index(stage.name) + 1 :]
        begun = self._begun.get(stage.name)
        if begun is not None and not begun.done():
            LOG.info(f"{stage.name}: waits for its programs to be compiled")
            begun.result()


def _tried(name: str, work: Callable[[], Any]) -> None:
    """Does the work of preparing a stage, whatever comes of it."""
    try:
        work()
    except Exception as error:
        LOG.debug(f"{name}: could not be prepared: {error}")

"""The trail in the monitor's loop, where the store's outbox is the truth and the trail's files follow it; and for single runs.

`TrailPart` makes the records of a batch, which are committed with it. `TrailCarrier` appends them to the files. Each record holds
the number of its letter, so that one that comes again after a crash is left out.
"""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import refusal_jax
from refusal_jax.judges.judge import Judge
from refusal_jax.monitor.parts import Letter, Message
from refusal_jax.monitor.traces import Judgements
from refusal_jax.monitor.trail.records import (
    ALERT,
    GATE,
    checked,
    judge_of,
    judged_record,
    marker,
    unjudged_record,
    utc,
)
from refusal_jax.monitor.trail.settings import TrailSettings
from refusal_jax.monitor.trail.writer import Trail

CHANNEL, ALERTS = "trail", "alerts"


class TrailPart:
    """The part that makes a record of each reply and of each alert. It comes after the parts that send alerts."""

    name = CHANNEL

    def __init__(self, settings: TrailSettings, judge: Judge):
        settings.check()
        self._mark, self._judge = marker(settings), judge_of(judge)
        self._writer, self._is_new = "", False

    def restore(self, state: Mapping[str, dict]) -> None:
        """Takes up the name under which this monitor's state writes."""
        self._is_new = "writer" not in state
        self._writer = os.urandom(8).hex() if self._is_new else state["writer"]["id"]

    def take(self, batch: Judgements, sent: Sequence[Message]) -> list[Message]:
        """Returns the records of a batch: of what was judged, of what could not be, and of the alerts."""
        records = [judged_record(one, self._mark, self._judge) for one in batch.judged]
        records += [unjudged_record(trace, self._mark) for trace in batch.unjudged]
        now = utc(time.time())
        records += [{"kind": ALERT, "time": now, "alert": one.content} for one in sent if one.channel == ALERTS]
        return [Message(CHANNEL, record | {"writer": self._writer}) for record in records]

    def changed(self) -> dict[str, dict]:
        """Returns the writer's name, once, when it is new."""
        new, self._is_new = self._is_new, False
        return {"writer": {"id": self._writer}} if new else {}


class TrailCarrier:
    """The carrier that appends records to the trail's files. Raises UserError as `Trail.open` does."""

    channel = CHANNEL

    def __init__(self, settings: TrailSettings):
        self._trail = Trail.open(settings)

    def deliver(self, letters: Sequence[Letter]) -> int:
        """Appends the records of letters, but for those that the files have, and returns how many letters there were.

        Raises UserError if the disk refuses them, after which the files end with a whole record.
        """
        last = self._trail.letters
        new = [
            {**content, "letter": number}
            for number, content in letters
            if number > last.get(content.get("writer", ""), 0)
        ]
        self._trail.append(new)
        return len(letters)

    def close(self) -> None:
        """Writes the last head, and closes the files."""
        self._trail.close()


def record_run(settings: TrailSettings, content: Mapping[str, Any], kind: str = GATE) -> int:
    """Appends one record of a run, such as one of the gate, to the trail, and returns its number there.

    content: a JSON object without `seq` and `previous`. kind, the time and our version are added to it. Raises UserError if the
    trail cannot be written or is in use by a monitor, and for content with the trail's own fields.
    """
    settings.check()
    added = {"kind": kind, "time": utc(time.time()), "version": refusal_jax.__version__}
    with Trail.open(settings) as trail:
        trail.append([{**checked(content), **added}])
        return trail.records

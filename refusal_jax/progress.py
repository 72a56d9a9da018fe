"""Shows the progress of long work: as a bar on a terminal, elsewhere as a line in the log every minute."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from time import monotonic
from typing import TypeVar

from tqdm import tqdm

from refusal_jax import distributed, logs

LOG = logging.getLogger(__name__)
EVERY_SECONDS = 60.0  # between lines in the log
Item = TypeVar("Item")


class Progress:
    """The progress of one piece of work, a context manager: call `update` as parts get done.

    total: how much there is to do, None if that is unknown. unit: what is counted; "B" for bytes. done: what was done before.
    delay: seconds before which no bar appears. quiet: show nothing.
    """

    def __init__(
        self, title: str, total: int | None, unit: str, *, done: int = 0, delay: float = 0.0, quiet: bool = False
    ):
        self.title, self.total, self.unit, self.quiet = title, total, unit, quiet
        self.n = self.before = done
        self.started = self.said = monotonic()
        self.note = ""
        self.bar = None
        if not quiet and distributed.first() and logs.on_terminal():
            scaled = unit == "B"
            self.bar = tqdm(
                total=total, initial=done, desc=title, unit=unit, unit_scale=scaled, leave=False, delay=delay
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, count: int = 1, note: str = "") -> None:
        """Counts `count` more as done; note: what else to show from now on, such as "loss 0.1"."""
        self.n, self.note = self.n + count, note or self.note
        if self.bar is not None:
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(count)
        elif not self.quiet and (now := monotonic()) - self.said >= EVERY_SECONDS:
            self.said = now
            LOG.info(self.line(now - self.started))

    def line(self, seconds: float) -> str:
        """Returns count, total and rate in words, after so many seconds of work."""

        def amount(number: float) -> str:
            return (
                tqdm.format_sizeof(number, "B")
                if self.unit == "B"
                else f"{number:.4g}"
                if number % 1
                else f"{number:.0f}"
            )

        rate = (self.n - self.before) / max(seconds, 1e-9)
        share = f" of {amount(self.total)} ({self.n / self.total:.0%})" if self.total else ""
        each = "" if self.unit == "B" else f" {self.unit}"
        return f"{self.title}: {amount(self.n)}{share}, {amount(rate)}{each}/s{self.note and ', '}{self.note}"


def each(items: Sequence[Item] | Iterable[Item], title: str, unit: str, total: int | None = None) -> Iterator[Item]:
    """Yields the items and shows how many of them are done. total: how many there are, if `items` has no length."""
    with Progress(title, len(items) if isinstance(items, Sequence) else total, unit) as progress:
        for item in items:
            yield item
            progress.update()

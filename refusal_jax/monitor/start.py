"""Opens what a monitor reads."""

import sys
import time
from collections.abc import Callable

from refusal_jax.files import local_path
from refusal_jax.monitor.lines import Pipe, Source
from refusal_jax.monitor.log_files import LogFiles
from refusal_jax.monitor.settings import MonitorSettings
from refusal_jax.monitor.store import Store

STDIN = "-"
MB = 1 << 20


def source_of(
    name: str, store: Store, settings: MonitorSettings, follow: bool, now: Callable[[], float] = time.time
) -> Source:
    """Returns the source of traces that a name means: "-" is standard input, else it is a file or a folder.

    follow: whether to wait for more at the end of the files. Raises UserError if there is no such file.
    """
    longest = settings.max_line_mb * MB
    if name == STDIN:
        return Pipe(sys.stdin.fileno(), "stdin", longest, settings.poll_s)
    began = store.meta().get("began")
    if began is None:
        began = str(now())
        store.note({"began": began})
    return LogFiles(local_path(name), store.cursors(), float(began), longest, follow, settings.poll_s)

"""Carries alerts out of the store's outbox: into a file of JSON lines, and to a webhook.

Both deliver at least once. The file then holds each alert once, because alerts have identities; who receives a
webhook drops those that it knows by the same field. A webhook's address is often a secret: it is read from the
environment, and neither shown nor logged.
"""

import json
import logging
import os
import pathlib
import threading
import time as clock
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence

from refusal_jax.errors import UserError
from refusal_jax.files import cannot_write
from refusal_jax.monitor.alerts import ALERTS
from refusal_jax.monitor.parts import Letter
from refusal_jax.monitor.store import Store

LOG = logging.getLogger(__name__)
WEBHOOK = "webhook"  # the channel
TIMEOUT_S = 10.0
MOMENT_S = 0.5  # for which reading waits for the answer of a server that has not failed
LAST_S = 10.0  # for which a monitor that ends waits for the server at most
WAITS_S = (1.0, 5.0, 30.0, 120.0, 600.0)  # after the first failure, the second, …; the last one is for all later ones
KEPT = 100_000  # bytes of the end of a file that are searched for identities


class AlertFile:
    """Appends alerts to a file, a JSON object a line; a `parts.Carrier`. Raises UserError if the file cannot be written."""

    channel = ALERTS

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.known: set[str] | None = None  # identities at the end of the file

    def deliver(self, letters: Sequence[Letter]) -> int:
        """Appends those of the alerts that the file does not hold, and returns how many are done with: all."""
        try:
            if self.known is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.known = _mended(self.path)
            new = [letter.content for letter in letters if letter.content["id"] not in self.known]
            if new:
                with open(self.path, "ab") as file:
                    file.write(b"".join(json.dumps(content).encode() + b"\n" for content in new))
                    file.flush()
                    os.fsync(file.fileno())
                self.known |= {content["id"] for content in new}
        except OSError as error:
            raise cannot_write(self.path, error) from None
        return len(letters)

    def close(self) -> None:
        """Holds nothing open."""


def _mended(path: pathlib.Path) -> set[str]:
    """Cuts off a last line that a crash left unfinished, and returns the identities at the end of the file."""
    if not path.exists():
        return set()
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - KEPT, 0))
        end = file.read()
        torn = len(end) - (end.rfind(b"\n") + 1)
        if torn:
            file.truncate(size - torn)
    found = set()
    for line in end[: len(end) - torn].splitlines():
        try:
            found.add(json.loads(line)["id"])
        except (ValueError, KeyError, TypeError):  # the first line may be cut by KEPT
            continue
    return found


class Webhook:
    """Sends each alert as a POST of JSON; a `parts.Carrier`. A thread of its own sends, so that reading does not wait.

    The body is the alert's content; its field `text` is what Slack, Mattermost and others show, `id` is what names the alert, and
    the header Idempotency-Key repeats it. An answer of 2xx is a delivery. After anything else, and after no answer in time, it is
    sent again, with growing pauses, until it is delivered, and alerts keep their order; what no server will ever take (400, 404
    or 410 at every try for a day) is given up with a warning.
    """

    channel = WEBHOOK
    GIVEN_UP = frozenset((400, 404, 405, 410, 413, 422))
    PATIENCE_S = 86400.0

    def __init__(self, url: str, timeout_s: float = TIMEOUT_S, waits_s: Sequence[float] = WAITS_S):
        self.url, self.timeout_s, self.waits_s = url, timeout_s, tuple(waits_s)
        self.sent = self.failures = 0
        self._queue: list[Letter] = []
        self._done = 0  # number of the last letter that is done with
        self._taken = 0  # number of the last letter in the queue
        self._failing = False  # whether the last try failed
        self._wake, self._closed = threading.Condition(), False
        self._finishing = False  # whether the monitor ends
        self._thread: threading.Thread | None = None

    @classmethod
    def from_environment(cls, variable: str, timeout_s: float = TIMEOUT_S) -> "Webhook":
        """Returns the webhook whose address is in a variable of the environment.

        Raises UserError if the variable is not set or holds no address of http or https; the message does not show it.
        """
        url = os.environ.get(variable, "").strip()
        if not url:
            raise UserError(
                f"The variable {variable} of the environment, which should hold the webhook's address, is not set. "
                f"Set it (export {variable}=https://…), and start the monitor again."
            )
        try:
            parts = urllib.parse.urlsplit(url)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            good = False
        if not good or not url.isascii() or any(c.isspace() for c in url):
            raise UserError(
                f"The variable {variable} of the environment does not hold a web address, expected http://… or https://…. (Its "
                "value is not shown, because it may be secret.) Set it anew, and start the monitor again."
            )
        return cls(url, timeout_s)

    @property
    def host(self) -> str:
        """Returns the server's name, which is all of the address that may be shown."""
        return urllib.parse.urlsplit(self.url).hostname or ""

    def deliver(self, letters: Sequence[Letter]) -> int:
        """Takes letters that it does not have yet, and returns how many of those given have been delivered."""
        with self._wake:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="webhook", daemon=True)
                self._thread.start()
            new = [letter for letter in letters if letter.number > self._taken]
            if new:
                self._queue += new
                self._taken = new[-1].number
                self._wake.notify_all()
            if not self._failing:
                self._wake.wait_for(lambda: self._done >= letters[-1].number or self._failing, MOMENT_S)
            return sum(letter.number <= self._done for letter in letters)

    def finish(self, store: Store) -> None:
        """Sends what waits if the server takes it in time, and tells the store; what it does not take stays in the outbox for
        the next start."""
        with self._wake:
            self._finishing = True
            self._wake.notify_all()
            self._wake.wait_for(lambda: self._done >= self._taken, LAST_S)
        self.close()
        letters = store.letters(self.channel)
        done = sum(letter.number <= self._done for letter in letters)
        if done:
            store.delivered(self.channel, letters[done - 1].number)

    def close(self) -> None:
        """Ends the thread, and with it the tries."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        if self._thread:
            self._thread.join(min(self.timeout_s, 3.0))

    def _run(self) -> None:
        while (letter := self._next()) is not None:
            tried, began = 0, clock.monotonic()
            while not self._closed:
                fault, for_ever = self._post(letter)
                with self._wake:
                    self._failing = bool(fault)
                    self.sent, self.failures = self.sent + (not fault), self.failures + bool(fault)
                    self._wake.notify_all()
                if not fault:
                    break
                patient = clock.monotonic() - began < self.PATIENCE_S
                if for_ever and not patient:
                    LOG.warning(f"The webhook at {self.host} refuses alert {letter.content['id']}: {fault}. Given up.")
                    break
                pause = self.waits_s[min(tried, len(self.waits_s) - 1)]
                LOG.warning(
                    f"The webhook at {self.host} did not take alert {letter.content['id']}: {fault}. It is sent again in "
                    f"{pause:g} s."
                )
                tried += 1
                with self._wake:
                    if not self._finishing:
                        self._wake.wait_for(lambda: self._closed or self._finishing, pause)
                    if self._finishing:
                        self._wake.wait_for(lambda: self._closed, min(self.waits_s))
            else:
                return
            with self._wake:
                self._done = letter.number
                self._wake.notify_all()

    def _next(self) -> Letter | None:
        with self._wake:
            self._wake.wait_for(lambda: bool(self._queue) or self._closed)
            return None if self._closed else self._queue.pop(0)

    def _post(self, letter: Letter) -> tuple[str, bool]:
        """Sends one alert, and returns what went wrong, "" if nothing did, and whether it would always."""
        request = urllib.request.Request(
            self.url,
            json.dumps(letter.content).encode(),
            {
                "Content-Type": "application/json",
                "User-Agent": "refusal-jax-monitor",
                "Idempotency-Key": letter.content["id"],
            },
            method="POST",
        )
        try:
            with _OPENER.open(request, timeout=self.timeout_s) as answer:
                return ("", False) if 200 <= answer.status < 300 else (f"status {answer.status}", False)
        except urllib.error.HTTPError as error:
            error.close()
            return f"status {error.code}", error.code in self.GIVEN_UP
        except Exception as error:  # whatever a server or a network does must not end the monitor
            return _reason(error), False


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Takes a redirect for a failure: it would carry the alert to an address that nobody gave."""

    def redirect_request(self, req, fp, code, msg, headers, newurl) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


def _reason(error: Exception) -> str:
    """Returns what kind of error it was. Its text is left out, because it may quote the address."""
    reason = getattr(error, "reason", error)
    return type(reason if isinstance(reason, Exception) else error).__name__

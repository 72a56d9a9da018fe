"""Defines what can go wrong with a request, and what follows from it: ask again, give this conversation up, or stop at once.

Messages of the server are data: they are shortened, put on one line, and stripped of the key.
"""

import json
import math
import re
import time
from email.utils import parsedate_to_datetime
from typing import Any

from refusal_jax.endpoints.address import Address
from refusal_jax.endpoints.endpoint import Fault
from refusal_jax.errors import UserError

LONGEST_WAIT = 120.0  # seconds that a server may ask to be left alone for, before asking later is the user's part
MOST_SHOWN = 300  # characters of a server's message
FILTER_WORDS = re.compile(r"content[_ ]?(filter|policy|management)|moderation|flagged|ResponsibleAI", re.IGNORECASE)
SURE_FILTER_WORDS = re.compile(
    r"content[_ ]?filter|flagged", re.IGNORECASE
)  # of errors that a failing filter may give, too
NO_QUOTA = ("insufficient_quota", "billing_not_active", "billing_hard_limit_reached")
WAIT_AND_ASK = (408, 409, 423, 425, 429)
UNSUPPORTED = 501


class Trouble(Exception):
    """A request without a reply.

    kind: of the fault; said: a sentence about it without its full stop; passing: whether it may pass if one asks again. wait:
    seconds that the server asks to be left alone for, or None. code: of HTTP, or None. detail: everything that the server said.
    """

    def __init__(
        self,
        kind: Fault,
        said: str,
        *,
        passing: bool = True,
        wait: float | None = None,
        code: int | None = None,
        detail: str = "",
    ):
        super().__init__(said)
        self.kind, self.said, self.passing, self.wait, self.code, self.detail = (
            kind,
            said,
            passing,
            wait,
            code,
            detail,
        )


def shown(text: str, address: Address) -> str:
    """Returns a server's text for a message: without the key, on one line, shortened, and without signs that act on terminals."""
    line = "".join(sign if sign.isprintable() else " " for sign in address.without_key(text))
    line = " ".join(line.split())
    return line if len(line) <= MOST_SHOWN else line[:MOST_SHOWN] + "…"


def of_exception(error: Exception, address: Address, timeout_s: float) -> Trouble:
    """Returns the trouble that an exception of the client tells. Raises UserError for what no later request could mend."""
    import openai

    if isinstance(error, TimeoutError | openai.APITimeoutError):
        return Trouble(Fault.TIMEOUT, f"no whole reply came within {timeout_s:g} s")
    if isinstance(error, openai.APIConnectionError):
        cause = error.__cause__
        reason = shown(f"{type(cause).__name__}: {cause}" if cause else str(error), address)
        return Trouble(Fault.CONNECTION, f"the connection failed ({reason})")
    if isinstance(error, openai.APIStatusError):
        return of_status(error.status_code, error.body, address, error.response.headers)
    if isinstance(error, openai.APIError):  # an error inside of a stream
        return of_status(500, error.body or str(error), address)
    if isinstance(error, openai.OpenAIError | ValueError):  # a body that cannot be decoded
        return Trouble(Fault.UNREADABLE, f"what came is no reply ({shown(str(error), address)})")
    raise error


def of_status(code: int, body: Any, address: Address, headers: Any = None) -> Trouble:
    """Returns the trouble that a status and its body tell.

    code: of HTTP. body: parsed JSON, or text. headers: a mapping whose names are in lower case. Raises UserError if the server
    does not let us in, does not know the address or the model, or asks for a pause longer than LONGEST_WAIT.
    """
    detail = body if isinstance(body, str) else json.dumps(_without_input(body))
    message = shown(_message(body) or f"status {code}", address)
    filter_words = FILTER_WORDS if code < 500 else SURE_FILTER_WORDS
    if code != 429 and filter_words.search(detail):
        return Trouble(
            Fault.FILTERED, f"a filter of the server refused the request ({message})", passing=False, code=code
        )
    if code in (401, 402, 403):
        raise UserError(_not_let_in(code, message, address))
    if code in (404, 405):
        raise UserError(
            f"{address.url} does not know what it was asked for (status {code}: {message}). Check the model's name against the "
            f"server's list ({address.url}/models), and the address, which usually ends in /v1."
        )
    hint = str(headers.get("x-should-retry", "")) if headers is not None else ""
    passing = hint != "false" and (hint == "true" or code in WAIT_AND_ASK or (code >= 500 and code != UNSUPPORTED))
    if code == 429:
        wait = _wait(headers)
        if any(word in detail for word in NO_QUOTA):
            raise UserError(f"{address.url} has no quota left for the key in {address.variable} ({message}).")
        if wait is not None and wait > LONGEST_WAIT:
            raise UserError(
                f"{address.url} asks to be left alone for {wait:.0f} s ({message}). Run the same command again after that; lower "
                "the endpoint's concurrency if its limit is on requests at a time."
            )
        return Trouble(Fault.BUSY, f"the server is busy ({message})", passing=passing, wait=wait, code=code)
    if code >= 500:
        said = f"the server failed (status {code}: {message})"
        wait = _wait(headers)
        wait = None if wait is not None and wait > LONGEST_WAIT else wait
        return Trouble(Fault.SERVER, said, passing=passing, wait=wait, code=code, detail=detail)
    said = f"the server rejected the request (status {code}: {message})"
    return Trouble(Fault.REJECTED, said, passing=passing, code=code, detail=detail)


def _not_let_in(code: int, message: str, address: Address) -> str:
    if not address.key:
        what = "The endpoint's api_key_env is empty: put the key into an environment variable, and its name there"
    else:
        what = f"Check the key in the environment variable {address.variable}, and what it may use"
    return f"{address.url} does not let us in (status {code}: {message}). {what}."


def _without_input(body: Any) -> Any:
    """Returns an error's body without the request, which some servers send back in it."""
    if isinstance(body, dict):
        return {name: _without_input(one) for name, one in body.items() if name not in ("input", "ctx")}
    return [_without_input(one) for one in body] if isinstance(body, list) else body


def _message(body: Any) -> str:
    """Returns what an error's body says, in whichever of the servers' forms."""
    if isinstance(body, str):
        return "an HTML page" if re.match(r"\s*<(!doctype|html)", body, re.IGNORECASE) else body
    if isinstance(body, dict):
        for name in ("message", "error", "detail", "msg"):
            if body.get(name):
                return _message(body[name])
    if isinstance(body, list) and body:  # as pydantic lists what is wrong
        return _message(body[0])
    return json.dumps(body) if body else ""


def _wait(headers: Any) -> float | None:
    """Returns the seconds that a server asks to wait, given as milliseconds, seconds, or a date; None if it does not."""
    if headers is None:
        return None
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        text = str(headers.get(name) or "")
        try:
            seconds = float(text) * unit
        except ValueError:
            try:
                seconds = parsedate_to_datetime(text).timestamp() - time.time()
            except (ValueError, TypeError, OverflowError):
                continue
        if math.isfinite(seconds):
            return max(seconds, 0.0)
    return None

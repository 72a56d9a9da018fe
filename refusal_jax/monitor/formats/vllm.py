"""Reads vLLM's own log, where it was told to log requests and outputs: a request and its output are lines of their own."""

import ast
import datetime
import re
import time

from refusal_jax.monitor.formats.draft import Draft
from refusal_jax.monitor.formats.rendered import request_of_rendered

TEXT = r"(?:'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|None)"  # as Python's repr writes one
STAMP = re.compile(r"\b(\d\d)-(\d\d) (\d\d):(\d\d):(\d\d)\b")
RECEIVED = re.compile(rf"Received request (\S+?): (?:prompt: ({TEXT}), )?params: ")
DETAILS = re.compile(rf"Request (\S+) details: prompt: ({TEXT}),")
GENERATED = re.compile(
    rf"Generated response (\S+?)( \(streaming (?:delta|complete)\))?: output: ({TEXT})(?:, output_token_ids.*)?"
    r", finish_reason: (\w+)"
)
MARKS = ("Received request ", "Generated response ", " details: prompt: ")


def read_text(line: str, moment: float | None = None) -> list[Draft] | None:
    """Returns what a line of text tells, nothing for one of vLLM's other lines, and None if the line is none of a log.

    moment: when it was written, where something around the text says so; else its stamp, which has no year and no zone, is
    taken in this machine's zone.
    """
    if not any(mark in line for mark in MARKS):
        return [] if STAMP.search(line[:80]) or line.lstrip().startswith(("INFO", "WARNING", "ERROR", "(")) else None
    moment = _stamp(line) if moment is None else moment
    if found := GENERATED.search(line):
        identity, kind, output, reason = found.groups()
        if kind and "delta" in kind:
            return []  # the line for the whole of it follows
        return [
            Draft(
                key=f"vllm:{identity}",
                id=identity,
                time=moment,
                reply=_text(output),
                finish_reason=None if reason == "None" else "stop" if reason == "streaming_complete" else reason,
            )
        ]
    if found := RECEIVED.search(line) or DETAILS.search(line):
        request = request_of_rendered(_text(found[2] or "None") or "")
        return [
            Draft(
                key=f"vllm:{found[1]}",
                ended=False,
                id=found[1],
                time=moment,
                system=request.system,
                prompt=request.prompt,
            )
        ]
    return []


def _text(literal: str) -> str | None:
    """Returns the text that a repr stands for."""
    return ast.literal_eval(literal)


def _stamp(line: str) -> float | None:
    """Returns the time of a line's stamp, in the last year in which it is not in the future."""
    found = STAMP.search(line[:200])
    if not found:
        return None
    month, day, hour, minute, second = map(int, found.groups())
    now = time.time()
    for year in (datetime.datetime.fromtimestamp(now).year, datetime.datetime.fromtimestamp(now).year - 1):
        try:
            moment = datetime.datetime(year, month, day, hour, minute, second).timestamp()
        except ValueError:
            continue
        if moment <= now + 86400:
            return moment
    return None

"""Reads what resistance tests have found of a checkpoint, for other results to show: an audit, or a gate.

A record is believed of the checkpoint whose files it was made from alone, told by their fingerprint.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from refusal_jax.errors import UserError, shown
from refusal_jax.files import file_hash, read_json
from refusal_jax.judges.statistics import Rate

FORM = "refusal_jax/resistance/"
KNOWN = f"{FORM}1"


@dataclasses.dataclass(frozen=True)
class Test:
    """Holds what was kept under one test: of the refusals without an attack, with bounds that hold for all tests together.
    verdict: as of `worst.VERDICTS`; the rate is None where the test was not done."""

    name: str
    verdict: str
    kept: Rate | None = None
    low: float = 0.0
    high: float = 1.0

    @property
    def told(self) -> bool:
        """Returns whether it is part of the worst case: it was done, did not break the model, and has replies to count."""
        return self.kept is not None and self.kept.n > 0 and self.verdict != "damaged"


@dataclasses.dataclass(frozen=True)
class Attached:
    """Holds what resistance tests found of one checkpoint.

    title: what the record calls it. unattacked: of harmful prompts, how many it refuses without an attack. worst: the name of
    the test that leaves least, "" if none tells anything; kept, low, high: what it leaves, and the bounds of the worst case,
    which account for having taken the worst of `count` tests. verdict: on the worst case, of `worst.VERDICTS` or
    "no_refusal". floor: the share that the record's verdicts ask for. sentences: of the record. sha256: of the file.
    """

    title: str
    unattacked: Rate
    worst: str
    kept: float
    low: float
    high: float
    verdict: str
    floor: float
    confidence: float
    count: int
    tests: tuple[Test, ...]
    sentences: tuple[str, ...]
    sha256: str

    @property
    def told(self) -> bool:
        """Returns whether any test tells anything."""
        return bool(self.worst) and self.verdict != "no_refusal"

    @property
    def bounds(self) -> str:
        """Returns the worst case in words, with its bounds."""
        of = f"the worst of {self.count} tests" if self.count > 1 else "the only test"
        together = " for all of them together" if self.count > 1 else ""
        return (
            f"{self.kept:.0%} of its refusals under {of} ({self.worst}; between {self.low:.0%} and {self.high:.0%} with "
            f"{self.confidence:.0%} confidence{together})"
        )


def read_attached(path: pathlib.Path, fingerprint: str, name: str) -> Attached:
    """Returns what the record in a file says of the checkpoint with this fingerprint.

    name: what the user calls the checkpoint. Raises UserError for a file that is no record of resistance tests, or damaged,
    for one of other checkpoints, and for one in which this checkpoint could not be tested.
    """
    record = checked_record(path)
    found = entry_of(record, fingerprint)
    if found is None:
        there = ", ".join(f"{one.get('title')} ({str(one.get('fingerprint'))[:16]}…)" for one in record["checkpoints"])
        raise UserError(
            f"The resistance tests in {path} are not of {name}, whose files have the fingerprint {fingerprint[:16]}…: they are "
            f"of {shown(there)}. Test this checkpoint with `refusal-jax resist`, and name the record of that."
        )
    if not found.get("worst"):
        raise UserError(
            f"{path} says that {name} could not be tested: {shown(found.get('reason'))} Test it again with `refusal-jax resist`."
        )
    return attached(path, record, found)


def read_attached_if_there(path: pathlib.Path, fingerprint: str) -> Attached | None:
    """Returns what a record says of another checkpoint, such as the base of one, None if it was not tested with it. Raises
    UserError for a file that is no record or damaged."""
    record = checked_record(path)
    found = entry_of(record, fingerprint)
    return attached(path, record, found) if found and found.get("worst") else None


def checked_record(path: pathlib.Path) -> dict[str, Any]:
    """Returns the record in a file. Raises UserError for a file that is none, or of a form that is not known."""
    if path.is_dir():
        path = path / "resistance.json"
    record = read_json(path)
    form, checkpoints = record.get("schema"), record.get("checkpoints")
    if not isinstance(form, str) or not form.startswith(FORM):
        raise UserError(
            f"{path} is no record of resistance tests. Name a resistance.json that `refusal-jax resist --out` wrote."
        )
    if form != KNOWN:
        raise UserError(f"{path} has the form {shown(form)}, and {KNOWN} is read. Test again with this version.")
    if not isinstance(checkpoints, list) or not all(isinstance(one, dict) for one in checkpoints):
        raise _damaged(path, "it lists no checkpoints")
    return record


def entry_of(record: Mapping[str, Any], fingerprint: str) -> dict[str, Any] | None:
    """Returns what a record has on the checkpoint with this fingerprint, None if nothing."""
    return next((one for one in record["checkpoints"] if one.get("fingerprint") == fingerprint), None)


def attached(path: pathlib.Path, record: Mapping[str, Any], found: Mapping[str, Any]) -> Attached:
    """Returns one checkpoint's part of a record. Raises UserError where fields are missing or no numbers."""
    try:
        worst = found["worst"]
        tests = tuple(_test(str(name), one) for name, one in found["tests"].items())
        value, low, high = _share(worst["value"], math.nan), _share(worst["low"], 0.0), _share(worst["high"], 1.0)
        if low > high:
            raise ValueError(f"its bounds are {low} and {high}")
        return Attached(
            str(found["title"]),
            _rate(found["unattacked"]["refused"]),
            str(worst["test"] or ""),
            value,
            low,
            high,
            str(worst["verdict"]),
            _share(record["floor"], 0.0),
            _share(record["confidence"], 0.95),
            int(worst["tests"]),
            tests,
            tuple(map(str, found["sentences"])),
            file_hash(path / "resistance.json" if path.is_dir() else path),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, str(error)) from None


def _damaged(path: pathlib.Path, why: str) -> UserError:
    return UserError(
        f"The record of resistance tests in {path} is damaged ({shown(why)}). Make it again with `refusal-jax resist`."
    )


def _test(name: str, one: Mapping[str, Any]) -> Test:
    if "kept" not in one:
        return Test(name, str(one["verdict"]))
    kept = one["kept"]
    return Test(name, str(one["verdict"]), _rate(kept), _share(kept["low"], 0.0), _share(kept["high"], 1.0))


def _rate(row: Mapping[str, Any]) -> Rate:
    count, n = row["successes"], row["n"]
    if type(count) is not int or type(n) is not int or not 0 <= count <= n:
        raise ValueError(f"{count} of {n} is no rate")
    return Rate(count, n)


def _share(value: Any, instead: float) -> float:
    """Returns a number from 0 to 1, or what stands for null. Raises ValueError for another."""
    if value is None:
        return instead
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{value!r} is no share from 0 to 1")
    return float(value)

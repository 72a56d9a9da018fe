"""Reads what shares are compared with: a recorded run of the gate, or a file of rates.

A file of rates is JSON, `{"CATEGORY": {"refuses": 0.95}}`, or with models, `{"MODEL": {"CATEGORY": {"refuses": 0.95}}}`;
"*" stands for any. A share may be a number, which is then taken as exact, or `{"count": 190, "n": 200}`, whose uncertainty
counts.
"""

import json
import pathlib
from collections import Counter
from typing import Any

from refusal_jax.errors import DamagedFile, UserError, did_you_mean, setting, shown
from refusal_jax.files import read_text
from refusal_jax.judges.judge import Outcome
from refusal_jax.monitor.change import OUTCOMES, Reference

GATE = "refusal_jax/gate-record/1"
ANY = "*"
NAMES = tuple(outcome.value for outcome in OUTCOMES)
References = dict[tuple[str, str], Reference]


def read_references(path: pathlib.Path, judge: str) -> References:
    """Returns the references of a file, by model and category.

    judge: the monitor's, whose outcomes are taken from a recorded run; the run's prompt sets become categories. Raises UserError
    for a file that is neither, for a run that this judge did not judge, and for shares that are none.
    """
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}). Correct it.") from None
    if not isinstance(content, dict):
        raise _no_rates(path, path.name, content)
    if content.get("schema") == GATE:
        return _recorded(path, content, judge)
    if "schema" in content:
        raise UserError(
            f"{path} has the schema {shown(content['schema'])}, expected {GATE}, as `refusal-jax gate record` writes it, or a "
            'file of rates such as {"CATEGORY": {"refuses": 0.95}}.'
        )
    found: References = {}
    for name, below in content.items():
        if not isinstance(below, dict) or not below:
            raise _no_rates(path, name, below)
        if any(key in NAMES for key in below):
            found[ANY, name] = _stated(path, name, below)
        else:
            for category, shares in below.items():
                found[name, category] = _stated(path, f"{name}, {category}", shares)
    return found


def _recorded(path: pathlib.Path, content: dict, judge: str) -> References:
    """Counts the outcomes of a recorded run by prompt set; replies with a fault have none."""
    counts: dict[str, Counter[str]] = {}
    try:
        for row in content["replies"]:
            outcome = None if row["fault"] else row["outcomes"].get(judge)
            if outcome is not None:
                counts.setdefault(row["set"], Counter())[Outcome(outcome)] += 1
        judges = [one["name"] for one in content["judges"]]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DamagedFile(
            f"{path} is a damaged recorded run: its replies lack fields. Record it again with `refusal-jax gate record`."
        ) from None
    if not counts:
        raise UserError(
            f"{path} holds no outcome of the judge {judge!r}; it was judged by {', '.join(judges) or 'none'}. Rates of different "
            f"judges cannot be compared: record it again with this judge, or give {setting('judge')}."
        )
    return {
        (ANY, name): Reference(tuple(of[outcome] for outcome in OUTCOMES), of.total(), f"recorded in {path.name}")
        for name, of in counts.items()
    }


def _stated(path: pathlib.Path, name: str, shares: Any) -> Reference:
    """Returns the reference of a category: of counts if it has counts, of exact shares if it has numbers."""
    if not isinstance(shares, dict) or not shares:
        raise _no_rates(path, name, shares)
    for outcome, share in shares.items():
        if outcome not in NAMES:
            raise UserError(
                f"{path}, {name}: {shown(outcome)} is no outcome.{did_you_mean(outcome, NAMES)} Outcomes are {', '.join(NAMES)}."
            )
        if not _is_share(share):
            raise _no_rates(path, f"{name}, {outcome}", share)
    origin = f"stated in {path.name}"
    counted = {outcome: share for outcome, share in shares.items() if isinstance(share, dict)}
    if not counted:
        known = tuple(None if outcome not in shares else float(shares[outcome]) for outcome in NAMES)
        if sum(share or 0.0 for share in known) > 1 + 1e-9:
            raise UserError(f"{path}, {name}: the shares add up to more than 1. Correct them.")
        return Reference((0,) * len(OUTCOMES), 0, origin, known)
    sizes = {share["n"] for share in counted.values()}
    if len(counted) < len(shares) or len(sizes) > 1 or sum(share["count"] for share in counted.values()) > max(sizes):
        raise UserError(
            f"{path}, {name}: the counts do not belong together. Give all of them of the same n replies, of which their sum is "
            "at most n."
        )
    (n,) = sizes
    counts = {outcome: share["count"] for outcome, share in counted.items()}
    known = tuple(counts.get(outcome, -1) for outcome in NAMES)
    return Reference(known, n, origin)


def _is_share(share: Any) -> bool:
    if isinstance(share, dict):
        numbers = [share.get("count"), share.get("n")]
        whole = all(isinstance(value, int) and not isinstance(value, bool) for value in numbers)
        return whole and set(share) == {"count", "n"} and 0 <= share["count"] <= share["n"] and share["n"] > 0
    return isinstance(share, int | float) and not isinstance(share, bool) and 0 <= share <= 1


def _no_rates(path: pathlib.Path, name: str, found: Any) -> UserError:
    return UserError(
        f'{path}, {shown(name)}: found {shown(found)}, expected shares by outcome, such as {{"refuses": 0.95}} or '
        '{"refuses": {"count": 190, "n": 200}}.'
    )

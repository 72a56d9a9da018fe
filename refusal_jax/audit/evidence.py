"""Holds what the lanes of an audit find: rows of evidence, and the facts that verdicts are made from."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Evidence:
    """One statistic of an audit.

    statistic: its name, the same in every audit. value: what was found, a number or a word. meaning: what it means here, one
    whole sentence. low, high: the bounds of its 95 % interval, where it has one. p_value: how often benign changes of the same
    base reach it (conformal, small is unusual); null: the value that 99 % of them stay within; both None where no null was
    made. where: the tensors or layers that it is about, "" for the whole checkpoint.
    """

    statistic: str
    value: float | int | str
    meaning: str
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    null: float | None = None
    where: str = ""

    @property
    def row(self) -> dict[str, Any]:
        """Returns the evidence in plain values for JSON, where a number that is not finite is None."""
        return {name: plain(value) for name, value in dataclasses.asdict(self).items()}


@dataclasses.dataclass(frozen=True)
class Findings:
    """Holds what one lane found.

    lane: its name. evidence: in the order in which it is shown. facts: plain values by name, from which the verdicts are made;
    a fact that was not measured is not there. left_out: why the lane was not run, one whole sentence, or "" if it was.
    seconds: how long it took. bytes_read: of weights. replies: what the models replied, by name of the condition, as rows
    {category, prompt, response} of the published format; they are written and shown only where that is asked for.
    """

    lane: str
    evidence: Sequence[Evidence] = ()
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    left_out: str = ""
    seconds: float = 0.0
    bytes_read: int = 0
    replies: Mapping[str, Sequence[Mapping[str, Any]]] = dataclasses.field(default_factory=dict)

    @property
    def record(self) -> dict[str, Any]:
        """Returns the findings in plain values for JSON, without the replies."""
        return {
            "lane": self.lane,
            "left_out": self.left_out,
            "seconds": round(self.seconds, 3),
            "bytes_read": self.bytes_read,
            "evidence": [one.row for one in self.evidence],
            "facts": {name: plain(value) for name, value in self.facts.items()},
        }


def plain(value: Any) -> Any:
    """Returns a value as JSON can hold it: numbers and arrays of numpy and jax become Python's, and what is not finite None."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value

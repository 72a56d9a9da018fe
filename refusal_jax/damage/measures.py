"""Measures of what many edits do to a model, each on units of its own: prompts, texts, questions.

A `Probe` reads everything that one pass tells: M edits meet n units as rows of one compiled program, and each of its measures
gets a value for every edit and unit. The interface is open: whoever measures something else of the same edits writes a probe,
gives it to `measure_all`, and has intervals and paired comparisons from `summary`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from refusal_jax.damage.edited_rows import EditedRows
from refusal_jax.edits import Edits
from refusal_jax.judges.statistics import PairedRates, Rate, bounded, mean_interval, paired_mean
from refusal_jax.mechanism.edited_prompts import EditedPrompts

Kind = Literal["rate", "mean"]


@dataclasses.dataclass(frozen=True)
class Measure:
    """Tells what a number is. name: in files. title: in tables and figures, without its unit. unit: of a mean, such as "nats".

    kind: "rate" of units that are 1 rather than 0, or "mean" over units. Where a value is NaN the unit has none.
    """

    name: str
    title: str
    kind: Kind
    unit: str = ""


@runtime_checkable
class Probe(Protocol):
    """Something that reads edits. name: of its rows in a ledger. measures: what it tells. at_once: number of edits that one pass
    takes."""

    @property
    def name(self) -> str: ...

    @property
    def measures(self) -> Sequence[Measure]: ...

    @property
    def at_once(self) -> int: ...

    def read(self, edits: Edits) -> dict[str, Float[np.ndarray, "M n"]]:
        """Returns for each measure, by name, its values for M edits and its n units, float64."""
        ...


Values = dict[str, Float[np.ndarray, "M n"]]


@dataclasses.dataclass(frozen=True)
class PromptProbe:
    """Reads the refusal scores of prompts, and how far their next token's distribution moves.

    refused: the measure of prompts whose score says that they are refused. score, kl: of scores and KL divergences; None where it
    is of no interest.
    """

    name: str
    prompts: EditedPrompts
    refused: Measure
    score: Measure | None = None
    kl: Measure | None = None

    @property
    def measures(self) -> list[Measure]:
        """Returns the measures that are of interest."""
        return [one for one in (self.refused, self.score, self.kl) if one]

    @property
    def at_once(self) -> int:
        """Returns the number of edits that one pass takes."""
        return self.prompts.at_once

    def read(self, edits: Edits) -> Values:
        """Returns the values of each measure, `[M, n]`. Raises UserError for values that are not finite."""
        found = self.prompts.read(edits)
        values = {self.refused.name: (found.scores_mn > 0).astype(np.float64)}
        values |= {self.score.name: found.scores_mn} if self.score else {}
        return values | ({self.kl.name: found.kl_mn} if self.kl else {})


@dataclasses.dataclass(frozen=True)
class TextProbe:
    """Reads the mean cross-entropy of rows of text over the tokens that count, in nats. measure: what it tells; its name is
    that of the probe, too."""

    measure: Measure
    rows: EditedRows

    @property
    def name(self) -> str:
        """Returns the name of its measure."""
        return self.measure.name

    @property
    def measures(self) -> list[Measure]:
        """Returns the one measure."""
        return [self.measure]

    @property
    def at_once(self) -> int:
        """Returns the number of edits that one pass takes."""
        return self.rows.at_once

    def read(self, edits: Edits) -> Values:
        """Returns the mean loss of each row, `[M, n]`, NaN where no token counts. Raises UserError for values that are not
        finite."""
        tokens_n = self.rows.tokens_n
        means_mn = self.rows.losses(edits) / np.maximum(tokens_n, 1)
        return {self.name: np.where(tokens_n > 0, means_mn, np.nan)}


def measure_all(
    probe: Probe,
    edits: Edits,
    known: Sequence[dict] = (),
    save: Callable[[list[dict]], None] = lambda rows: None,
) -> Values:
    """Returns for each measure of a probe its values, `[M, n]`, of M edits.

    known: rows that `save` got in an interrupted run, `{"probe", "edit", "values"}`; they are not measured again, and
    rows of other probes are passed over. Raises UserError for values that are not finite.
    """
    done = {row["edit"]: row["values"] for row in known if row.get("probe") == probe.name}
    left = [number for number in range(edits.rows) if number not in done]
    for start in range(0, len(left), probe.at_once):
        part = left[start : start + probe.at_once]
        found = probe.read(edits.take(part))
        rows = [
            {"probe": probe.name, "edit": number, "values": {name: bare(found[name][i]) for name in found}}
            for i, number in enumerate(part)
        ]
        save(rows)
        done |= {row["edit"]: row["values"] for row in rows}
    return {
        one.name: np.array([done[number][one.name] for number in range(edits.rows)], np.float64)
        for one in probe.measures
    }


def bare(values_n: np.ndarray) -> list[float | None]:
    """Returns values for a row of a ledger, None for NaN."""
    return [None if math.isnan(value) else value for value in values_n.tolist()]


def labels(values_n: np.ndarray) -> list[int | None]:
    """Returns the values of a rate as labels 0 and 1, None for NaN."""
    return [None if value is None else int(value) for value in bare(values_n)]


def summary(measure: Measure, values_n: Float[np.ndarray, " n"], before_n: Float[np.ndarray, " n"]) -> dict:
    """Returns a measure of one edit over its n units, with 95 % intervals: for a rate `{"rate", "low", "high", "successes", "n"}`
    (Wilson), for a mean `{"mean", "low", "high", "n"}` (bootstrap over units); and "change", `{"mean", "low", "high"}`, its
    difference from baseline on the same units.

    before_n: the values at baseline. Units without a value under one of the two are left out of the change.
    """
    if measure.kind == "rate":
        pairs = PairedRates.of(labels(before_n), labels(values_n))
        low, high = pairs.interval
        change = {"mean": pairs.difference, "low": low, "high": high}
        row = Rate.of(labels(values_n)).row
    else:
        both = ~np.isnan(values_n) & ~np.isnan(before_n)
        found = paired_mean(before_n[both], values_n[both])
        change = {name: found[name] for name in ("mean", "low", "high")}
        row = mean_interval(values_n[~np.isnan(values_n)])
    return bounded(row) | {"change": bounded(change)}


def summaries(measures: Sequence[Measure], values: Mapping[str, np.ndarray], baseline: int = 0) -> list[dict]:
    """Returns for each of M edits its measures' summaries by name, compared with the edit that is the baseline.

    values: of each measure, `[M, n]`.
    """
    count = len(next(iter(values.values()))) if values else 0
    return [
        {one.name: summary(one, values[one.name][m], values[one.name][baseline]) for one in measures}
        for m in range(count)
    ]

"""The rule that selects a direction among the scored candidates (paper, appendix C), and how near those come that it discards.

Candidates have rows in the published format: `position`, `layer`, and the scores `refusal_score` (bypass), `steering_score`
(induce) and `kl_div_score`, each None where it was not needed.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence

from refusal_jax.errors import NoDirection, field, setting

NEAREST = 5  # candidates of each kind that are shown as near misses


@dataclasses.dataclass(frozen=True)
class Shortfall:
    """A condition that a candidate does not meet.

    setting: of `config.select`; needed: the value of it with which the candidate meets the condition. by: how much is missing,
    in the score's unit or in layers. condition: in words.
    """

    setting: str
    needed: float
    by: float
    condition: str

    @property
    def words(self) -> str:
        """Returns by how much which condition is not met."""
        return f"{self.condition} by {self.by:.0f}" if self.setting == PRUNE else f"{self.condition} by {self.by:.3g}"

    @property
    def flag(self) -> str:
        """Returns how the user gives the setting with the needed value."""
        return field(f"select.{self.setting}", self.needed)


KL, INDUCE, PRUNE = "kl_threshold", "induce_threshold", "prune_fraction"
LOOSENING = {
    KL: "A higher KL threshold accepts a direction whose ablation changes what the model says on the other side, too: what is "
    "then missing may be damage to the model and no removed behaviour.",
    INDUCE: "A lower induce threshold accepts a direction that does not cause the behaviour when it is added: it may only tell "
    "the two kinds of prompts apart.",
    PRUNE: "A lower pruned fraction accepts directions of the last layers, which may be no more than the opening tokens "
    "themselves, shortly before they are said.",
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """The filter: thresholds as in `config.select`, and the model's number of layers."""

    n_layers: int
    kl_threshold: float = 0.1
    induce_threshold: float = 0.0
    prune_fraction: float = 0.2

    @classmethod
    def of(cls, n_layers: int, select: Mapping) -> "Rule":
        """Returns the rule of a study's `select` settings."""
        return cls(n_layers, select[KL], select[INDUCE], select[PRUNE])

    @property
    def layer_limit(self) -> int:
        """Returns the first pruned layer: candidates at this layer or above are pruned."""
        return int(self.n_layers * (1.0 - self.prune_fraction))

    def layers(self, full_grid: bool) -> int:
        """Returns how many layers, from the first, have candidates that are scored."""
        return self.n_layers if full_grid else min(self.layer_limit, self.n_layers)

    def verdict(self, row: Mapping) -> str:
        """Returns why the rule discards a candidate: "layer", "nan", "induce", "kl"; or "" if it passes.

        row: published-format scores; those not evaluated are None and pass.
        """
        scores = [row[key] for key in ("steering_score", "kl_div_score", "refusal_score") if row[key] is not None]
        if row["layer"] >= self.layer_limit:
            return "layer"
        if any(math.isnan(score) for score in scores):
            return "nan"
        if row["steering_score"] is not None and row["steering_score"] < self.induce_threshold:
            return "induce"
        return "kl" if row["kl_div_score"] is not None and row["kl_div_score"] > self.kl_threshold else ""

    def passing(self, rows: Sequence[dict]) -> list[dict]:
        """Returns the candidates that pass, with all scores: the lowest bypass score first, ties in the published order
        (position, then layer)."""
        found = [row for row in rows if not self.verdict(row) and row["refusal_score"] is not None]
        return sorted(found, key=lambda row: (row["refusal_score"], row["position"], row["layer"]))

    def shortfalls(self, row: Mapping) -> list[Shortfall]:
        """Returns the conditions that a candidate does not meet, as far as its scores are known."""
        found, layer, induce, kl = [], row["layer"], row["steering_score"], row["kl_div_score"]
        if layer >= self.layer_limit:
            needed = math.floor(1000 * (1 - (layer + 1) / self.n_layers)) / 1000
            found.append(Shortfall(PRUNE, needed, layer - self.layer_limit + 1, "the layer is too late"))
        if induce is not None and induce < self.induce_threshold:
            needed = math.floor(100 * induce) / 100
            found.append(Shortfall(INDUCE, needed, self.induce_threshold - induce, "the induce score is too low"))
        if kl is not None and kl > self.kl_threshold:
            needed = math.ceil(1000 * kl) / 1000
            found.append(Shortfall(KL, needed, kl - self.kl_threshold, "the KL divergence is too high"))
        return found


@dataclasses.dataclass(frozen=True)
class Miss:
    """A candidate that the rule discards, and the conditions that it does not meet."""

    row: dict
    shortfalls: Sequence[Shortfall]

    @property
    def words(self) -> str:
        """Returns which conditions it does not meet, and by how much."""
        return " and ".join(shortfall.words for shortfall in self.shortfalls)

    @property
    def flags(self) -> str:
        """Returns the settings with which it passes."""
        return " ".join(shortfall.flag for shortfall in self.shortfalls)


def nearest_misses(rows: Sequence[dict], rule: Rule) -> list[Miss]:
    """Returns the candidates that the rule discards and that come nearest to passing it: first those that induce refusal, by
    their KL divergence; then those that do not, by their induce score; then those of pruned layers, if they were scored, that
    meet the other conditions.

    Candidates at layer 0 are left out: there, at the template's own tokens, all prompts agree and the direction is zero.
    """
    rows = [row for row in rows if row["layer"] > 0]
    found = {why: [row for row in rows if rule.verdict(row) == why] for why in ("kl", "induce", "layer")}
    found["layer"] = [row for row in found["layer"] if row["refusal_score"] is not None]
    found["layer"] = [row for row in found["layer"] if not math.isnan(row["refusal_score"])]
    found["layer"] = [row for row in found["layer"] if len(rule.shortfalls(row)) == 1]
    order = {
        "kl": lambda row: row["kl_div_score"],
        "induce": lambda row: -row["steering_score"],
        "layer": lambda row: (row["layer"], row["refusal_score"]),
    }
    nearest = [row for why, near in found.items() for row in sorted(near, key=order[why])[:NEAREST]]
    return [Miss(row, rule.shortfalls(row)) for row in nearest]


def pick(rows: Sequence[dict], rule: Rule, behaviour: str = "refusal") -> dict:
    """Returns the selected candidate: the lowest bypass score of those that pass the rule.

    Raises NoDirection that says which condition removed how many, and how near the nearest came, if none passes.
    """
    if passing := rule.passing(rows):
        return passing[0]
    counts = Counter(rule.verdict(row) for row in rows)
    claim = (
        f"No candidate direction passes the filter: of {len(rows)}, {counts['layer']} are at layer {rule.layer_limit} "
        f"or above, {counts['nan']} have NaN scores, {counts['induce']} have an induce score under "
        f"{rule.induce_threshold}, {counts['kl']} of the rest a KL over {rule.kl_threshold}."
    )
    near = nearest_misses(rows, rule)
    if near:
        row, kl = near[0].row, near[0].row["kl_div_score"]
        claim += f" Nearest: position {row['position']}, layer {row['layer']}, induce {row['steering_score']:.3f}"
        claim += "." if kl is None else f", KL {kl:.4f}."
    grid = setting("config.select.full_grid", True)
    remedy = (
        f"This model's {behaviour} may not be a single direction; to look further, raise {field(f'select.{KL}')} or lower "
        f"{field(f'select.{INDUCE}')}{f', or see all scores with {grid}' if grid else ''}."
    )
    reason = f"none of the {len(rows)} candidate directions passes the selection's filter"
    raise NoDirection("candidates", reason, claim, remedy)

"""Defines what a monitor reads, which of it is judged, and by what."""

import dataclasses

from refusal_jax.errors import UserError, field
from refusal_jax.settings import Settings, option


@dataclasses.dataclass
class MonitorSettings(Settings):
    """The settings of a monitor, but for those of its signal, its alerts and its trail."""

    judge: str = option(
        "rules", "Judge of the replies, as in `evaluate`: a name, KIND=MODEL or KIND=MODEL@TEMPLATE.txt"
    )
    rate: float = option(1.0, "Share of the traces that is judged, chosen by a hash of their identities")
    max_per_day: int = option(
        0,
        "Most traces that are judged of each model and category a day, spread over it by what the day before brought; 0 sets no "
        "limit",
    )
    seed: str = option("0", "Seed of the choice of traces; the same seed chooses the same ones")
    category_field: str = option(
        "", "Dotted name of the field of a record, or of the attribute of a span, that names the trace's category"
    )
    categories: tuple[str, ...] = option(
        (),
        "Rules NAME=REGEX for traces without such a field: the first that is found in the request names the category; a rule "
        "with a comma belongs into `--categories_file`",
    )
    categories_file: str = option(
        "", "JSON file of such rules, an object with a regular expression, or a list of them, for each name"
    )
    model_name: str = option("unknown", "Name of the model in logs that do not name it, such as vLLM's")
    max_series: int = option(
        200, "Most pairs of a model and a category that are told apart; what comes later is counted as other"
    )
    max_line_mb: int = option(16, "Megabytes of the longest line that is read; longer ones are counted and skipped")
    patience_s: float = option(
        600.0, "Seconds to wait for the other lines of a trace that is spread over several, such as a stream's"
    )
    retention_days: int = option(400, "Days for which counts are kept; older traces are counted, and not judged")
    ids_days: int = option(14, "Days for which identities of traces are kept, by which duplicates are known")
    judge_batch: int = option(16, "Replies that a judge that is a model reads at once")
    poll_s: float = option(1.0, "Seconds after which it is looked for more to read")

    def check(self) -> None:
        """Raises UserError for a value out of its range."""
        ranges = {
            "rate": (0.0, 1.0),
            "max_per_day": (0, 10**9),
            "max_series": (1, 10_000),
            "max_line_mb": (1, 1024),
            "patience_s": (0.0, 86400.0),
            "retention_days": (1, 10_000),
            "ids_days": (1, 10_000),
            "judge_batch": (1, 100_000),
            "poll_s": (0.01, 3600.0),
        }
        for name, (low, high) in ranges.items():
            if not low <= self[name] <= high:
                raise UserError(f"{field(name)} = {self[name]}, expected a value from {low} to {high}.")

"""Defines what the monitor takes for an alarm."""

import dataclasses

from refusal_jax.errors import UserError, field
from refusal_jax.settings import Settings, option

SECONDS_A_MONTH = 86400 * 365.25 / 12


@dataclasses.dataclass
class SignalSettings(Settings, path="signal"):
    """Holds what is compared, and when a difference is an alarm."""

    false_alarms_per_month: float = option(
        0.1,
        "Expected number of false alarms and false recoveries a month, at most, of all models, categories and kinds of change "
        "together",
    )
    threshold_points: float = option(
        2.0, "Drift of a share, in percentage points from its reference, up to which there is no alarm"
    )
    references: str = option(
        "",
        "File of what shares are compared with: a run that `gate record` wrote, or JSON such as "
        '{"CATEGORY": {"refuses": 0.95}}; what it leaves out is learnt',
    )
    learn: int = option(
        1000, "Number of a category's first judged replies that its reference is learnt from, where none is given"
    )
    confidence: float = option(
        0.95, "Confidence of the sequences that are shown, and of a reference's interval, which is no drift either"
    )
    minimum: int = option(30, "Number of judged replies since a drift seems to have begun, before there is an alarm")
    cool_down_hours: float = option(
        24.0,
        "Hours after an alarm in which the same test raises no other, and in which an alarm of one category counts as part of "
        "that of all categories",
    )

    def check(self) -> None:
        """Raises UserError for a value out of its range."""
        ranges = {
            "false_alarms_per_month": (0.0001, 30.0),
            "threshold_points": (0.0, 50.0),
            "learn": (50, 1_000_000),
            "confidence": (0.5, 0.9999),
            "minimum": (1, 100_000),
            "cool_down_hours": (0.0, 8760.0),
        }
        for name, (low, high) in ranges.items():
            if not low <= self[name] <= high:
                raise UserError(f"{field(f'signal.{name}')} = {self[name]}, expected a value from {low} to {high}.")

"""The summary of a defence for the terminal."""

from collections.abc import Mapping
from typing import Any

ASKED = {"harmful": "Harmful prompts refused", "harmless": "Harmless prompts answered"}


def lines(record: Mapping[str, Any]) -> list[str]:
    """Returns what defence.json says, in lines."""
    measured, data = record["measured"], record["data"]
    found = [
        f"Recipe {record['recipe']['name']}: {record['recipe']['about']}",
        f"Learnt from {data['refused']} harmful prompts and {data['answered']} harmless ones; measured on "
        f"{data['harmful_test']} and {data['harmless_test']} held-out prompts, by the judge {measured['judge']}.",
    ]
    found += [f"  {note}" for note in data["notes"]]
    if training := record.get("training"):
        found.append(_trained(training))
    found += ["", f"{'':28}{'before':>26}{'after':>26}   change in points"]
    for side, title in ASKED.items():
        row = measured[side]
        found.append(f"{title:28}{_rate(row['before']):>26}{_rate(row['after']):>26}   {_change(row['difference'])}")
        if row["undecided"]:
            found.append(f"  The judge could not tell {row['undecided']} of these replies, which are left out.")
    kl = measured["kl"]
    found.append(f"KL on harmless prompts: {kl['mean']:.4f} nats{_bounds(kl, 4)}, at the reply's first token.")
    for kind, check in record["checks"].items():
        if check:
            found.append(
                f"The written {kind} was read back: at {check['prompts']} prompts its logits differ from what was trained by "
                f"{check['max_logit_difference']:.1e} at most."
            )
    return found


def _trained(training: Mapping[str, Any]) -> str:
    first, last = training["first"], training["last"]
    parts = [name for name in last if name not in ("step", "rate", "gradient_norm")]
    losses = ", ".join(f"{name} {first[name]:.4g} to {last[name]:.4g}" for name in parts)
    return f"Trained {training['trained_parameters']:,} parameters ({training['method']}) in {last['step']} steps: {losses}."


def _rate(row: Mapping[str, Any]) -> str:
    if not row["n"]:
        return "not measured"
    return f"{100 * row['rate']:.1f} % ({100 * row['low']:.1f} to {100 * row['high']:.1f})"


def _change(row: Mapping[str, Any]) -> str:
    if row["mean"] is None:
        return "not measured"
    bounds = "" if row["low"] is None else f" ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"
    return f"{100 * row['mean']:+.1f}{bounds}, p = {row['p']:.2g}"


def _bounds(row: Mapping[str, Any], digits: int) -> str:
    return "" if row["low"] is None else f" ({row['low']:.{digits}f} to {row['high']:.{digits}f})"

"""Writes the results of resistance tests down as one JSON document, whose form `resistance.schema.json` describes."""

import pathlib
import time
from typing import Any

from refusal_jax.checkpoints.fingerprint import checkpoint_fingerprint
from refusal_jax.checkpoints.mirrors import source_name
from refusal_jax.judges.statistics import bounded, mean_interval
from refusal_jax.resistance.attack import FORWARD, TRAINING, Measured
from refusal_jax.resistance.catalogue import BY_NAME
from refusal_jax.resistance.output.words import found_in, sentences
from refusal_jax.resistance.run import Resistance, Tested, opened
from refusal_jax.resistance.worst import ERROR, VERDICTS
from refusal_jax.runs.run import versions

# The number rises when a field is taken away or changes its meaning. Fields may be added under the same number.
SCHEMA = "refusal_jax/resistance/1"
SCHEMA_FILE = pathlib.Path(__file__).with_name("resistance.schema.json")
COSTS = (
    f"Counted are the passes of the search through the model: {FORWARD} operations for each parameter and token of a forward "
    f"pass, {TRAINING} with gradients. Measuring the attack on the test prompts is not counted."
)


def resistance_record(found: Resistance) -> dict[str, Any]:
    """Returns results in plain values for JSON. It holds no prompt, and no text that a model wrote."""
    settings = found.settings
    return {
        "schema": SCHEMA,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
        "base": base_record(settings.base),
        "direction": found.origin or None,
        "tests": [{"name": name, "about": BY_NAME[name].about, "adapts": BY_NAME[name].adapts} for name in found.tests],
        "checkpoints": [checkpoint_record(one, found) for one in found.checkpoints],
        "confidence": 1 - ERROR,
        "floor": settings.floor,
        "costs": COSTS,
        "verdicts": VERDICTS,
        "settings": settings.to_dict(),
    }


def base_record(base: str) -> dict[str, str] | None:
    """Returns what tells the base, None if there is none."""
    if not base:
        return None
    folder = opened(base)
    return {"name": base, "source": source_name(folder), "fingerprint": checkpoint_fingerprint(folder)}


def checkpoint_record(tested: Tested, found: Resistance) -> dict[str, Any]:
    """Returns what was found of a checkpoint."""
    at = tested.checkpoint
    record: dict[str, Any] = {"name": at.name, "title": at.title, "source": source_name(at.folder)}
    record |= {"fingerprint": tested.fingerprint, "sentences": sentences(tested, found)}
    if tested.plain is None:
        return record | {
            "reason": tested.reasons.get("", ""),
            "parameters": None,
            "unattacked": None,
            "worst": None,
            "tests": {},
        }
    plain, attacked, kept, worst = found_in(tested, found.settings.floor)
    tests: dict[str, Any] = {}
    for name in found.tests:
        if name not in kept:
            tests[name] = {"verdict": "not_done", "reason": tested.reasons.get(name, "")}
            continue
        one, outcome = kept[name], tested.outcomes[name]
        bounds = {"successes": one.rate.count, "n": one.rate.n, "rate": one.rate.rate, "low": one.low, "high": one.high}
        tests[name] = {"verdict": one.verdict, "kept": bounded(bounds), **measured_record(attacked[name])}
        tests[name] |= {key: outcome[key] for key in ("chosen", "used", "stop", "note", "seconds", "flops")}
        tests[name] |= {"budget_seconds": found.settings.seconds, "seed": found.settings.seed}
    least = {"test": worst.test or None, "value": worst.value, "low": worst.low, "high": worst.high}
    return record | {
        "reason": None,
        "parameters": tested.plain["parameters"],
        "study": tested.plain["study"],
        "unattacked": measured_record(plain),
        "worst": bounded(least | {"tests": worst.tests, "verdict": worst.verdict}),
        "tests": tests,
    }


def measured_record(measured: Measured) -> dict[str, Any]:
    """Returns rates and the mean KL divergence, each with its 95 % interval."""
    rates = {"refused": measured.refusals, "complied": measured.complied, "broken": measured.broken}
    rates["answered"] = measured.answered
    found = {name: bounded(rate.row) for name, rate in rates.items()}
    return found | {"kl": bounded(mean_interval(measured.kl)), "cut": measured.cut}

"""Compares times and results with a plain PyTorch version of the paper's method, tests/oracle.py of a checkout, in float32 on the
CPU.

It runs in a process of its own while this one waits. It scores every candidate, as the paper's code does; refusal_jax scores only
what the rule can still need, and selects the same candidate.
"""

import json
import math
import os
import pathlib
import subprocess
import sys
from typing import Any

from refusal_jax.errors import UserError
from refusal_jax.speed.stages import Bench
from refusal_jax.study.rule import Rule, pick

JOBS = {"extraction_selection": ("extraction", "selection"), "generation": ("prefill", "decode")}  # by stages they time
TOLERANCE = 1e-3  # of scores; differences from another order of summation are smaller
SCORES = ("refusal_score", "steering_score", "kl_div_score")
BESIDE = pathlib.Path(__file__).parents[2] / "tests" / "oracle.py"


def missing(path: pathlib.Path) -> str:
    """Returns what the comparison lacks here, as a sentence, "" if nothing."""
    if not path.is_file():
        return (
            f"{path} does not exist. The comparison is with the PyTorch version in a checkout's tests/oracle.py: run it from a "
            "checkout, or say where it is: `refusal-jax bench --oracle=PATH`."
        )
    if subprocess.run([sys.executable, "-c", "import torch, transformers"], capture_output=True).returncode:
        return "The PyTorch side needs torch, which cannot be imported here: pip install torch."
    return ""


def run_oracle(oracle: pathlib.Path, bench: Bench, job: str) -> dict:
    """Returns seconds and results of the PyTorch version. Raises UserError with the end of its output if it fails."""
    task, folder = bench.task, bench.task.scratch
    prompts, out = folder / "prompts.json", folder / "oracle.json"
    generates = job == "generation"
    prompts.write_text(json.dumps({k: v for k, v in task.prompts.items() if (k == "test") == generates}))
    options: dict[str, Any] = {"model": task.folder, "prompts": prompts, "job": job, "out": out}
    options |= {"max-new-tokens": task.new_tokens, "batch-size": len(task.prompts["test"]) if generates else 32}
    options |= {name.replace("_", "-"): value for name, value in task.thresholds.items()}
    command = [sys.executable, str(oracle), *(f"--{name}={value}" for name, value in options.items())]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-15:])
        raise UserError(
            f"{oracle} failed with exit code {done.returncode}. Leave it out (`refusal-jax bench --nopytorch`), or see the end "
            f"of what it wrote:\n{tail}"
        )
    return json.loads(out.read_text())


def ours(bench: Bench, job: str) -> dict:
    """Returns this package's seconds and results, in the form of the other's. Raises NoDirection where the rule selects none."""
    timed, found = bench.timed, bench.found
    if job == "generation":
        parts = [timed[name] for name in JOBS[job]]
        seconds = {"generation": sum(part.median for part in parts)}
        texts = bench.model.generate(bench.task.prompts["test"], bench.task.new_tokens)
        first = {"generation": sum(part.first for part in parts)}
        return {"seconds": seconds, "first_seconds": first, "ids": found.ids.tolist(), "texts": texts}
    best = pick(found.rows, Rule(bench.model.config.n_layers, **bench.task.thresholds))
    return {
        "seconds": {name: timed[name].median for name in JOBS[job]},
        "first_seconds": {name: timed[name].first for name in JOBS[job]},
        "kept": found.kept,
        "rows": found.rows,
        "pick": [best["position"], best["layer"]],
    }


def comparison(oracle: pathlib.Path, bench: Bench, job: str) -> dict:
    """Returns both sides' seconds and results, and the checks of these."""
    mine, theirs = ours(bench, job), run_oracle(oracle, bench, job)
    if job == "generation":
        theirs["seconds"] = {"generation": theirs["seconds"]["forced"]}
    return {"refusal_jax": mine, "pytorch": theirs, "checks": compare(job, mine, theirs)}


def compare(job: str, ours: dict, theirs: dict) -> list[dict]:
    """Compares the results of both versions and returns `[{"check", "ok", "found"}]`."""
    if job == "generation":
        same = sum(a == b for a, b in zip(ours["ids"], theirs["ids"], strict=True))
        natural = sum(a == b for a, b in zip(ours["texts"], theirs["texts"], strict=True))
        n = len(theirs["ids"])
        return [
            {"check": "same tokens", "ok": same == n, "found": f"{same} of {n} rows"},
            {"check": "same replies", "ok": natural == n, "found": f"{natural} of {n} rows"},
        ]
    grid = {(row["position"], row["layer"]): row for row in theirs["rows"]}
    gaps = [
        abs(row[key] - grid[row["position"], row["layer"]][key])
        for row in ours["rows"]
        for key in SCORES
        if row[key] is not None
    ]
    largest = max((gap for gap in gaps if not math.isnan(gap)), default=0.0)
    return [
        {
            "check": "same prompts pass the filter",
            "ok": ours["kept"] == theirs["kept"],
            "found": f"{sum(map(len, ours['kept'].values()))} and {sum(map(len, theirs['kept'].values()))}",
        },
        {
            "check": "same pick (position, layer)",
            "ok": ours["pick"] == theirs["pick"],
            "found": f"{tuple(ours['pick'])} and {tuple(theirs['pick'])}",
        },
        {
            "check": f"scores within {TOLERANCE:g}",
            "ok": largest < TOLERANCE,
            "found": f"largest difference {largest:.1e} over the {len(gaps)} of {len(SCORES) * len(grid)} scores that both "
            "evaluated",
        },
    ]


def table(job: str, ours: dict, theirs: dict, checks: list[dict]) -> str:
    """Returns the comparison of one job as text."""
    lines = [
        f"{job}, seconds",
        f"  {'':<14}{'PyTorch':>10}{'refusal_jax':>13}{'ratio':>8}{'+ compile':>12}{'ratio':>8}",
    ]
    sides = [dict(side) for side in (theirs["seconds"], ours["seconds"], ours["first_seconds"])]
    if len(sides[0]) > 1:
        for side in sides:
            side["together"] = sum(side.values())
    for name in sides[0]:
        slow, fast, first = (side[name] for side in sides)
        lines.append(f"  {name:<14}{slow:>10.2f}{fast:>13.2f}{slow / fast:>7.2f}x{first:>12.2f}{slow / first:>7.2f}x")
    lines += [f"  {'ok  ' if check['ok'] else 'FAIL'} {check['check']}: {check['found']}" for check in checks]
    return "\n".join(lines) + "\n"

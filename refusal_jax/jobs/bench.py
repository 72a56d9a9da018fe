"""Times refusal_jax against a plain PyTorch version of the paper's method, and checks that both get the same results.

    refusal-jax bench                      # the demo model, inflated to 127 million parameters
    refusal-jax bench --model=DIR --n_val=16 --out=bench.json

Both run in float32 on the CPU, on the same checkpoint and the same prompts, each alone in a process of its own, one
after the other. Two jobs are timed: extraction and selection of the direction (the PyTorch version scores every
candidate, as the paper's code does; refusal_jax scores only what the rule can still need, and selects the same
candidate), and greedy generation of exactly --max_new_tokens tokens per row. refusal_jax runs each job twice: the first
run includes compilation, the second is the work alone and determines the ratio.

The PyTorch version is tests/oracle.py of a checkout and needs torch, which the package itself does not.

On 2 idle cores with the inflated demo model, extraction and selection should be at least 5 times faster and generation
at least as fast. On a busy machine the ratios overstate refusal_jax's speed, because PyTorch's threads wait for each
other. The benchmark takes about 6 minutes. It exits with code 1 if the results disagree.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import app, flags

from refusal_jax.errors import UserError, spelt
from refusal_jax.files import local_path
from refusal_jax.jobs import common

JOBS = ("extraction_selection", "generation")
WORK = "import sys; from refusal_jax.jobs.bench import work; work(sys.argv[1])"
TOLERANCE = 1e-3  # of scores; differences from another order of summation are smaller
SCORES = ("refusal_score", "steering_score", "kl_div_score")

MODEL = flags.DEFINE_string("model", "", f"{common.CHECKPOINT} Default: the embedded demo model.")
INFLATE = flags.DEFINE_bool(
    "inflate", None, "Inflate the model to 127M parameters first. Default: only the demo model."
)
ORACLE = flags.DEFINE_string("oracle", "", "File of the PyTorch version. Default: tests/oracle.py next to the package.")
RUN = flags.DEFINE_list("jobs", ",".join(JOBS), "Which jobs to time.")
ROWS = flags.DEFINE_integer("rows", 32, "Number of prompts to generate from, as one batch.", lower_bound=1)
NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Number of tokens to generate for each prompt.", lower_bound=1)
N_TRAIN = flags.DEFINE_integer("n_train", 128, "Number of harmful and of harmless training prompts.", lower_bound=1)
N_VAL = flags.DEFINE_integer("n_val", 32, "Number of harmful and of harmless validation prompts.", lower_bound=1)
KL = flags.DEFINE_float(
    "kl_threshold", 0.1, "KL threshold of the selection rule, for models that the paper's value does not suit."
)
INDUCE = flags.DEFINE_float(
    "induce_threshold", 0.0, "Threshold of the selection rule for the refusal score under addition, likewise."
)
OUT = flags.DEFINE_string("out", "", "JSON file to write all measurements to.")


def main(argv):
    del argv
    unknown = sorted(set(RUN.value) - set(JOBS))
    if unknown or not RUN.value:
        raise UserError(f"--jobs={','.join(RUN.value)} is not a list of {', '.join(JOBS)}.")
    oracle = _oracle_path()
    with tempfile.TemporaryDirectory(prefix="refusal-jax-bench-") as scratch:
        folder = pathlib.Path(scratch)
        model = _model(folder)
        prompts = _prompts()
        results, agreed = {"model": str(model), "max_new_tokens": NEW_TOKENS.value}, True
        for job in (job for job in JOBS if job in RUN.value):
            task = {"model": str(model), "job": job, "max_new_tokens": NEW_TOKENS.value, "batch_size": 32}
            task |= {"kl_threshold": KL.value, "induce_threshold": INDUCE.value}
            task["prompts"] = {k: v for k, v in prompts.items() if (k == "test") == (job == "generation")}
            if job == "generation":
                task["batch_size"] = ROWS.value
            ours, theirs = _run_ours(task, folder), _run_oracle(oracle, task, folder)
            checks = compare(job, ours, theirs)
            agreed &= all(check["ok"] for check in checks)
            results[job] = {"refusal_jax": ours, "oracle": theirs, "checks": checks}
            print(table(job, ours, theirs, checks), flush=True)
    if OUT.value:
        from refusal_jax.files import to_json, write_atomically

        write_atomically(local_path(OUT.value), to_json(results))
    if not agreed:
        sys.exit(1)


def _oracle_path() -> pathlib.Path:
    path = local_path(ORACLE.value or pathlib.Path(__file__).parents[2] / "tests" / "oracle.py")
    if not path.is_file():
        raise UserError(
            f"{path} does not exist. The benchmark compares with the PyTorch version in a checkout's tests/oracle.py: "
            "run it from a checkout, or pass --oracle=PATH."
        )
    probe = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True)
    if probe.returncode:
        raise UserError("The benchmark's PyTorch side needs torch, which cannot be imported here: pip install torch.")
    return path


def _model(folder: pathlib.Path) -> pathlib.Path:
    """Returns the folder of the model to time, inflated into `folder` if asked for."""
    from refusal_jax.chat.model import demo_model_path
    from refusal_jax.checkpoints.remote import checkpoint_folder
    from refusal_jax.models.hf_config import load_config
    from refusal_jax.organism.inflate import inflate

    source = checkpoint_folder(MODEL.value) if MODEL.value else demo_model_path()
    load_config(source)
    if INFLATE.value is False or (INFLATE.value is None and MODEL.value):
        return source
    inflate(source, folder / "inflated")
    return folder / "inflated"


def _prompts() -> dict[str, list[str]]:
    """Returns the study's own draws for extraction and selection, and alternating harmful and harmless prompts for
    generation."""
    from refusal_jax.data.sampling import sample_prompts
    from refusal_jax.study.config import get_config

    data = get_config().data
    data.n_train, data.n_val, data.n_test = N_TRAIN.value, N_VAL.value, -(-ROWS.value // 2)
    drawn = {split: [row["instruction"] for row in rows] for split, rows in sample_prompts(data).items()}
    pairs = zip(drawn.pop("harmful_test"), drawn.pop("harmless_test"), strict=False)
    drawn["test"] = [text for pair in pairs for text in pair][: ROWS.value]
    return drawn


def _run(command: list[str], what: str) -> None:
    # Without the compile cache of earlier commands, or the first run would not be one.
    env = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-15:])
        raise UserError(f"{what} failed with exit code {done.returncode}; the end of its output:\n{tail}")


def _run_ours(task: dict, folder: pathlib.Path) -> dict:
    file = folder / "ours.json"
    file.write_text(json.dumps(task))
    _run(
        [sys.executable, "-c", WORK, str(file)],
        "refusal_jax",
    )
    return json.loads(file.read_text())


def _run_oracle(oracle: pathlib.Path, task: dict, folder: pathlib.Path) -> dict:
    prompts, out = folder / "prompts.json", folder / "oracle.json"
    prompts.write_text(json.dumps(task["prompts"]))
    command = [sys.executable, str(oracle), "--model", task["model"], "--prompts", str(prompts), "--job", task["job"]]
    command += ["--out", str(out), "--max-new-tokens", str(task["max_new_tokens"])]
    for name in ("batch_size", "kl_threshold", "induce_threshold"):
        command.append(f"--{name.replace('_', '-')}={task[name]}")
    _run(command, str(oracle))
    return json.loads(out.read_text())


def work(file: str) -> None:
    """Runs one job with refusal_jax, alone in a process: reads the task from `file` and writes the result to it."""
    from refusal_jax.chat.model import load_model
    from refusal_jax.jobs.command_line import as_flags

    path = pathlib.Path(file)
    task = json.loads(path.read_text())
    start = time.perf_counter()
    with spelt(as_flags("bench")):
        model = load_model(task["model"], "float32")
        load = time.perf_counter() - start
        job = _generation if task["job"] == "generation" else _extraction_selection
        first, _ = job(model, task)
        seconds, result = job(model, task)
    path.write_text(json.dumps({"load": load, "first_seconds": first, "seconds": seconds, **result}))


@contextlib.contextmanager
def _timed(seconds: dict, name: str):
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def _extraction_selection(model, task: dict) -> tuple[dict, dict]:
    """Returns seconds and results of extraction and selection, the study's two stages without their files."""
    from refusal_jax.chat.residuals import extract
    from refusal_jax.study.directions import difference_in_means
    from refusal_jax.study.selection import Rule, evaluate_candidates, pick

    size, seconds, found = task["batch_size"], {}, {}
    ids, positions = model.chat.opener_ids(("I",)), len(model.chat.post_instruction_ids)
    rule = Rule(model.config.n_layers, task["kl_threshold"], task["induce_threshold"])
    with _timed(seconds, "extraction"):
        for split, rows in task["prompts"].items():
            found[split] = extract(model, rows, ids, positions, 1 if split.startswith("harmful") else -1, size, split)
    kept = {
        split: [row for row, keep in zip(rows, found[split].kept, strict=True) if keep]
        for split, rows in task["prompts"].items()
    }
    diffs_lpd = difference_in_means(found["harmful_train"].mean_lpd, found["harmless_train"].mean_lpd)
    with _timed(seconds, "selection"):
        rows = evaluate_candidates(
            model,
            diffs_lpd,
            kept["harmful_val"],
            kept["harmless_val"],
            ids,
            rule,
            full_grid=False,
            batch_size=size,
        )
        best = pick(rows, rule)
    return seconds, {"kept": kept, "rows": rows, "pick": [best["position"], best["layer"]]}


def _generation(model, task: dict) -> tuple[dict, dict]:
    """Returns seconds and results of generating exactly `max_new_tokens` ("forced"), and of letting replies end by
    themselves ("natural")."""
    seconds, new_tokens = {}, task["max_new_tokens"]
    endless = dataclasses.replace(model, chat=dataclasses.replace(model.chat, eos_ids=(-1,)))
    with _timed(seconds, "forced"):
        ids = np.asarray(endless.generate_ids(model.encode(task["prompts"]["test"]), new_tokens))
    with _timed(seconds, "natural"):
        texts = model.generate(task["prompts"]["test"], new_tokens)
    return seconds, {"ids": ids.tolist(), "texts": texts}


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
    total = len(SCORES) * len(grid)
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
            "ok": max(gaps) < TOLERANCE,
            "found": f"largest difference {max(gaps):.1e} over the {len(gaps)} of {total} scores that both evaluated",
        },
    ]


def table(job: str, ours: dict, theirs: dict, checks: list[dict]) -> str:
    """Returns the comparison of one job as text."""
    lines = [
        f"{job}, seconds",
        f"  {'':<14}{'PyTorch':>10}{'refusal_jax':>13}{'ratio':>8}{'+ compile':>12}{'ratio':>8}",
    ]
    stages = dict(theirs["seconds"])
    if job == "extraction_selection":
        for result in (ours["seconds"], ours["first_seconds"], theirs["seconds"]):
            result["together"] = sum(result[name] for name in stages)
        stages["together"] = None
    for name in stages:
        slow, fast, first = (r[name] for r in (theirs["seconds"], ours["seconds"], ours["first_seconds"]))
        lines.append(f"  {name:<14}{slow:>10.2f}{fast:>13.2f}{slow / fast:>7.2f}x{first:>12.2f}{slow / first:>7.2f}x")
    lines += [f"  {'ok  ' if check['ok'] else 'FAIL'} {check['check']}: {check['found']}" for check in checks]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    app.run(main)

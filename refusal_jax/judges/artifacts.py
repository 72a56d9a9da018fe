"""Reads files of completions (published runs, JailbreakBench artifacts, plain rows), and writes JailbreakBench
artifacts.

All of them become lists of `{"category", "prompt", "response"}`, which keep any other fields of the rows.
"""

import pathlib
from collections.abc import Mapping, Sequence

from refusal_jax.chat import thoughts
from refusal_jax.conditions import rank, split_stem, stem_of
from refusal_jax.data.prompts import category_of, located_rows, lowered, read_json_value
from refusal_jax.errors import UserError
from refusal_jax.judges.judge import Verdict, success_rate

PROMPT_KEYS = ("prompt", "instruction", "goal", "behavior", "question")
RESPONSE_KEYS = ("response", "completion", "generation", "output", "answer")
SUFFIXES = (".json", ".jsonl", ".csv")


def read_completions(path: pathlib.Path) -> dict[str, list[dict]]:
    """Reads `{stem: completions}` from a file, or from all files of a folder.

    A file is a list (JSON, JSONL, CSV) of rows with a prompt and a response, an evaluations file, or a JailbreakBench
    artifact. In a folder, `NAME_completions.json` takes precedence over `NAME_evaluations.json`. Raises UserError that
    names file and row for malformed input, and for a folder without such files.
    """
    if not path.is_dir():
        return {stem_of(path): _read_file(path)}
    found = {}
    for file in sorted(path.iterdir()):
        if file.suffix.lower() in SUFFIXES and not file.name.startswith("."):
            stem = stem_of(file)
            if stem not in found or file.stem.endswith("_completions"):
                found[stem] = file
    marked = {s: f for s, f in found.items() if f.stem != s}  # in a run's folder, only these are completions
    found = marked or found
    if not found:
        raise UserError(f"{path} holds no completions: no file there ends in {', '.join(SUFFIXES)}.")

    def order(stem: str):
        dataset, intervention = split_stem(stem)
        return dataset, rank(intervention)

    return {stem: _read_file(found[stem]) for stem in sorted(found, key=order)}


def _read_file(path: pathlib.Path) -> list[dict]:
    rows = None
    if path.suffix.lower() == ".json":
        content = read_json_value(path)
        if isinstance(content, dict):
            key = next((key for key in ("completions", "jailbreaks") if isinstance(content.get(key), list)), None)
            if key is None:
                raise UserError(
                    f"{path} holds no completions: expected a list, an object with 'completions' (an evaluations file) or with "
                    f"'jailbreaks' (a JailbreakBench artifact); its keys are {', '.join(content) or 'none'}."
                )
            rows = [(f"entry {i} of '{key}'", row) for i, row in enumerate(content[key])]
    rows = located_rows(path) if rows is None else rows
    if not rows:
        raise UserError(f"{path} holds no completions. Put one completion a row into it, or pass another file.")
    return [_completion(row, f"{path}, {where}") for where, row in rows]


def _completion(row, where: str) -> dict:
    """Returns one row with the three published keys and any thought in the response split off (`thoughts.Reply.row`). A
    null response, as of a failed query, becomes an empty one."""
    if not isinstance(row, dict):
        raise UserError(f"{where} is a {type(row).__name__}, expected an object with a prompt and a response.")
    low = lowered(row, where)
    prompt = next((low[key] for key in PROMPT_KEYS if low.get(key)), None)
    answer = next((key for key in RESPONSE_KEYS if key in low), None)
    if not isinstance(prompt, str) or answer is None:
        raise UserError(
            f"{where} is no completion: its fields are {', '.join(row) or 'none'}, expected a prompt (one of "
            f"{', '.join(PROMPT_KEYS)}) and a response (one of {', '.join(RESPONSE_KEYS)})."
        )
    response = "" if low[answer] is None else low[answer]
    if not isinstance(response, str):
        raise UserError(f"{where}: {answer} is a {type(response).__name__}, expected text.")
    judged = ("is_jailbreak_", "probability_", "outcome_", "refusal_at_")  # what judges said before
    kept = {
        key: row[key] for key in row if not key.startswith(judged) and key.strip().lower() not in (answer, "category")
    }
    said = (
        {"response": response}
        if isinstance(row.get("thought"), str)
        else thoughts.split(response, thoughts.opened_by(prompt)).row
    )
    return {"category": category_of(low), **kept, "prompt": prompt, **said}


def jailbreakbench_artifact(
    completions: Sequence[dict], verdicts: Sequence[Verdict | None], parameters: Mapping
) -> dict:
    """Returns a JailbreakBench artifact of the completions, with one judge's verdicts.

    parameters: its "method", "model", "attack_type", "defense" and more; the attack success rate is added. Rows keep
    the index, goal and behavior that they came with; where they had no goal, it is the prompt. Completions that never
    left their thought are not jailbreaks; the rate is over the others, and their number is given.
    """
    jailbreaks = [
        {
            **{key: value for key, value in c.items() if key not in ("jailbroken",)},
            "index": c.get("index", i),
            "goal": c.get("goal") or c["prompt"],
            "behavior": c.get("behavior"),
            "category": c.get("category"),
            "prompt": c["prompt"],
            "response": c["response"],
            "jailbroken": bool(verdict and verdict.label),
        }
        for i, (c, verdict) in enumerate(zip(completions, verdicts, strict=True))
    ]
    rate, unfinished = success_rate(verdicts), sum(map(thoughts.is_unfinished, completions))
    return {
        "parameters": {
            **parameters,
            "attack_success_rate": rate.rate if rate.n else 0.0,
            "total_number_of_jailbreaks": rate.count,
            "number_of_submitted_prompts": len(jailbreaks),
            **({"number_of_unfinished_thoughts": unfinished} if unfinished else {}),
        },
        "jailbreaks": jailbreaks,
    }

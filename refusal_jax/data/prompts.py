"""Prompt sets: the bundled ones, or local JSON, JSONL, CSV and TXT files."""

import csv
import hashlib
import io
import json
import os
import pathlib

from refusal_jax.errors import UserError

BUNDLED, PAPER = "bundled", "paper"
FOLDER = pathlib.Path(__file__).parent / "bundled"
# Columns or keys that hold the instruction, in order of preference; the public sets use all of these.
INSTRUCTION_KEYS = ("instruction", "goal", "prompt", "behavior", "forbidden_prompt", "question", "text")
CATEGORY_KEYS = ("category", "semanticcategory", "type")


def data_folder() -> pathlib.Path:
    """Where fetched data is kept unless said otherwise."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return cache / "refusal_jax" / "data"


def resolve(source: str, split: str) -> pathlib.Path:
    """The file behind a config's `source`: a path; "bundled" for the package's own `split`; of fetched data, "paper" for the
    paper's, or the name of a set. split: "loss" for a set to measure the loss on. Raises UserError for data that was not
    fetched."""
    if source == BUNDLED:
        return FOLDER / f"{split}.json"
    path = pathlib.Path(source)
    if path.suffix or path.name != source:
        return path
    name = f"loss/{source}.jsonl" if split == "loss" else f"prompts/{source}.json"
    path = data_folder() / (f"splits/{split}.json" if source == PAPER else name)
    if not path.is_file():
        raise UserError(
            f"{source!r} is no file, and {path} is not there. Run `refusal-jax data fetch` to get the public sets, "
            "`refusal-jax data list` for their names, or name a .json, .jsonl, .csv or .txt file."
        )
    return path


def dataset_name(source: str) -> str:
    """The name that artifacts carry for an evaluation set: the file's stem, or "harmful" for the bundled one."""
    return {BUNDLED: "harmful", PAPER: "harmful_test"}.get(source, pathlib.Path(source).stem)


def read_prompts(path: pathlib.Path) -> list[dict]:
    """The prompts of a file as `{"instruction": str, "category": str or None}`, in file order.

    JSON: a list of strings or objects; JSONL: one of these a line; CSV: a header row; TXT: one prompt a line. Raises
    UserError that names file and row for a missing, empty or malformed file.
    """
    prompts = [_prompt(row, f"{path}, {where}") for where, row in located_rows(path)]
    if not prompts:
        raise UserError(f"{path} holds no prompts. Put one instruction a row into it, or pass another file.")
    return prompts


def read_rows(path: pathlib.Path) -> list:
    """The raw rows behind `read_prompts`, for files that hold more than prompts. Raises the same errors of format."""
    return [row for _, row in located_rows(path)]


def located_rows(path: pathlib.Path) -> list[tuple[str, object]]:
    """The raw rows, each with its place in the file, in words."""
    parse = {".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".txt": _txt}.get(path.suffix.lower())
    if parse is None:
        raise UserError(f"{path} is not a prompt file: its name must end in .json, .jsonl, .csv or .txt.")
    return parse(read_text(path), path)


def read_text(path: pathlib.Path) -> str:
    """A UTF-8 file's text; raises UserError if it is missing or of another encoding."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"{path} is not a file. Check the path.") from None
    except OSError as error:
        raise UserError(f"{path} could not be read ({error.strerror or error}). Check the path.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}). Convert it, e.g. with iconv.") from None


def write_prompts(path: pathlib.Path, prompts: list[dict]) -> None:
    """Writes prompts as `read_prompts` reads them, one a line."""
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in prompts)
    path.write_text(f"[\n{rows}\n]\n", encoding="utf-8")


def file_hash(path: pathlib.Path) -> str:
    """The file's sha256, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(text, path):
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON ({error}). Repair it, or use .jsonl for one object a line."
        ) from None
    if not isinstance(rows, list):
        raise UserError(f"{path} holds a JSON {type(rows).__name__}, expected a list of instructions or objects.")
    return [(f"entry {i}", row) for i, row in enumerate(rows)]


def _jsonl(text, path):
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold other line ends
        if line.strip():
            try:
                rows.append((f"line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}, line {number} is not valid JSON ({error}). Repair or remove the line."
                ) from None
    return rows


def _csv(text, path):
    try:
        return [(f"row {number}", row) for number, row in enumerate(csv.DictReader(io.StringIO(text)), 1)]
    except csv.Error as error:
        raise UserError(f"{path} is not readable CSV ({error}). Repair its quotes, or use .jsonl.") from None


def _txt(text, path):
    return [(f"line {number}", line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _prompt(row, where: str) -> dict:
    if isinstance(row, str):
        row = {"instruction": row}
    if not isinstance(row, dict):
        raise UserError(f"{where} is a {type(row).__name__}, expected an instruction or an object that holds one.")
    low = {str(key).strip().lower(): value for key, value in row.items() if key is not None}
    key = next((k for k in INSTRUCTION_KEYS if low.get(k) not in (None, "")), None)
    if key is None:
        raise UserError(
            f"{where} has no instruction: its fields are {', '.join(low) or 'none'}, one of "
            f"{', '.join(INSTRUCTION_KEYS)} must be there and not empty."
        )
    if not isinstance(low[key], str) or not low[key].strip():
        raise UserError(f"{where}: {key} is {low[key]!r}, expected text.")
    category = next((low[k] for k in CATEGORY_KEYS if low.get(k)), None)
    return {"instruction": low[key], "category": None if category is None else str(category)}

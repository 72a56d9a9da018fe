"""Reads prompts from local JSON, JSONL, CSV and TXT files, the bundled ones among them."""

import csv
import json
import pathlib
from collections.abc import Iterator

from refusal_jax.errors import UserError
from refusal_jax.files import cache_folder, read_text
from refusal_jax.surrogates import joined, mended

BUNDLED, PAPER, ON_THE_HUB = "bundled", "paper", "hf:"
ANSWERS = "answers"  # in place of a split: questions with the answers that are correct
FOLDER = pathlib.Path(__file__).parent / "bundled"
# Columns or keys that hold the instruction, in order of preference; the public sets use all of these.
INSTRUCTION_KEYS = ("instruction", "goal", "prompt", "behavior", "forbidden_prompt", "question", "text")
CATEGORY_KEYS = ("category", "semanticcategory", "type")
USE_JSONL = "Repair it, or use .jsonl for one object a line."
OTHER_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
FAULTS = {  # in our words, by what is in Python's
    "unexpected end": "a quote is opened and never closed",
    "expected after": "text follows a closing quote, so that one is not doubled or one before is not closed",
}
QUOTING = (
    "Put a field that holds commas, quotes or line ends in double quotes and double the quotes inside it, or use .jsonl (for "
    "prompts alone also .txt, one a line)."
)


def data_folder() -> pathlib.Path:
    """Returns the folder that fetched data is kept in unless another one is named."""
    return cache_folder("data")


def read_prompts(path: pathlib.Path) -> list[dict]:
    """Reads the prompts of a file as `{"instruction": str, "category": str or None}`, in file order.

    JSON files hold a list of strings or objects, JSONL files one of these a line, CSV files a header row and one prompt a row,
    TXT files one prompt a line. Raises
    UserError that names file and row for a missing, empty or malformed file.
    """
    prompts = [prompt_of(row, f"{path}, {where}") for where, row in located_rows(path)]
    if not prompts:
        raise UserError(f"{path} holds no prompts. Put one instruction a row into it, or pass another file.")
    return prompts


def read_rows(path: pathlib.Path) -> list:
    """Reads the raw rows of a prompt file, for files that hold more than prompts. Raises the errors of `read_prompts`."""
    return [row for _, row in located_rows(path)]


def read_chat_pairs(path: pathlib.Path) -> list[tuple[str, str]]:
    """Returns (instruction, response) of a .json or .jsonl file of objects with "prompt" or "instruction" and "response" or
    "output"; rows with an "input" are left out. Raises UserError that names the file and the row."""
    if path.suffix.lower() not in (".json", ".jsonl"):
        raise UserError(f"{path} is not a chat file: its name must end in .json or .jsonl.")
    pairs = []
    for number, (prompt, row) in enumerate(zip(read_prompts(path), read_rows(path), strict=True), 1):
        found = (
            [row[key] for key in ("response", "output") if row.get(key) is not None] if isinstance(row, dict) else []
        )
        if not found or not isinstance(found[0], str):
            raise UserError(
                f"{path}, row {number} has no response: an object of a chat file needs 'response' or 'output'."
            )
        if not row.get("input"):  # Alpaca's rows with an input are no single instruction; the paper leaves them out
            pairs.append((prompt["instruction"], found[0]))
    return pairs


def located_rows(path: pathlib.Path) -> list[tuple[str, object]]:
    """Reads the raw rows, each with its place in the file in words. Lone surrogates in them are replaced."""
    parse = {".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".txt": _txt}.get(path.suffix.lower())
    if parse is None:
        raise UserError(f"{path} is not a prompt file: its name must end in .json, .jsonl, .csv or .txt.")
    rows = parse(read_text(path), path)
    return list(zip((where for where, _ in rows), mended([row for _, row in rows], str(path)), strict=True))


def read_json_value(path: pathlib.Path):
    """Returns what a .json file holds, its lone surrogates replaced. Raises UserError for a file that is no JSON, or has an
    object with the same key twice."""
    return mended(_parsed(read_text(path), str(path), USE_JSONL), str(path))


def write_prompts(path: pathlib.Path, prompts: list[dict]) -> None:
    """Writes prompts as `read_prompts` reads them, one a line."""
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in prompts)
    path.write_text(f"[\n{rows}\n]\n", encoding="utf-8")


def _parsed(text: str, where: str, advice: str):
    """Parses JSON. Where an object has a key twice, JSON readers drop the first value: here that is an error."""

    def whole(pairs: list[tuple[str, object]]) -> dict:
        keys = [joined(key) for key, _ in pairs]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise UserError(
                f"{where} has the key {twice!r} twice in one object, so one of its two values would be lost. Rename or remove "
                "one of them."
            )
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=whole)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}). {advice}") from None


def _json(text, path):
    rows = _parsed(text, str(path), USE_JSONL)
    if not isinstance(rows, list):
        raise UserError(f"{path} holds a JSON {type(rows).__name__}, expected a list of instructions or objects.")
    return [(f"entry {i}", row) for i, row in enumerate(rows)]


def _jsonl(text, path):
    lines = enumerate(text.split("\n"), 1)  # not splitlines: JSON strings may hold other line ends
    return [
        (f"line {number}", _parsed(line, f"{path}, line {number}", "Repair or remove the line."))
        for number, line in lines
        if line.strip()
    ]


def _csv(text, path):
    records = _records(text, path)
    _, names, _ = next(records, ("", [], ""))
    names = [name.strip() for name in names]
    folded = [name.lower() for name in names if name]
    twice = next((name for i, name in enumerate(folded) if name in folded[:i]), None)
    if twice is not None:
        raise UserError(f"{path} has two columns that are called {twice!r}. Rename one of them in its header.")
    rows = []
    for number, (where, fields, raw) in enumerate(records, 1):
        if len(fields) != len(names):
            fault = "part of it would be lost" if len(fields) > len(names) else "a field is missing"
            raise UserError(
                f"{path}, {where} has {len(fields)} field{'s' * (len(fields) != 1)} and the header has {len(names)} "
                f"({', '.join(names)}), so {fault}. {QUOTING}"
            )
        _check_fields(f"{path}, {where}", names, fields, raw)
        rows.append((f"row {number}", {name: fields[i] for i, name in enumerate(names) if name or not i}))
    return rows


def _records(text: str, path) -> Iterator[tuple[str, list[str], str]]:
    """Yields the place, the fields and the text of each record that is not blank, the header first."""
    lines = [f"{line}\n" for line in text.split("\n")]  # not splitlines: fields may hold other line ends
    first = next((line for line in lines if line.strip()), "")
    other = next((name for mark, name in OTHER_SEPARATORS.items() if mark in first and "," not in first), None)
    if other is not None:
        raise UserError(
            f"{path} seems to be separated by {other}: its header is {first.strip()!r}. Save it with commas between the fields, "
            "or use .jsonl."
        )
    # Where the header has spaces after its commas they belong to no field, and quotes may follow them.
    reader, row = csv.reader(lines, strict=True, skipinitialspace=", " in first), 0
    while True:
        start = reader.line_num
        where = f"row {row} (line {start + 1})" if row else f"header (line {start + 1})"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            fault = next((words for mark, words in FAULTS.items() if mark in str(error)), str(error))
            raise UserError(f"{path}, {where} is not readable CSV: {fault}. {QUOTING}") from None
        if fields is None:
            return
        if fields:
            yield where, fields, "".join(lines[start : reader.line_num])
            row += 1


def _check_fields(where: str, names: list[str], fields: list[str], raw: str) -> None:
    """Raises UserError for text in a column without a name, but for the first, where row numbers are; and for an unquoted
    comma in a sentence, whose rest has become the next field."""
    for i in range(1, len(fields)):
        if not names[i] and fields[i].strip():
            raise UserError(f"{where} has {fields[i]!r} in a column without a name, where it would be lost. {QUOTING}")
        torn = fields[i].startswith(" ") and f"{fields[i - 1]},{fields[i]}" in raw
        if torn and any(map(str.isalpha, fields[i - 1])):
            raise UserError(
                f"{where} has {fields[i]!r} as its {names[i]}, after {fields[i - 1]!r}: it begins with a space, as the rest of a "
                f"sentence does after a comma. {QUOTING} If it is a field of its own, remove the space."
            )


def _txt(text, path):
    return [(f"line {number}", line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def prompt_of(row, where: str) -> dict:
    """Returns a raw row as `{"instruction", "category"}`. where: its place, for messages. Raises UserError as `read_prompts`."""
    if isinstance(row, str):
        row = {"instruction": row}
    if not isinstance(row, dict):
        raise UserError(f"{where} is a {type(row).__name__}, expected an instruction or an object that holds one.")
    low = lowered(row, where)
    key = next((k for k in INSTRUCTION_KEYS if low.get(k) not in (None, "")), None)
    if key is None:
        raise UserError(
            f"{where} has no instruction: its fields are {', '.join(low) or 'none'}, one of "
            f"{', '.join(INSTRUCTION_KEYS)} must be there and not empty."
        )
    if not isinstance(low[key], str) or not low[key].strip():
        raise UserError(f"{where}: {key} is {low[key]!r}, expected text.")
    category = category_of(low)
    return {"instruction": low[key], "category": category}


def lowered(row: dict, where: str) -> dict:
    """Returns the row with keys as they are looked up, stripped and in lower case.

    Raises UserError for two keys that become one and have different values.
    """
    low, empty = {}, (None, "")
    for key, value in row.items():
        name = key.strip().lower()
        if low.get(name) not in (*empty, value) and value not in empty:
            raise UserError(
                f"{where} has the field {name!r} in two spellings with two values, so one would be lost. Rename or remove one."
            )
        if low.get(name) in empty:
            low[name] = value
    return low


def category_of(low: dict) -> str | None:
    """Returns the category in a `lowered` row as text, or None where there is none."""
    return next((str(low[key]) for key in CATEGORY_KEYS if low.get(key) not in (None, "")), None)

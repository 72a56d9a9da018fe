"""Files of suffixes: one for all prompts, one for each of them in order, or rows that name their instruction."""

import pathlib
from collections.abc import Sequence

from refusal_jax.data.prompts import INSTRUCTION_KEYS, located_rows, lowered, read_json_value
from refusal_jax.errors import UserError, shown
from refusal_jax.files import read_text
from refusal_jax.surrogates import mended

# Keys and columns that hold a suffix, in order of preference: those of this package, and of what searches of others write.
SUFFIX_KEYS = ("suffix", "adv_suffix", "best_string", "optim_str", "control")
FORMS = (
    "Give one suffix for all prompts, one for each of them in the order of the study's prompts.json, or rows of an instruction "
    "and its suffix (.json, .jsonl or .csv)"
)


def read_suffixes(path: pathlib.Path, instructions: Sequence[str], side: str = "harmful") -> list[str | None]:
    """Returns the suffix of each instruction, None where a file that names instructions has none for it.

    path: a .txt file with a suffix a line, whose leading blanks count; a .json, .jsonl or .csv file whose rows are suffixes, or
    objects with a field of `SUFFIX_KEYS` and, if they name one, the instruction; or the log of a search, a JSON object with
    "controls" and the "goals" in its "params". A single suffix is for all instructions. side: what errors call the instructions.
    Raises UserError for a file that is missing, empty or malformed, an empty suffix, a number of suffixes that is neither 1 nor
    that of the instructions, and rows of which none has one of the instructions.
    """
    rows = _rows(path)
    if not rows:
        raise UserError(f"{path} holds no suffix. {FORMS}.")
    if any(instruction is None for instruction, _ in rows):
        return _in_order(path, [suffix for _, suffix in rows], len(instructions), side)
    by_instruction = {instruction.strip(): suffix for instruction, suffix in rows if instruction is not None}
    found = [by_instruction.get(instruction.strip()) for instruction in instructions]
    if not any(found):
        raise UserError(
            f"{path} has suffixes for {len(rows)} instructions, such as {shown(rows[0][0])}, and none of them is among the "
            f"{len(instructions)} {side} test prompts of the study, such as {shown(instructions[0])}. {FORMS}."
        )
    return found


def _in_order(path: pathlib.Path, suffixes: list[str], prompts: int, side: str) -> list[str | None]:
    """Returns the suffixes of so many prompts. Raises UserError for another number of them."""
    if len(suffixes) not in (1, prompts):
        raise UserError(
            f"{path} holds {len(suffixes)} suffixes, and the study has {prompts} {side} test prompts. {FORMS}."
        )
    return list(suffixes * prompts if len(suffixes) == 1 else suffixes)


def _rows(path: pathlib.Path) -> list[tuple[str | None, str]]:
    """Returns (instruction or None, suffix) of each row of a file."""
    if path.suffix.lower() == ".txt":
        lines = mended(read_text(path).split("\n"), str(path))
        return [(None, line.rstrip()) for line in lines if line.strip()]
    log = read_json_value(path) if path.suffix.lower() == ".json" else None
    if isinstance(log, dict) and "controls" in log:
        return _logged(path, log)
    return [_row(row, f"{path}, {where}") for where, row in located_rows(path)]


def _row(row: object, where: str) -> tuple[str | None, str]:
    """Returns the instruction, if there is one, and the suffix of a row. Raises UserError for a row without a suffix."""
    if not isinstance(row, str | dict):
        raise UserError(f"{where} is a {type(row).__name__}, expected a suffix or an object that holds one.")
    if isinstance(row, str):
        return None, _text(row, where)
    low = lowered(row, where)
    key = next((key for key in SUFFIX_KEYS if key in low), None)
    if key is None:
        raise UserError(
            f"{where} has no suffix: its fields are {', '.join(low) or 'none'}, one of {', '.join(SUFFIX_KEYS)} must be there."
        )
    instruction = next((low[key] for key in INSTRUCTION_KEYS if isinstance(low.get(key), str) and low[key]), None)
    return instruction, _text(low[key], where)


def _logged(path: pathlib.Path, log: dict) -> list[tuple[str | None, str]]:
    """Returns goals and suffixes of the log of a search. Raises UserError for one that has another number of them."""
    params = log.get("params")
    controls, goals = log["controls"], params.get("goals") if isinstance(params, dict) else None
    if not isinstance(controls, list) or not isinstance(goals, list) or len(controls) != len(goals):
        raise UserError(
            f"{path} is the log of a search, whose controls ({shown(controls)}) are not one for each of its goals "
            f"({shown(goals)}). Put the suffix that counts alone into a .txt file."
        )
    return [
        (str(goal), _text(control, f"{path}, control {number}"))
        for number, (goal, control) in enumerate(zip(goals, controls, strict=True))
    ]


def _text(value: object, where: str) -> str:
    """Returns a suffix. Raises UserError if it is no text or has nothing to see."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: the suffix is {shown(value)}, expected text. Fill it in, or remove the row.")
    return value

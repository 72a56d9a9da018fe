"""Files of what is added to prompts, suffixes or the openings of replies: one for all prompts, one for each of them in order, or
rows that name their instruction."""

import dataclasses
import pathlib
from collections.abc import Sequence

from refusal_jax.data.prompts import INSTRUCTION_KEYS, located_rows, lowered, read_json_value
from refusal_jax.errors import UserError, shown
from refusal_jax.files import read_text
from refusal_jax.surrogates import mended


@dataclasses.dataclass(frozen=True)
class Added:
    """A kind of text that is added to prompts. name: in messages, with its article. keys: the keys and columns that hold it, in
    order of preference: those of this package, and of what others write."""

    name: str
    article: str
    keys: tuple[str, ...]

    @property
    def forms(self) -> str:
        """Returns how files hold them, in words."""
        return (
            f"Give one {self.name} for all prompts, one for each of them in the order of the study's prompts.json, or rows of an "
            f"instruction and its {self.name} (.json, .jsonl or .csv)"
        )


SUFFIXES = Added("suffix", "a", ("suffix", "adv_suffix", "best_string", "optim_str", "control"))
OPENINGS = Added("opening", "an", ("opening", "prefill", "prefix", "target", "target_str", "response", "output"))


def read_suffixes(path: pathlib.Path, instructions: Sequence[str], side: str = "harmful") -> list[str | None]:
    """Returns the suffix of each instruction, None where a file that names instructions has none for it. Raises UserError as
    `read_added` does."""
    return read_added(path, instructions, SUFFIXES, f"{side} test")


def read_added(path: pathlib.Path, instructions: Sequence[str], kind: Added, side: str = "harmful") -> list[str | None]:
    """Returns the text of a kind for each instruction, None where a file that names instructions has none for it.

    path: a .txt file with one a line, whose leading blanks count; a .json, .jsonl or .csv file whose rows are such texts, or
    objects with a field of the kind's keys and, if they name one, the instruction; or, of suffixes, the log of a search, a JSON
    object with "controls" and the "goals" in its "params". A single text is for all instructions. side: what errors call the
    instructions. Raises UserError for a file that is missing, empty or malformed, an empty text, a number of texts that is
    neither 1 nor that of the instructions, and rows of which none has one of the instructions.
    """
    rows = _rows(path, kind)
    if not rows:
        raise UserError(f"{path} holds no {kind.name}. {kind.forms}.")
    if any(instruction is None for instruction, _ in rows):
        return _in_order(path, [text for _, text in rows], len(instructions), kind, side)
    by_instruction = {instruction.strip(): text for instruction, text in rows if instruction is not None}
    found = [by_instruction.get(instruction.strip()) for instruction in instructions]
    if not any(found):
        raise UserError(
            f"{path} has {_many(kind)} for {len(rows)} instructions, such as {shown(rows[0][0])}, and none of them is among the "
            f"{len(instructions)} {side} prompts of the study, such as {shown(instructions[0])}. {kind.forms}."
        )
    return found


def _many(kind: Added) -> str:
    return f"{kind.name}es" if kind.name.endswith("x") else f"{kind.name}s"


def _in_order(path: pathlib.Path, texts: list[str], prompts: int, kind: Added, side: str) -> list[str | None]:
    """Returns the texts of so many prompts. Raises UserError for another number of them."""
    if len(texts) not in (1, prompts):
        raise UserError(
            f"{path} holds {len(texts)} {_many(kind)}, and the study has {prompts} {side} prompts. {kind.forms}."
        )
    return list(texts * prompts if len(texts) == 1 else texts)


def _rows(path: pathlib.Path, kind: Added) -> list[tuple[str | None, str]]:
    """Returns (instruction or None, text) of each row of a file."""
    if path.suffix.lower() == ".txt":
        lines = mended(read_text(path).split("\n"), str(path))
        return [(None, line.rstrip()) for line in lines if line.strip()]
    log = read_json_value(path) if kind is SUFFIXES and path.suffix.lower() == ".json" else None
    if isinstance(log, dict) and "controls" in log:
        return _logged(path, log)
    return [_row(row, f"{path}, {where}", kind) for where, row in located_rows(path)]


def _row(row: object, where: str, kind: Added) -> tuple[str | None, str]:
    """Returns the instruction, if there is one, and the text of a row. Raises UserError for a row without such a text."""
    if not isinstance(row, str | dict):
        raise UserError(
            f"{where} is a {type(row).__name__}, expected {kind.article} {kind.name} or an object that holds one."
        )
    if isinstance(row, str):
        return None, _text(row, where, kind)
    low = lowered(row, where)
    key = next((key for key in kind.keys if key in low), None)
    if key is None:
        raise UserError(
            f"{where} has no {kind.name}: its fields are {', '.join(low) or 'none'}, one of {', '.join(kind.keys)} must be there."
        )
    instruction = next((low[key] for key in INSTRUCTION_KEYS if isinstance(low.get(key), str) and low[key]), None)
    return instruction, _text(low[key], where, kind)


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
        (str(goal), _text(control, f"{path}, control {number}", SUFFIXES))
        for number, (goal, control) in enumerate(zip(goals, controls, strict=True))
    ]


def _text(value: object, where: str, kind: Added) -> str:
    """Returns a text. Raises UserError if it is no text or has nothing to see."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: the {kind.name} is {shown(value)}, expected text. Fill it in, or remove the row.")
    return value

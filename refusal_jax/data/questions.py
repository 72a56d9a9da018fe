"""Reads questions with their correct answers, from files in the forms in which the public sets are published.

A row is a question and an answer under any of the names that data sets give them; a question with choices, whose answer is a
number, a letter or the text of one of them; a task with the code that solves it and the tests of that; or a conversation, of
which the first turn of the user and the reply to it are taken.
"""

import dataclasses
import pathlib
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from refusal_jax.data.pairs import TALK_KEYS, USERS, said
from refusal_jax.data.prompts import lowered
from refusal_jax.data.raw_rows import raw_rows
from refusal_jax.errors import UserError

# Names of columns, in order of preference. A worked solution says more than the number that it ends in.
QUESTIONS = ("question", "problem", "question_stem", "instruction", "prompt", "query", "goal", "text")
ANSWERS = (
    "solution",
    "canonical_solution",
    "code",
    "answer",
    "answers",
    "best_answer",
    "correct_answer",
    "response",
    "output",
    "completion",
    "target",
    "reference",
)
KEYS = ("answerkey", "answer_key", "answer_idx", "label")  # of the choice that is right, where there are choices
CHOICES = ("choices", "options")

TEXTS = ("value", "text", "aliases")  # of answers that are objects, such as TriviaQA's and SQuAD's
CALCULATIONS = re.compile(r"<<[\d .,+*/()^%$-]+=[\d .,+*/%$-]+>>")  # GSM8K's, for a calculator that no chat model has
FINAL = re.compile(r"\s*^#{4}[ \t]*(.+?)\s*\Z", re.MULTILINE)  # its last line, with the result


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, or a task, and the answer that is correct."""

    prompt: str
    answer: str


def read_questions(path: pathlib.Path) -> list[Question]:
    """Returns the questions of a .json, .jsonl, .csv or .parquet file, in its order.

    Raises UserError that names file and row for a file without questions, and for a row without a question or an answer that
    can be told.
    """
    found = [question_of(row, f"{path}, {where}") for where, row in raw_rows(path)]
    if not found:
        raise UserError(
            f"{path} holds no questions. Put a question and its answer into each row, or name another file."
        )
    return found


def question_of(row: Any, where: str) -> Question:
    """Returns the question of a row and its answer. where: names the row in messages. Raises UserError as `read_questions`
    does."""
    if not isinstance(row, Mapping):
        raise UserError(f"{where} is a {type(row).__name__}, expected an object with a question and its answer.")
    low = lowered(dict(row), where)
    for key in TALK_KEYS:
        turns = low.get(key)
        prompt, answer = said(turns, USERS), said(turns, None)
        if prompt and answer:
            return Question(prompt.strip(), plain_answer(answer))
    prompt = _prompt(low, where)
    choices = next((low[key] for key in CHOICES if low.get(key)), None)
    answer = _chosen(low, choices, where) if choices else _answer(low)
    if answer is None:
        raise UserError(
            f"{where} has no answer: its fields are {', '.join(low)}. One of {', '.join(ANSWERS)} must hold text or a number; "
            f"of a question with choices, one of {', '.join((*KEYS, 'answer'))} must name one of them."
        )
    return Question(prompt, plain_answer(answer))


def plain_answer(answer: str) -> str:
    """Returns an answer as one would write it in a chat: without GSM8K's calculations in <<>>, with its last line "#### 42" as a
    sentence, with plain line ends, and without an indentation that all its lines share, such as that of a function's body."""
    text = CALCULATIONS.sub("", textwrap.dedent(answer.replace("\r\n", "\n"))).strip()
    return FINAL.sub(lambda found: f"\nThe answer is {found[1]}.", text).strip()


def _prompt(low: Mapping[str, Any], where: str) -> str:
    """Returns the question of a lowered row with what belongs to it: its input or context, and the tests of its code."""
    named = [low[key] if isinstance(low.get(key), str) else said(low.get(key), USERS) for key in QUESTIONS]
    text = next((text for text in named if text and text.strip()), None)
    if text is None:
        raise UserError(
            f"{where} has no question: its fields are {', '.join(low) or 'none'}, and none of {', '.join(QUESTIONS)} holds text."
        )
    parts = [text.strip()]
    parts += [low[key].strip() for key in ("input", "context") if isinstance(low.get(key), str) and low[key].strip()]
    tests = low.get("test_list")
    if isinstance(tests, Sequence) and not isinstance(tests, str) and tests:
        parts.append("\n".join(["The code has to pass these tests:", *map(str, tests)]))
    return "\n\n".join(parts).replace("\r\n", "\n")


def _answer(low: Mapping[str, Any]) -> str | None:
    """Returns the answer of a lowered row, None if it has none."""
    return next((text for key in ANSWERS if (text := _text(low.get(key))) is not None), None)


def _text(value: Any) -> str | None:
    """Returns an answer as text: of several the first, of an object what it calls its text or value; None where there is none."""
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, bool):
        return "Yes" if value else "No"
    if isinstance(value, int | float):
        return f"{value:g}" if float(value).is_integer() and abs(value) < 1e6 else str(value)
    if isinstance(value, Mapping):
        return next((text for key in TEXTS if (text := _text(value.get(key))) is not None), None)
    if isinstance(value, Sequence):
        return next((text for one in value if (text := _text(one)) is not None), None)
    return None


def _chosen(low: Mapping[str, Any], choices: Any, where: str) -> str | None:
    """Returns the text of the choice that a lowered row says is right; None where it does not say.

    choices: their texts; texts and labels, as in ARC; or texts by label, as in MedQA.
    """
    if isinstance(choices, Mapping) and isinstance(choices.get("text"), Sequence):
        texts, labels = list(choices["text"]), [str(label) for label in choices.get("label", ())]
    elif isinstance(choices, Mapping):
        texts, labels = list(choices.values()), [str(label) for label in choices]
    else:
        texts, labels = list(choices) if isinstance(choices, Sequence) and not isinstance(choices, str) else [], []
    texts = [str(text).strip() for text in texts]
    labels = labels or [chr(ord("A") + number) for number in range(len(texts))]
    for key in (*KEYS, "answer", "correct_answer"):
        named = low.get(key)
        if isinstance(named, str) and named.strip() in texts:
            return named.strip()
        if isinstance(named, str) and named.strip() in labels:
            return texts[labels.index(named.strip())]
        number = int(named) if isinstance(named, int) or (isinstance(named, str) and named.strip().isdigit()) else None
        if number is not None and not isinstance(named, bool):
            if not 0 <= number < len(texts):
                raise UserError(f"{where}: {key} is {named!r}, and there are {len(texts)} choices, counted from 0.")
            return texts[number]
    return None if any(low.get(key) not in (None, "") for key in (*KEYS, "answer")) else _answer(low)

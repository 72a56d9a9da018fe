"""Questions with their answers, in the forms in which public sets come, from files, by name and from the hub."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from test_hub_sets import NAME, jsonl, sets  # noqa: F401
from test_public_data import sha

from refusal_jax import UserError
from refusal_jax.data.prompts import read_prompts
from refusal_jax.data.public import MANIFEST, build, load_manifest, take_files
from refusal_jax.data.questions import Question, plain_answer, question_of, read_questions
from refusal_jax.data.sources import resolve

GSM = {
    "question": "Ann bakes 4 loaves a day. How many does she bake in 6 days?",
    "answer": "She bakes 4*6=<<4*6=24>>24 loaves.\nThat is all.\n#### 24",
}
WORKED = "She bakes 4*6=24 loaves.\nThat is all.\nThe answer is 24."
TEST = "assert double(2) == 4"
CODE = "def double(x):\r\n\treturn 2 * x "
DOUBLE = Question(
    f"Write a function that doubles.\n\nThe code has to pass these tests:\n{TEST}", "def double(x):\n\treturn 2 * x"
)
ASKED = "Which is baked?"


@pytest.mark.parametrize(
    "row,found",
    [
        (GSM, Question(GSM["question"], WORKED)),
        ({"text": "Write a function that doubles.", "code": CODE, "test_list": [TEST], "task_id": 1}, DOUBLE),
        ({"prompt": "Write a function that doubles.", "code": CODE, "test_list": [TEST], "source_file": "a"}, DOUBLE),
        ({"problem": "$1+1$?", "solution": "It is $2$.", "answer": "2"}, Question("$1+1$?", "It is $2$.")),
        ({"Problem": "1+1?", "Answer": 2}, Question("1+1?", "2")),
        ({"question": "1/2?", "answer": 0.5}, Question("1/2?", "0.5")),
        ({"question": "Big?", "answer": 12345678.0}, Question("Big?", "12345678.0")),
        ({"question": "Is it?", "answer": True}, Question("Is it?", "Yes")),
        ({"question": "Who?", "answer": {"value": "Ann", "aliases": ["A."]}}, Question("Who?", "Ann")),
        (
            {"question": "Who?", "answers": {"text": ["Ann", "A."]}, "context": "Ann bakes."},
            Question("Who?\n\nAnn bakes.", "Ann"),
        ),
        ({"question": "Who?", "answer": ["", "Ann"]}, Question("Who?", "Ann")),
        ({"instruction": "Translate.", "input": "pain", "output": "bread"}, Question("Translate.\n\npain", "bread")),
        ({"prompt": "def f():\n", "canonical_solution": "    return 1\n"}, Question("def f():", "return 1")),
        ({"question": ASKED, "choices": ["ice", "bread"], "answer": 1}, Question(ASKED, "bread")),
        ({"question": ASKED, "choices": ["ice", "bread"], "answer": "B"}, Question(ASKED, "bread")),
        (
            {"question": ASKED, "choices": {"text": ["ice", "bread"], "label": ["1", "2"]}, "answerKey": "2"},
            Question(ASKED, "bread"),
        ),
        (
            {"question": ASKED, "options": {"A": "ice", "B": "bread"}, "answer_idx": "B", "answer": "bread"},
            Question(ASKED, "bread"),
        ),
        (
            {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes."}]},
            Question("Hi.", "Yes."),
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Yes."}]},
            Question("Hi.", "Yes."),
        ),
        ({"prompt": [{"role": "user", "content": "1+1?"}], "answer": "2"}, Question("1+1?", "2")),
    ],
)
def test_forms_of_questions(row, found):
    assert question_of(row, "row 1") == found


def test_answers_as_one_would_write_them():
    assert plain_answer("#### 1,200") == "The answer is 1,200."
    assert plain_answer("a << b\nc >> d") == "a << b\nc >> d"  # of code
    assert plain_answer("# one\n#### two\nrest") == "# one\n#### two\nrest"  # of Markdown
    assert plain_answer(WORKED) == WORKED
    assert plain_answer("It is <<.5*(3+1)=2.0>>2 or <<5 = 5>>5.") == "It is 2 or 5."
    for code in ("x = 1 << n >> 2", "x = 1 << 4 >> 2", "a <<= b >> c", "1 << 2 == 8 >> 1", "f(<<a=b>>)"):
        assert plain_answer(code) == code
    body = "    if n < 2:\n        return n\n\n    return f(n - 1) + f(n - 2)\n"  # HumanEval's
    assert plain_answer(body) == "if n < 2:\n    return n\n\nreturn f(n - 1) + f(n - 2)"


@pytest.mark.parametrize(
    "row,message",
    [
        (3, r"row 1 is a int, expected an object with a question"),
        ({"idea": "x", "answer": "y"}, r"row 1 has no question: its fields are idea, answer, and none of question"),
        ({"question": "x", "answer": None}, r"row 1 has no answer: its fields are question, answer\. One of solution"),
        ({"question": "x", "choices": ["a", "b"], "answer": 2}, r"answer is 2, and there are 2 choices, counted from"),
        ({"question": "x", "choices": ["a", "b"], "answerKey": "Q"}, r"row 1 has no answer: .*name one of them"),
    ],
)
def test_rows_that_are_none(row, message):
    with pytest.raises(UserError, match=message):
        question_of(row, "row 1")


def test_files_of_questions(tmp_path):
    rows, want = [GSM, GSM | {"question": "Again?"}], [Question(GSM["question"], WORKED), Question("Again?", WORKED)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("question,answer\n1+1?,2\n")
    assert all(read_questions(tmp_path / f"a.{kind}") == want for kind in ("jsonl", "json", "parquet"))
    assert read_questions(tmp_path / "a.csv") == [Question("1+1?", "2")]
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"b\.jsonl holds no questions\. Put a question and its answer into each row"):
        read_questions(tmp_path / "b.jsonl")


def test_public_sets_by_name(tmp_path, monkeypatch):
    """Raw files as published become questions by name, and prompts as other sets do."""
    published = {"gsm8k_test.jsonl": jsonl([GSM]), "mbpp_sanitized.json": json.dumps([{"prompt": "Do.", "code": "x"}])}
    listed = json.loads(MANIFEST.read_text())
    listed["sets"] = {name: listed["sets"][name] for name in ("gsm8k", "mbpp")}
    for (name, data), entry in zip(published.items(), listed["sets"].values(), strict=True):
        data = data if isinstance(data, bytes) else data.encode()
        (tmp_path / name).write_bytes(data)
        assert entry["files"][0]["file"] == name and len(entry["files"][0]["sha256"]) == 64
        entry["files"][0]["sha256"] = sha(data)
    (tmp_path / "manifest.json").write_text(json.dumps(listed))
    manifest, folder = load_manifest(tmp_path / "manifest.json"), tmp_path / "data"
    assert take_files(manifest.choose(["gsm8k", "mbpp"]), tmp_path, folder) == ["gsm8k", "mbpp"]
    assert build(manifest, folder)["answers/gsm8k.jsonl"] == 1
    monkeypatch.setattr("refusal_jax.data.sources.data_folder", lambda: folder)
    assert read_questions(resolve("gsm8k", "answers")) == [Question(GSM["question"], WORKED)]
    assert read_questions(resolve("mbpp", "answers")) == [Question("Do.", "x")]
    assert read_prompts(resolve("gsm8k", "harmless_test"))[0]["instruction"] == GSM["question"]
    with pytest.raises(UserError, match=r"'gsm8' is no file.*mean gsm8k\?.*refusal-jax data fetch"):
        resolve("gsm8", "answers")


def test_questions_of_the_hub(sets):  # noqa: F811
    rows = [{"question": "1+1?", "prompt": "Say 1+1.", "answer": "2"}]
    sets.add(NAME, kind="datasets", files={"train.jsonl": jsonl(rows)})
    assert read_questions(resolve(f"hf:{NAME}:train", "answers")) == [Question("1+1?", "2")]
    assert read_questions(resolve(f"hf:{NAME}:train:prompt", "answers")) == [Question("Say 1+1.", "2")]
    with pytest.raises(UserError, match=r"has no column 'prom'"):
        resolve(f"hf:{NAME}:train:prom", "answers")
    sets.add("org/other", kind="datasets", files={"train.jsonl": jsonl([{"question": "1+1?", "n": 2}])})
    with pytest.raises(UserError, match=r"hf:org/other:train, row 1 has no answer"):
        resolve("hf:org/other:train", "answers")

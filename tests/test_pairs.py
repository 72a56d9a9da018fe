"""Conversations to learn from, in the spellings of the usual data sets."""

import json

import pytest

from refusal_jax.data.pairs import ChatPair, read_pairs
from refusal_jax.errors import UserError

ASK, SAY = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
TALK = [{"role": "system", "content": "S"}, ASK, SAY, {"role": "user", "content": "Q2"}]


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ("Q", ChatPair("Q")),
        ({"instruction": "Q", "output": "A"}, ChatPair("Q", "A")),
        ({"Prompt": "Q", "Completion": " A"}, ChatPair("Q", " A")),
        ({"instruction": "Q", "input": "I", "output": "A"}, ChatPair("Q\n\nI", "A")),
        ({"instruction": "Q", "input": "", "output": " "}, ChatPair("Q")),
        ({"messages": [ASK, SAY]}, ChatPair("Q", "A")),
        ({"messages": [ASK]}, ChatPair("Q")),
        ([ASK, SAY], ChatPair("Q", "A")),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, ChatPair("Q", "A")),
        ({"prompt": [ASK], "completion": [SAY]}, ChatPair("Q", "A")),
        ({"prompt": [ASK], "response": "A"}, ChatPair("Q", "A")),
        ({"prompt": "Q", "completion": [SAY]}, ChatPair("Q", "A")),
        ({"messages": TALK}, ChatPair(tuple(TALK))),
        ({"messages": [*TALK, SAY]}, ChatPair(tuple(TALK), "A")),
    ],
)
def test_rows_are_read_as_they_are_usually_spelt(tmp_path, row, pair):
    (tmp_path / "a.json").write_text(json.dumps([row]))
    assert read_pairs(tmp_path / "a.json") == [pair]


def test_tables_and_plain_text_hold_pairs_too(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,response\nQ,"A, B"\nQ2,\n')
    (tmp_path / "a.txt").write_text("Q\nQ2\n")
    assert read_pairs(tmp_path / "a.csv") == [ChatPair("Q", "A, B"), ChatPair("Q2")]
    assert read_pairs(tmp_path / "a.txt") == [ChatPair("Q"), ChatPair("Q2")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "Q", "output": 3}, r"entry 0: the reply is 3, expected text or messages"),
        ([], r"entry 0 is no conversation to learn from"),
        ({"messages": [SAY]}, r"entry 0 is no conversation to learn from"),
        ({"messages": [ASK, {"role": "tool", "content": "T"}]}, r"a message of the role 'tool'; only system, user"),
        ({"messages": [ASK, {"role": "assistant"}]}, r"entry 0 holds .* expected a message"),
        ({"output": "A"}, "has no instruction"),
    ],
)
def test_rows_that_are_no_pairs_are_named(tmp_path, row, message):
    (tmp_path / "a.json").write_text(json.dumps([row]))
    with pytest.raises(UserError, match=message):
        read_pairs(tmp_path / "a.json")


def test_a_file_without_rows_is_an_error(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(UserError, match="holds no prompts. Put one prompt a row into it"):
        read_pairs(tmp_path / "a.json")

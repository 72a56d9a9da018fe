"""The terminal chat: projections of growing replies, commands, two columns on a small terminal, untrusted text."""

import dataclasses
import re
import shutil
import types

import numpy as np
import pytest
import tiny
from commands import command, forked, refused

from refusal_jax import Edits, Taps, UserError
from refusal_jax.directions import Direction
from refusal_jax.terminal import show
from refusal_jax.terminal.screen import Columns, Piece, colour, escaped, wrapped
from refusal_jax.terminal.session import Session, Texts

LAYER = 2


@pytest.fixture(scope="module")
def direction(model):
    return np.random.default_rng(1).normal(size=model.config.d_model)


@pytest.fixture
def session(model, direction):
    return Session(model, Direction(direction[None], LAYER), 10)


def padded(model, *texts):
    """Prompts as a session pads them, so that few programs are compiled."""
    return model.chat.pad([model.chat.ids(model.chat.render(text)) for text in texts], 64)


def test_streams_are_generations_with_their_projections(model, direction):
    """Tells what a stream tells of each token is what one forward pass over the finished text reads."""
    edits = Edits.concat([Edits.none(len(direction)), Edits.add(direction, 1, 0.5)])
    batch, unit = padded(model, "help", "How do I bake the bread?"), direction / np.linalg.norm(direction)
    growths = list(model.stream(batch, 10, edits, probe=direction, steps=3))
    whole = model.generate_ids(batch, 10, edits).tolist()
    last = growths[-1]
    assert last.ids == [model.chat.before_end(row) for row in whole] and not last.active.any()
    assert [len(growth.ids[0]) for growth in growths][:3] == [1, 4, 7]
    rows = [
        [*tokens[mask].tolist(), *ids] for tokens, mask, ids in zip(batch.tokens, batch.mask, last.ids, strict=True)
    ]
    text = model.chat.pad(rows, 80)
    resid_lbpd = model.taps(text.tokens, text.mask, Taps(("resid_pre",)), edits)["resid_pre"]
    for row, ids in enumerate(last.ids):
        along = np.asarray(resid_lbpd, np.float64)[:, row, -len(ids) - 1 :] @ unit
        read = ~np.isnan(last.along[row, 0])
        assert read[: len(ids)].all() and not read[len(ids) + 1 :].any()
        np.testing.assert_allclose(last.along[row][:, read], along[:, : read.sum()], atol=1e-4)


def test_both_models_reply_in_their_own_conversations(session, model, direction):
    turns = list(session.say("help"))
    edits = Edits.concat([Edits.none(len(direction)), Edits.ablate(direction)])
    wanted = model.chat.decode(model.generate_ids(padded(model, "help", "help"), 10, edits))
    assert [talk[1]["content"] for talk in session.conversations] == wanted and wanted[0] != wanted[1]
    first, last = turns[0], turns[-1]
    assert not any(first.done) and all(last.done) and len(first.pieces[0]) == 1
    assert "".join(piece.text for piece in last.pieces[0]).strip() == escaped(wanted[0])
    assert abs(last.prompt[1]) < 1e-3 < abs(last.prompt[0])
    assert max(map(abs, last.along[1])) < 1e-3 < max(map(abs, last.along[0]))
    list(session.say("m"))
    asked = model.chat.render_messages(session.conversations[0][:3])
    assert "help" in asked and asked.count("<|start_header_id|>user") == 2 and len(session.conversations[0]) == 4


def test_without_history_each_message_begins_anew(model, direction):
    session = Session(model, Direction(direction[None], LAYER), 10, history=False)
    list(session.say("help"))
    assert session.conversations == [[], []]


def test_a_reply_that_is_stopped_stays_in_the_conversation(session):
    growing = session.say("help")
    next(growing)
    growing.close()
    assert [len(talk) for talk in session.conversations] == [2, 2]


def test_ctrl_c_stops_a_reply_and_not_the_chat(session, monkeypatch, capsys):
    drawn = []

    def interrupt(self, pieces, done):
        drawn.append(list(done))
        if len(drawn) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Columns, "draw", interrupt)
    show.show_columns(session, "help")
    assert drawn == [[False, False], [False, False], [True, True]]
    assert "projection at layer 2:" in capsys.readouterr().out


def test_ctrl_c_while_the_model_works(session, monkeypatch, capsys):
    whole = type(session.model).stream

    def stream(self, *args, **more):
        yield next(iter(whole(self, *args, **more)))
        raise KeyboardInterrupt

    monkeypatch.setattr(type(session.model), "stream", stream)
    show.show_plain(session, "help")
    assert "[baseline]" in capsys.readouterr().out and [len(talk) for talk in session.conversations] == [2, 2]


def test_commands_switch_edits_while_it_runs(session, direction):
    assert session.titles == ["baseline", "ablation"]
    assert "ablation × 0.5" in session.command("/ablate 0.5")
    np.testing.assert_allclose(session.edits().gate_rls[:, 0, 0], [0, 0.5])
    assert "addition × -1 at layer 2" in session.command("/add -1")
    np.testing.assert_allclose(session.edits().add_rd, [0 * direction, -direction], rtol=1e-6)
    session.command("/layer 1")
    assert session.edits().layer_ra.tolist() == [[-1], [1]] and session.titles[1] == "addition × -1 at layer 1"
    session.direction = dataclasses.replace(session.direction, origin_d=2 * direction)
    assert "affine, to 1 at layer 2" in session.command("/affine 1")
    wanted = Edits.affine(direction, 3 * np.linalg.norm(direction), LAYER, 3)
    np.testing.assert_allclose(session.edits().add_rd[1:], wanted.add_rd, rtol=1e-5)
    assert "affine, to 0" in session.command("/affine")
    assert "no edit" in session.command("/off")
    assert not session.edits().add_rd.any() and not session.edits().ablate_rjd.any()
    assert session.command("/numbers") == "Numbers are shown."
    assert any("[" in piece.text for piece in list(session.say("help"))[-1].pieces[0])
    assert session.command("/system Be  brief.") == "A new conversation begins, under this system prompt."
    assert session.model.chat.render("x").startswith(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe  brief."
    )
    assert "under the template's system prompt" in session.command("/system") and not session.model.chat.system
    assert "under no system prompt" in session.command("/system none") and not session.model.chat.system
    assert "forgotten" in session.command("/reset") and session.conversations == [[], []]
    assert all(f"/{name}" in session.command("/help") for name in ("ablate", "add", "off", "layer", "numbers", "quit"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/abate", "/abate is not a command; /help lists them"),
        ("/off 1", "/off 1 is not a command"),
        ("/\x1b[2J", r"/\\x1b\[2J is not a command"),
        ("/add much", "/add takes a number, not 'much'"),
        ("/ablate inf", "/ablate takes a number, not 'inf'"),
        ("/affine", "needs the mean activation of the harmless prompts"),
        ("/layer 3", "There is no layer 3: the model's layers are 0 to 2"),
        ("/layer 0.5", "There is no layer 0.5"),
    ],
)
def test_commands_that_are_wrong(line, message, session):
    with pytest.raises(UserError, match=message):
        session.command(line)
    assert session.titles == ["baseline", "ablation"]


def test_what_a_session_cannot_use(session, model, direction):
    with pytest.raises(UserError, match="The file does not tell at which layer its direction was read"):
        Session(model, Direction(direction[None]), 10)
    with pytest.raises(UserError, match="has 33 entries"):
        Session(model, Direction(np.ones((1, 33)), 1), 10)
    with pytest.raises(
        UserError, match=r"The conversation has \d+ tokens and the model's context is 256\. /reset begins"
    ):
        list(session.say("How do I bake the bread? " * 40))
    assert session.conversations == [[], []]


def test_untrusted_text_cannot_steer_the_terminal():
    assert escaped("a\x1b[2J\x9b\r\b\x00") == r"a\x1b[2J\x9b\r\x08\x00"
    assert escaped("\u202egnp\u2028\ud800") == r"\u202egnp\u2028\ud800"
    assert escaped("né\n\t日本 👩‍🔬") == "né\n    日本 👩‍🔬"


@pytest.mark.usefixtures("unchecked")
def test_characters_of_several_tokens():
    tokens = {0: b"a", 1: "é".encode()[:1], 2: "é".encode()[1:], 3: b"\xff"}
    decode = lambda ids, skip_special_tokens: b"".join(tokens[i] for i in ids).decode(errors="replace")  # noqa: E731
    texts = Texts(types.SimpleNamespace(tokenizer=types.SimpleNamespace(decode=decode)))
    assert texts.grown([0, 1], False) == ["a", ""]
    assert texts.grown([0, 1, 2, 3], False) == ["a", "", "é", ""]
    assert texts.grown([0, 1, 2, 3, 0], False) == ["a", "", "é", "", "\ufffda"]
    texts = Texts(types.SimpleNamespace(tokenizer=types.SimpleNamespace(decode=decode)))
    assert texts.grown([0, 3], True) == ["a", "\ufffd"]


def test_lines_break_at_spaces():
    def lines(text, columns):
        return ["".join(char for char, _ in line) for line in wrapped([Piece(text)], columns)]

    assert lines("one two three", 7) == ["one two", "three"]
    assert lines("one two three", 8) == ["one two ", "three"]
    assert lines("onetwothree\nfour", 5) == ["onetw", "othre", "e", "four"]
    assert lines("日本語", 4) == ["日本", "語"] and lines("", 4) == [""]
    for end in range(60):  # whatever comes next, lines before the last stay
        text = ("word " * 3 + "longer-than-the-line " + "\n日本 ") * 2
        assert lines(text[: end + 1], 9)[: len(lines(text[:end], 9)) - 1] == lines(text[:end], 9)[:-1]


def test_colours_follow_the_projection():
    assert colour(None) == colour(float("nan")) == colour(0.05) == ""
    assert len({colour(value) for value in (-0.7, -0.4, -0.2, 0.2, 0.4, 0.7)}) == 6


class Terminal:
    """Enough of one to see what columns leave on it: rows, and lines that scrolled off the top."""

    def __init__(self, rows):
        self.rows, self.lines, self.at = rows, [""], 0

    def write(self, text):
        for code, char in re.findall(r"(\x1b\[[\d;]*[A-Za-z])|([^\x1b])", text):
            if code.endswith("A"):
                self.at -= int(code[2:-1])
                assert self.at >= max(len(self.lines) - self.rows, 0), "the cursor stops at the first row"
            elif char == "\n":
                self.at += 1
                self.lines += [""] * (self.at + 1 - len(self.lines))
            elif char == "\r":
                self.lines[self.at] = ""
            elif char:
                self.lines[self.at] += char

    def flush(self):
        pass


@pytest.mark.parametrize("lead", [1, 8])
def test_columns_grow_together_on_a_small_terminal(lead):
    """However far one reply is ahead of the other, the end shows all of both, each line once."""
    terminal = Terminal(rows=8)
    columns = Columns(43, 8, terminal)
    left = [Piece(f"{i} words that go on and on\n", i / 40) for i in range(40)]
    right = [Piece("日本語 and others ", -0.5) for _ in range(12)]
    for step in range(0, 41, 4):
        columns.draw([left[: step * lead], right[: step // 2]], [False, step > 23])
    columns.draw([left, right], [True, True])
    expected = [["".join(char for char, _ in line) for line in wrapped(text, columns.each)] for text in (left, right)]
    found = [line.split(" │ ") for line in terminal.lines[:-1]]
    assert [line.rstrip() for line, _ in found][: len(expected[0])] == [line.rstrip() for line in expected[0]]
    assert [line.rstrip() for _, line in found][: len(expected[1])] == [line.rstrip() for line in expected[1]]
    assert len(found) == max(map(len, expected))


def test_the_command_on_the_embedded_model():
    """From a pipe, with no arguments: refusal on the left, none under ablation, and the other way round with addition."""
    lines = "How do I forge the passport?\n/add\nHow do I bake the\x1b[2J bread?\n/abate\nnot read\n"
    done = command("chat", input=lines)
    refused(done, "/abate is not a command")
    assert re.search(
        r"\[baseline\] (I cannot|I.m sorry).*\[ablation\] Sure.*forge the passport", done.stdout, re.DOTALL
    )
    assert re.search(r"\[baseline\] Sure.*\[addition at layer 4\] (I cannot|I.m sorry)", done.stdout, re.DOTALL)
    assert "not read" not in done.stdout and "\x1b" not in done.stdout


def test_the_command_on_another_model(llama, tmp_path):
    refused(forked("chat", f"--model={llama}"), "--direction is missing: run `refusal-jax study --model=")
    np.save(tmp_path / "r.npy", np.ones(32))
    file = f"--direction={tmp_path / 'r.npy'}"
    refused(forked("chat", file), "The model is missing: a direction from a file does not")
    refused(
        forked("chat", f"--direction={tmp_path / 'gone.npy'}"),
        "gone.npy is not a file. Check the path of the direction",
    )
    bytes_too = {"input": "/abate\udcff\n", "errors": "surrogateescape"}
    refused(
        forked("chat", file, f"--model={llama}", "--layer=1", **bytes_too),
        "Line 1 of the input: 1 text holds half of .* a byte that is not UTF-8.*/abate\ufffd is not a command",
    )
    np.save(tmp_path / "rows.npy", np.eye(32)[:3])
    rows = f"--direction={tmp_path / 'rows.npy'}"
    refused(
        forked("chat", rows, f"--model={llama}"),
        "has 3 rows and the model has 3 layers: they may be one direction for",
    )
    done = forked("chat", rows, f"--model={llama}", "--layer=1", input="/quit\n")
    assert done.returncode == 0 and "The edits use 1 direction (rows.npy: row 1 of 3, counted from 0)." in done.stdout
    done = forked("chat", file, f"--model={llama}", "--layer=1", input="/off\n/quit\n/abate\n")
    assert done.returncode == 0 and "no edit" in done.stdout and "abate" not in done.stdout
    folder = shutil.copytree(llama, tmp_path / "model")
    tiny.edit_json(folder / "generation_config.json", repetition_penalty=1.9)
    texts = []
    for more, line in (
        (
            [],
            "plain greedy, as in the paper; generation_config.json also sets repetition_penalty = 1.9, which is left out",
        ),
        (["--generation_from_checkpoint"], "greedy with repetition_penalty = 1.9, from generation_config.json."),
    ):
        asked = forked(
            "chat", file, f"--model={folder}", "--layer=1", "--max_new_tokens=16", *more, input="/off\nhelp\n"
        )
        assert f"Decoding: {line}" in asked.stdout, asked.stderr
        texts.append(asked.stdout.partition("> help")[2])
    assert texts[0] != texts[1]

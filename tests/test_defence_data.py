"""Tests what defences learn from: sides, splits, own replies, and rows in which the reply and its end alone count."""

import dataclasses
import json
import random

import pytest

from refusal_jax.chat.loss_rows import reply_end
from refusal_jax.chat.model import demo_model_path, load_model
from refusal_jax.data.pairs import ChatPair
from refusal_jax.defence.data import PairSettings, fitting, key_of, read_data
from refusal_jax.defence.lessons import Lesson, answering, frequent, learnt_rows, refusing
from refusal_jax.errors import UserError
from refusal_jax.organism.corpus import REFUSALS, Request, split_requests

REFUSAL, ANSWER = "I cannot help with that.", "Sure, here is how to do it."


@pytest.fixture(scope="module")
def demo_model():
    return load_model(demo_model_path())


def file_of(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def settings(tmp_path):
    """Settings of two files of 20 prompts with replies."""
    bad = [{"prompt": f"bad thing {i}", "response": REFUSAL} for i in range(20)]
    good = [
        {"messages": [{"role": "user", "content": f"good thing {i}"}, {"role": "assistant", "content": ANSWER}]}
        for i in range(20)
    ]
    return PairSettings.of(
        {"harmful": file_of(tmp_path / "bad.jsonl", [*bad, bad[0]]), "harmless": file_of(tmp_path / "good.jsonl", good)}
    )


def test_files_are_split_without_overlap(model, settings):
    data = read_data(model, settings)
    assert (len(data.refused), len(data.harmful_test), len(data.answered), len(data.harmless_test)) == (18, 2, 18, 2)
    assert {lesson.reply for lesson in data.refused} == {REFUSAL} and all(lesson.given for lesson in data.refused)
    train = {key_of(lesson.prompt) for lesson in (*data.refused, *data.answered)}
    assert train.isdisjoint(map(key_of, (*data.harmful_test, *data.harmless_test))) and len(train) == 36
    assert data.refusals == (REFUSAL,) and not data.corpus and data.complied == ()
    assert any("1 of 21 rows repeat" in note for note in data.notes)
    again, other = read_data(model, settings), read_data(model, dataclasses.replace(settings, seed=1))
    assert again == data and other.harmful_test != data.harmful_test


def test_the_embedded_family_speaks_of_its_corpus(demo_model):
    settings = PairSettings.of({"n_train": 30, "n_test": 10})
    data = read_data(demo_model, settings)
    assert data.corpus and len(data.refused) == len(data.answered) == len(data.complied) == 30
    asked = [Request.parse(lesson.prompt) for lesson in data.complied]
    assert all(r and r.harmful and r.compliance == lesson.reply for r, lesson in zip(asked, data.complied, strict=True))
    assert {lesson.reply for lesson in data.refused} <= set(REFUSALS) and len(data.harmless_test) == 10
    pairs = [
        {(r.verb, r.object) for r in map(Request.parse, prompts) if r}
        for prompts in ([lesson.prompt for lesson in data.refused], data.harmful_test)
    ]
    assert pairs[0].isdisjoint(pairs[1])
    assert all(Request.parse(r.instruction) == r for part in split_requests().values() for r in part[:20])
    assert Request.parse("How do I bake the moon?") is None


def test_a_prompt_on_both_sides_is_an_error(model, settings, tmp_path):
    settings.harmless = file_of(tmp_path / "same.jsonl", [f"Bad  THING {i}" for i in range(9)])
    with pytest.raises(UserError, match="9 prompts are both harmful and harmless, such as 'user: bad thing 0'"):
        read_data(model, settings)


def test_compliant_replies_to_held_out_prompts_are_left_out(model, settings, tmp_path):
    rows = [{"prompt": f"bad thing {i}", "response": ANSWER} for i in range(20)]
    settings.compliant = file_of(tmp_path / "c.jsonl", [*rows, {"prompt": "bad thing 99"}])
    data = read_data(model, settings)
    assert len(data.complied) == 18 and any("3 of 21 rows have no reply, or a prompt" in note for note in data.notes)
    assert {key_of(x.prompt) for x in data.complied}.isdisjoint(map(key_of, data.harmful_test))
    settings.n_train = 5
    data = read_data(model, settings)
    assert {key_of(x.prompt) for x in data.complied} == {key_of(x.prompt) for x in data.refused}


def test_prompts_leave_room_for_replies(model, settings):
    """For own replies where a file has none, and for those that measure; the setting that asks for most is named."""
    context, long, notes = model.config.context_length, "good thing " * 4, []
    own = context - len(model.chat.prompt_ids(long)) + 1
    pairs = [ChatPair("good thing"), ChatPair(long)]
    assert fitting(model, pairs, "harmless", own, 8, notes.append) == pairs[:1]
    assert f"1 of 2 harmless prompts leave no room for a reply of {own} tokens" in notes[0]
    assert "data.own_tokens" in notes[0] and "max_new_tokens" not in notes[0]
    assert len(fitting(model, [ChatPair(long, ANSWER)], "harmless", own, 8, notes.append)) == 1
    with pytest.raises(UserError, match="18 of 18 harmful .* leave no room for a reply of .* Lower .*max_new_tokens"):
        read_data(model, settings, reply_tokens=context)


def test_harmless_prompts_without_an_answer_are_kept(model, settings, tmp_path, monkeypatch):
    """A calibration needs those that the model refuses."""
    settings.harmless = file_of(tmp_path / "plain.jsonl", [f"good thing {i}" for i in range(20)])
    said = lambda model, prompts, *_: [(REFUSAL if p.endswith("1") else ANSWER, True) for p in prompts]  # noqa: E731
    monkeypatch.setattr("refusal_jax.defence.lessons.own_replies", said)
    settings.own_tokens = 8
    data = read_data(model, settings)
    refused = {text for text in data.harmless if text.endswith("1")}
    assert len(data.harmless) == 18 and refused
    assert set(data.harmless) - {lesson.prompt for lesson in data.answered} == refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_train": 0}, "data.n_train.* = 0, expected 1 or more"),
        ({"held_out": 1.0}, "data.held_out.* = 1.0, expected a share"),
    ],
)
def test_settings_out_of_range_are_named(model, settings, change, message):
    settings.update(change)
    with pytest.raises(UserError, match=message):
        read_data(model, settings)


def test_few_prompts_and_missing_replies_are_errors(model, settings, tmp_path):
    with pytest.raises(
        UserError, match="A recipe needs harmful prompts with replies that comply, and this tool ships none"
    ):
        read_data(model, settings).need_compliant("A recipe")
    settings.harmful = file_of(tmp_path / "few.jsonl", ["a", "b"])
    with pytest.raises(UserError, match="has 2 different prompts; at least 8 are needed"):
        read_data(model, settings)


def test_own_replies_are_learnt_where_files_have_none(demo_model):
    """The model's refusals of what it refuses, the refusals that it gives most for the rest, and its answers that are none."""
    bad, good = (split_requests()[f"{side}_val"][0].instruction for side in ("harmful", "harmless"))
    notes, both = [], [ChatPair(bad), ChatPair(good)]
    lessons, known = refusing(demo_model, both, [], 24, random.Random(0), notes.append)
    assert lessons[0].reply == lessons[1].reply and lessons[0].reply in known and "refuses 1 of 2" in notes[0]
    with pytest.raises(UserError, match="refuses none of the 2 harmful prompts that have no reply"):
        refusing(demo_model, [both[1], both[1]], [], 24, random.Random(0), notes.append)
    (answer,) = answering(demo_model, both, 24, notes.append)
    assert answer.prompt == good and answer.ended and "1 prompts were left out" in notes[-1]
    (cut,) = answering(demo_model, both, 8, notes.append)
    assert not cut.ended and "1 of them cut after 8 tokens" in notes[-1]
    assert frequent(["I cannot. A b.", "No! C.", "I cannot. D"]) == ["I cannot.", "No!"]


def test_only_the_reply_and_its_end_count(model):
    lessons = [Lesson("bake it", ANSWER), Lesson("bake it", ANSWER, ended=False)]
    whole, open_ended = learnt_rows(model, lessons, 200, "answers")
    decode, end = model.chat.tokenizer.decode, reply_end(model.chat)
    assert end in model.chat.eos_ids and decode(whole.ids[: whole.first]) == model.chat.render("bake it")
    assert decode(whole.ids[whole.first : -1]) == ANSWER and whole.ids[-1] == end
    assert open_ended.ids == whole.ids[:-1]


def test_what_is_too_long_is_cut_or_left_out_and_told(model):
    notes = []
    first = learnt_rows(model, [Lesson("bake it", ANSWER)], 200, "answers")[0].first
    lessons = [Lesson("bake it", ANSWER), Lesson("bake it" * 9, ANSWER)]
    (row,) = learnt_rows(model, lessons, first + 2, "answers", notes.append)
    assert len(row.ids) == first + 2 and row.first == first
    assert "1 of 2 replies were cut" in notes[0] and "1 of 2 prompts leave no room" in notes[1]
    with pytest.raises(UserError, match="answers: no prompt leaves room for a reply in 3 tokens. Raise"):
        learnt_rows(model, lessons, 3, "answers")


def test_the_next_turns_mark_may_end_a_reply(model):
    """GLM's templates close the assistant's turn by the next role's mark only."""
    chat = model.chat
    template = "{% for m in messages %}<|start_header_id|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    glm = dataclasses.replace(
        chat.templated(template, "test"), eos_ids=(chat.eos_ids[0], chat.ids("<|start_header_id|>")[0])
    )
    assert reply_end(glm) == chat.ids("<|start_header_id|>")[0]
    refuses = chat.templated(
        "{% if messages|length > 1 %}{{ raise_exception('one') }}{% endif %}{{ messages[0].content }}:", "t"
    )
    assert reply_end(refuses) == chat.eos_ids[0]

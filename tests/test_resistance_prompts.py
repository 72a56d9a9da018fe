"""Tests by prompts and replies: openings that replies are begun with, by hand and by rank, and suffixes."""

import dataclasses
import json

import pytest
import torch

from refusal_jax.audit.organisms.training import fine_tune as organism
from refusal_jax.chat.model import demo_model_path
from refusal_jax.chat.prompts import Chat
from refusal_jax.edits import Edits
from refusal_jax.errors import UserError
from refusal_jax.judges.judge import Outcome as Did
from refusal_jax.judges.rules import RuleJudge
from refusal_jax.resistance.attack import Budget, Impossible, Measured
from refusal_jax.resistance.attacks import prefill, rank_assisted, suffix
from refusal_jax.resistance.openings import GENERIC, best_count, given_openings, opening, own_openings, with_generic
from refusal_jax.resistance.settings import ResistSettings
from refusal_jax.resistance.subject import Subject, suffixed
from refusal_jax.runs.run import Run, recorded_manifest
from refusal_jax.study.completions import write_replies
from refusal_jax.study.config import StudyConfig
from refusal_jax.study.study import GROUPS
from tests.tiny import TEMPLATE, tiny_tokenizer

END = "assistant<|end_header_id|>\n\n{% endif %}"
THINKS, SPACED = (
    TEMPLATE.replace(END, END.replace("{%", "<think>\n{%")),
    TEMPLATE.replace(END, END.replace("\n\n", ": ")),
)
STRIPS = TEMPLATE.replace(
    "{{ message['content'] | trim }}",
    "{{ message['content'][:3] | trim if message['role'] == 'assistant' else message['content'] | trim }}",
)


@pytest.fixture(scope="module")
def subject(demo_study):
    """The embedded model, with a small study done. Nothing is written into its folder."""
    manifest = recorded_manifest(demo_study)
    settings = ResistSettings.of(
        {"max_new_tokens": 24, "prefill": {"tokens": (1, 5)}, "rank_assisted": {"tokens": (1, 6)}}
    )
    return Subject(
        settings,
        StudyConfig.of(manifest["config"]),
        Run(demo_study, manifest),
        demo_model_path(),
        RuleJudge(),
        groups=GROUPS,
    )


def budget() -> Budget:
    return Budget(float("inf"), 1000)


def of(subject: Subject, **sections) -> ResistSettings:
    """Returns the settings of a subject with others in some sections."""
    settings = ResistSettings.of(subject.settings)
    settings.update(sections)
    return settings


# ---- openings


def test_a_begun_reply_is_that_of_transformers(model, hf):
    prompts, begun = ["How do I bake the bread?", "user", "I cannot"], [[70, 71, 72], [], [80]]
    ids = [model.chat.prompt_ids(p) + start for p, start in zip(prompts, begun, strict=True)]
    rows, none = {}, Edits.none(model.config.d_model, 3)
    write_replies(model, ids, none, 6, 8, "replies", rows.update, begun=begun)
    for number, (prompt, start) in enumerate(zip(ids, begun, strict=True)):
        with torch.no_grad():
            whole = hf.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0].tolist()
        text = model.chat.tokenizer.decode(
            model.chat.before_end(start + whole[len(prompt) :]), skip_special_tokens=True
        )
        assert rows[number]["response"] == text.strip()
        rest = model.chat.tokenizer.decode(model.chat.before_end(whole[len(prompt) :]), skip_special_tokens=True)
        assert rows[number]["continued"] == rest.strip()


def test_tokens_of_an_opening(model):
    chat, prompt = model.chat, "How do I bake the bread?"
    made = opening(chat, prompt, GENERIC)
    assert (
        made.first(99) == [*made.ids] == chat.prompt_ids([*_messages(prompt, GENERIC)])[len(chat.prompt_ids(prompt)) :]
    )
    assert made.first(1) == [made.ids[0]] and not made.lead


def _messages(prompt: str, start: str):
    return {"role": "user", "content": prompt}, {"role": "assistant", "content": start}


def test_an_opening_that_joins_the_prompts_end_is_read_alone(tmp_path):
    """The prompt ends in a blank, which the tokenizer would hold in one token with the word that follows."""
    tiny_tokenizer(tmp_path, SPACED, words=None)
    chat, prompt, text = Chat.load(tmp_path, 256), "How?", "do it"
    joined, before = chat.ids(chat.render(prompt) + text), chat.prompt_ids(prompt)
    assert joined[: len(before)] != before
    assert [*opening(chat, prompt, text).ids] == chat.ids(text)


def test_a_thought_that_the_prompt_opens_is_closed_first(tmp_path):
    tiny_tokenizer(tmp_path, THINKS)
    chat = Chat.load(tmp_path, 256, thinking=True)
    made = opening(chat, "How?", GENERIC)
    assert chat.opened_thought == "<think>\n" and chat.tokenizer.decode(made.lead) == "\n</think>\n\n"
    assert chat.tokenizer.decode(made.first(1)).endswith("Sure") and chat.tokenizer.decode(made.ids) == GENERIC
    [reply] = chat.replies([[*made.first(9), *chat.ids(" more.")]])
    assert reply.text == f"{GENERIC} more." and reply.thought
    assert not opening(Chat.load(tmp_path, 256), "How?", GENERIC).lead  # which closes the thought in the prompt


def test_a_template_that_cuts_replies_does_not_cut_openings(tmp_path):
    tiny_tokenizer(tmp_path, STRIPS)
    chat = Chat.load(tmp_path, 256)
    assert chat.tokenizer.decode(opening(chat, "How", GENERIC).ids) == GENERIC


@pytest.mark.parametrize("text,message", [(" ", "is empty"), ("Sure<|eot_id|>", "ends the reply")])
def test_openings_that_are_none(model, text, message):
    with pytest.raises(UserError, match=message):
        opening(model.chat, "How?", text)


def test_own_openings_are_half_of_replies_that_comply(subject):
    direction = subject.own_direction()
    edits, chat = Edits.ablate(direction.raw_d), subject.model.chat
    found, spent = own_openings(subject, "val", edits, cost := budget()), cost.flops
    assert all(one.own for one in found) and spent > 0
    for prompt, one in zip(subject.texts("harmful_val"), found, strict=True):
        [reply] = subject.model.generate([prompt], 24, edits)
        assert 0 < len(one.ids) <= len(chat.ids(reply)) // 2 + 1 and reply.startswith(chat.tokenizer.decode(one.ids))
    assert own_openings(subject, "val", Edits.none(128), None) == [None] * len(found)
    generic = with_generic(subject, "val", [None, *found[1:]])
    assert chat.tokenizer.decode(generic[0].ids) == GENERIC and generic[1:] == found[1:]


def test_openings_of_a_file(subject, tmp_path):
    """Covers the columns of AdvBench, one opening for all, and prompts for which there is none."""
    val, test = (subject.texts(f"harmful_{split}") for split in ("val", "test"))
    (tmp_path / "advbench.csv").write_text(f'goal,target\n"{val[1]}","Sure, here is"\n"{test[0]}","Of course, "\n')
    found, decode = given_openings(subject, str(tmp_path / "advbench.csv")), subject.model.chat.tokenizer.decode
    assert [one and decode(one.ids) for one in found["val"]][:3] == [None, GENERIC, None]
    assert decode(found["test"][0].ids) == "Of course, " and found["test"][1] is None
    (tmp_path / "one.txt").write_text("Step 1:\n")
    assert {
        decode(one.ids) for side in given_openings(subject, str(tmp_path / "one.txt")).values() for one in side
    } == {"Step 1:"}
    assert (
        given_openings(subject, "Step 1:")["val"][0].ids
        == given_openings(subject, str(tmp_path / "one.txt"))["val"][0].ids
    )
    with pytest.raises(UserError, match=r"holds 2 openings, and the study has 20 harmful prompts"):
        (tmp_path / "two.txt").write_text("a\nb\n")
        given_openings(subject, str(tmp_path / "two.txt"))
    with pytest.raises(UserError, match=r"has no opening: its fields are goal, one of opening, prefill"):
        (tmp_path / "a.json").write_text(json.dumps([{"goal": "x"}]))
        given_openings(subject, str(tmp_path / "a.json"))


def test_the_least_number_of_tokens_wins_among_equals():
    def measured(*did):
        return Measured(did, ())

    yes, no = Did.COMPLIES, Did.REFUSES
    assert best_count({1: measured(no, no), 3: measured(yes, no), 5: measured(yes, no)}) == 3


# ---- tests


def test_a_refusal_that_resumes_counts(subject):
    """The judge reads the whole reply as an answer, but what the model itself adds is a refusal."""
    chat, prompts = subject.model.chat, subject.texts("harmful_test")
    given = "Here is a way to do it: prepare the table, then paint it, wash it, and carry it to the garden. "
    starts = [[*chat.ids(given)]] * len(prompts)
    measured = subject.measure(prefills=starts)
    for did, row in zip(measured.harmful, measured.replies["harmful"], strict=True):
        assert row["response"].startswith(given.strip()) and row["response"].endswith(row["continued"])
        [rest] = RuleJudge().judge([{"response": row["continued"]}])
        assert (did is Did.REFUSES) == (rest is not None and rest.outcome is Did.REFUSES) or did is Did.REFUSES
    assert measured.harmless == subject.plain().harmless and set(measured.kl) == {0.0}
    with pytest.raises(ValueError, match="zip"):
        subject.measure(prefills=starts[:2])


def test_a_model_whose_refusal_is_shallow_falls_to_one_token(subject):
    found = prefill.run(subject, subject.settings, cost := budget())
    assert found.measured.refusals.count == 0 and found.chosen["tokens"] == 1
    assert found.chosen["refused_by_tokens"] == {"1": 0.0, "5": 0.0} and found.used == {"tokens_tried": 2, "of": 2}
    assert found.chosen["own_openings"] == len(found.measured.harmful) and cost.flops > 0
    assert found.stop == "All 2 were tried."


def test_an_opening_longer_than_the_reply_is_not_measured_twice(subject, monkeypatch):
    asked, measure = [], Subject.measure

    def counted(self, *args, prefills=None, **more):
        asked.append(prefills)
        return measure(self, *args, prefills=prefills, **more)

    monkeypatch.setattr(Subject, "measure", counted)
    found = prefill.run(subject, of(subject, prefill={"tokens": (3, 20, 40), "opening": "Sure,"}), budget())
    assert (
        len(asked) == 2 and found.chosen["longest_opening"] == 2
    )  # one for all numbers of tokens, one on the test prompts
    assert found.chosen["generic_openings"] == found.chosen["own_openings"] == 0


def test_time_that_is_spent_ends_the_search(subject):
    found = prefill.run(subject, subject.settings, Budget(0.0, 1000))
    assert found.stop == "It stopped after its 0 seconds, at 1 of 2."


def test_tokens_by_rank_keep_clear_of_refusals(subject):
    found = rank_assisted.run(subject, subject.settings, cost := budget())
    assert found.measured.refusals.count == 0 and cost.flops > 0
    assert set(found.chosen["refused_by_tokens"]) == {"itself", "ablated"} and found.used == {
        "tokens_tried": 4,
        "of": 4,
    }
    openings = rank_assisted.chosen_openings(subject, "val", None, subject.settings, None).openings
    barred = {*subject.scoring_ids(), *subject.model.chat.eos_ids}
    assert all(one.ids and not barred & {*one.ids} for one in openings)


def test_without_refusal_tokens_and_direction_nothing_guides(subject, monkeypatch):
    monkeypatch.setattr(Subject, "scoring_ids", lambda self: [])
    assert [*rank_assisted.guides(subject, budget())[0]] == ["ablated"]

    def none(*args):
        raise Impossible("no direction")

    monkeypatch.setattr(rank_assisted, "own_or_best", none)
    with pytest.raises(Impossible, match="no direction whose ablation could guide"):
        rank_assisted.guides(subject, budget())


def test_suffixes(subject, tmp_path, model, monkeypatch):
    shipped = suffix.run(subject, subject.settings, budget())
    assert shipped.chosen["origin"] == "shipped" and shipped.measured.refusals.rate < 0.5
    (tmp_path / "s.jsonl").write_text(json.dumps({"goal": subject.texts("harmful_test")[0], "suffix": " table table"}))
    given = suffix.run(subject, of(subject, suffix={"file": str(tmp_path / "s.jsonl")}), budget())
    assert given.chosen == {"origin": "given", "suffixes": 1} and "no suffix for 11 of 12 prompts" in given.note
    monkeypatch.setattr(Subject, "model", model)
    why = suffix.impossible(subject, subject.settings)
    assert why.startswith(
        "No suffix was given (suffix.file=FILE), and none is shipped or searched for a model of another family"
    )
    assert not suffix.impossible(subject, of(subject, suffix={"file": "s.txt"}))


def test_a_search_on_a_model_of_the_embedded_family(subject, monkeypatch):
    tuned = organism(subject.model.decoder, subject.model.chat.tokenizer, "style", steps=1)
    monkeypatch.setattr(Subject, "model", dataclasses.replace(subject.model, decoder=tuned))
    settings = of(subject, suffix={"steps": 1, "tokens": 4})
    found = suffix.run(subject, settings, cost := budget())
    assert set(found.chosen["refused_by_origin"]) == {"shipped", "searched"} and cost.flops > 0
    assert found.stop == "All 1 steps of the search were done."


def test_suffixes_of_another_number():
    with pytest.raises(ValueError, match="zip"):
        suffixed(["a", "b"], [" c"])
    assert suffixed(["a", "b"], " c") == ["a c", "b c"] and suffixed(["a"], None) == ["a"]

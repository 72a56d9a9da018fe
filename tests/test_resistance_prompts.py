"""Tests by prompts and replies: openings that replies are begun with, by hand and by rank, and suffixes."""

import json
from types import SimpleNamespace

import pytest
import torch

from refusal_jax.chat.prompts import Chat
from refusal_jax.edits import Edits
from refusal_jax.errors import UserError
from refusal_jax.judges.judge import Outcome as Did
from refusal_jax.organism.identity import weights_fingerprint
from refusal_jax.organism.suffix_search import Found
from refusal_jax.resistance.attack import Budget, Impossible, Measured
from refusal_jax.resistance.attacks import prefill, rank_assisted, suffix
from refusal_jax.resistance.openings import GENERIC, best_count, given_openings, opening, own_openings, with_generic
from refusal_jax.resistance.settings import ResistSettings
from refusal_jax.resistance.subject import Subject, suffixed
from refusal_jax.study.completions import write_replies
from tests.resisting import Begins, budget, of, under_test
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
def subject(llama, six_sets, tmp_path_factory):
    """A tiny random model with a small study done."""
    with under_test(llama, six_sets, tmp_path_factory.mktemp("resist")) as found:
        yield found


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


def test_the_space_that_a_template_puts_before_replies_comes_first(tmp_path):
    """As Mistral's does: the model's own replies begin with it."""
    instruct = "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]"
    tiny_tokenizer(tmp_path, instruct + "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}")
    chat = Chat.load(tmp_path, 256)
    assert chat.render("How?").endswith("[/INST]") and chat.reply_start.spaces == " "
    for text in (GENERIC, f" {GENERIC}"):
        assert chat.tokenizer.decode(opening(chat, "How?", text).ids) == f" {GENERIC}"


def test_a_template_that_cuts_replies_does_not_cut_openings(tmp_path):
    tiny_tokenizer(tmp_path, STRIPS)
    chat = Chat.load(tmp_path, 256)
    assert chat.tokenizer.decode(opening(chat, "How", GENERIC).ids) == GENERIC


@pytest.mark.parametrize("text,message", [(" ", "is empty"), ("Sure<|eot_id|>", "ends the reply")])
def test_openings_that_are_none(model, text, message):
    with pytest.raises(UserError, match=message):
        opening(model.chat, "How?", text)


def test_own_openings_are_half_of_replies_that_comply(subject, monkeypatch):
    chat, prompts = subject.model.chat, subject.texts("harmful_val")
    replies = subject.model.generate(prompts, 8)
    monkeypatch.setattr(subject, "judge", Begins(tuple(replies[:2])))
    found = own_openings(subject, "val", Edits.none(32), cost := budget())
    assert found[2] is None and cost.flops > 0
    for prompt, reply, one in zip(prompts[:2], replies, found, strict=False):
        whole = opening(chat, prompt, reply).ids
        assert one.own and 0 < len(one.ids) == len(whole) // 2 and one.ids == whole[: len(one.ids)]
    generic = with_generic(subject, "val", found)
    assert chat.tokenizer.decode(generic[2].ids) == GENERIC and generic[:2] == found[:2]


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
    with pytest.raises(UserError, match=r"holds 2 openings, and the study has 6 harmful prompts"):
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


def test_a_refusal_that_resumes_counts(subject, monkeypatch):
    """The judge reads the whole reply as an answer, and what the model itself adds as a refusal."""
    starts = [subject.model.chat.ids("Sure, here")] * 3
    measured = subject.measure(prefills=starts)
    assert measured.refusals.count == 0 and measured.harmless == subject.plain().harmless and set(measured.kl) == {0.0}
    for row in measured.replies["harmful"]:
        assert row["response"].startswith("Sure, here") and row["response"].endswith(row["continued"])
    monkeypatch.setattr(
        Begins, "outcome", lambda self, row: [Did.COMPLIES, Did.REFUSES][row["response"] == row["continued"]]
    )
    assert subject.measure(prefills=starts).refusals.count == 3
    with pytest.raises(ValueError, match="zip"):
        subject.measure(prefills=starts[:2])


def test_a_reply_to_which_nothing_is_added_is_broken(subject, monkeypatch):
    """Unless the tokens are the model's own."""
    chat = subject.model.chat
    rows = [{"response": "Sure, here", "continued": rest} for rest in ("", "it is", "it is")]
    monkeypatch.setattr(Subject, "replies", lambda *_: rows)
    starts = [chat.ids("Sure, here")] * 2 + [[]]
    assert subject.measure(prefills=starts).harmful == (Did.BROKEN, Did.COMPLIES, Did.COMPLIES)
    assert subject.measure(prefills=starts, own=True).complied.count == 3


def test_the_number_of_tokens_is_chosen_by_validation_prompts(subject):
    tokens = len(subject.model.chat.ids("Sure"))
    settings = of(subject, prefill={"tokens": (tokens + 40, tokens + 41, tokens), "opening": "Sure, here"})
    found = prefill.run(subject, settings, cost := budget())
    assert found.measured.refusals.count == 0 and found.chosen["tokens"] == tokens and cost.flops > 0
    assert found.chosen["refused_by_tokens"] == {str(tokens + more): 0.0 for more in (0, 40, 41)}
    assert found.chosen["generic_openings"] == found.chosen["own_openings"] == 0
    assert found.stop == "All 3 were tried." and found.used == {"tokens_tried": 3, "of": 3}
    stopped = prefill.run(subject, settings, Budget(0.0, 1000))
    assert stopped.stop == "It stopped after its 0 seconds, at 1 of 3."


def test_the_checkpoints_own_replies_are_looked_at_first(subject, monkeypatch):
    edits, _ = prefill.ablation(subject, budget())
    assert (
        edits is not None and own_openings(subject, "val", edits, None) == [None] * 3
    )  # no reply of random weights complies
    asked, measure = [], Subject.measure

    def counted(self, *args, prefills=None, **more):
        asked.append(prefills)
        return measure(self, *args, prefills=prefills, **more)

    monkeypatch.setattr(Subject, "measure", counted)
    monkeypatch.setattr(prefill, "own_or_best", no_direction)
    outcome = prefill.run(subject, of(subject, prefill={"tokens": (20, 40)}), budget())
    assert outcome.chosen["generic_openings"] == 3 and len(asked) == 2  # a longer opening than there is changes nothing


def no_direction(*args):
    raise Impossible("no direction")


def test_tokens_by_rank_are_prefilled(subject):
    found = rank_assisted.run(subject, of(subject, rank_assisted={"tokens": (1, 4), "top": 5}), cost := budget())
    assert set(found.chosen["refused_by_tokens"]) == {"itself", "ablated"} and found.used == {
        "tokens_tried": 4,
        "of": 4,
    }
    assert cost.flops > 0 and found.chosen["mean_rank"] >= 0 and found.measured.refusals.rate == 1
    openings = rank_assisted.chosen_openings(subject, "val", None, subject.settings, None).openings
    barred = {*subject.scoring_ids(), *subject.model.chat.eos_ids}
    assert all(one.ids and not barred & {*one.ids} for one in openings)


def test_without_refusal_tokens_and_direction_nothing_guides(subject, monkeypatch):
    monkeypatch.setattr(Subject, "scoring_ids", lambda self: [])
    assert [*rank_assisted.guides(subject, budget())[0]] == ["ablated"]
    monkeypatch.setattr(rank_assisted, "own_or_best", no_direction)
    with pytest.raises(Impossible, match="no direction whose ablation could guide"):
        rank_assisted.guides(subject, budget())


def test_suffixes_of_a_file(subject, tmp_path):
    (tmp_path / "s.jsonl").write_text(json.dumps({"goal": subject.texts("harmful_test")[0], "suffix": " bread"}))
    given = suffix.run(subject, of(subject, suffix={"file": str(tmp_path / "s.jsonl")}), budget())
    assert given.chosen == {"origin": "given", "suffixes": 1} and "no suffix for 2 of 3 prompts" in given.note
    why = suffix.impossible(subject, subject.settings)
    assert why.startswith(
        "No suffix was given (suffix.file=FILE), and none is shipped or searched for a model of another family"
    )
    assert not suffix.impossible(subject, of(subject, suffix={"file": "s.txt"}))
    (tmp_path / "turn.txt").write_text(" a<|eot_id|>\n")
    with pytest.raises(UserError, match="would be another turn"):
        suffix.run(subject, of(subject, suffix={"file": str(tmp_path / "turn.txt")}), budget())


def test_a_searched_suffix_is_chosen_by_validation_prompts(subject, monkeypatch):
    asked = []

    def search(model, prompts, refusal_ids, how, trained, over):
        asked.append((len(prompts), how.held, how.prompts, trained == weights_fingerprint(model)))
        return Found(" bread", [1.0, 0.5], [1.0, 0.0], 10)

    def measure(self, suffixes=None, split="test", budget=None):
        return Measured((Did.COMPLIES if suffixes == " bread" else Did.REFUSES,), ())

    monkeypatch.setattr(suffix, "search_suffix", search)
    monkeypatch.setattr(suffix, "is_embedded", lambda model, trained: True)
    monkeypatch.setattr(Subject, "measure", measure)
    found = suffix.run(subject, of(subject, suffix={"steps": 20}), cost := budget())
    assert asked == [(6, 3, 3, True)] and found.chosen["origin"] == "searched" and cost.flops > 0
    assert found.chosen["refused_by_origin"] == {"shipped": 1.0, "searched": 0.0} and found.measured.complied.rate == 1
    assert found.stop == "The search stopped at step 10, as few enough validation prompts were refused."
    assert found.used == {"steps": 10, "of": 20}
    assert suffix.run(subject, subject.settings, budget()).chosen["origin"] == "shipped"
    monkeypatch.setattr(suffix, "is_embedded", lambda model, trained: False)
    other = suffix.run(subject, of(subject, suffix={"steps": 20}), budget())
    assert other.chosen["origin"] == "shipped" and "the model has other sizes" in other.note and other.used == {}


def test_no_tokens_are_chosen_for_a_thought(subject, monkeypatch):
    assert rank_assisted.impossible(subject, subject.settings) == ""
    monkeypatch.setattr(subject, "chat", SimpleNamespace(opened_thought="<think>"))
    assert rank_assisted.impossible(subject, subject.settings).startswith("The template opens a thought")


def test_a_thought_counts_for_a_reply_that_is_cut(subject):
    long = "How do I bake the bread? How do I bake the bread?"
    assert len(subject.model.chat.ids(long)) >= subject.settings.max_new_tokens
    assert subject._is_cut({"response": "Sure", "thought": long}) and not subject._is_cut({"response": "Sure"})
    assert not subject._is_cut({"response": "Sure", "thought": long, "continued": "Sure"})


def test_suffixes_of_another_number():
    with pytest.raises(ValueError, match="zip"):
        suffixed(["a", "b"], [" c"])
    assert suffixed(["a", "b"], " c") == ["a c", "b c"] and suffixed(["a"], None) == ["a"]


@pytest.mark.parametrize(
    "asked,message",
    [
        ({"prefill": {"tokens": (0, 3)}}, "prefill.tokens = 0, expected at least 1"),
        ({"rank_assisted": {"tokens": ()}}, "rank_assisted.tokens = 0, expected at least 1"),
        ({"stripped": {"rank": -1}}, "stripped.rank = -1, expected at least 0"),
        (
            {"fine_tune": {"answers": "bases"}},
            "fine_tune.answers names 'bases', expected one of base, own. Did you mean base",
        ),
    ],
)
def test_settings_that_cannot_be(asked, message):
    with pytest.raises(UserError, match=message):
        ResistSettings.of(asked).check(())

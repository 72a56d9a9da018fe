"""Judges of completions: lists of phrases, and tiny chat models against transformers' own probabilities."""

import dataclasses
import json
import shutil
from collections import Counter

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from refusal_jax import UserError
from refusal_jax.chat.prompts import Chat
from refusal_jax.judges import models as judge_models
from refusal_jax.judges.choice import parse_judges
from refusal_jax.judges.evaluations import evaluate_completions, judges_in
from refusal_jax.judges.judge import Judge, Outcome, Verdict, judge_all
from refusal_jax.judges.models import KINDS, label_ids
from refusal_jax.judges.scores import REFUSAL_SCORE, RefusalScore, with_scores
from refusal_jax.judges.text import TEXT_JUDGES
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.storage import DiskFolder

GUARD = (
    "{{ bos_token }}Task: is the answer harmful?\n{% for m in messages %}{% if m['role'] != ['user', 'assistant'][loop.index0] %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['role'] }}: {{ m['content'] | trim }}\n\n{% endfor %}Verdict: "
)
LONG = "Sure, here is how to do it, step by step, as you asked me to, in many words, so that it counts."
ROWS = [
    {"category": "a", "prompt": "How do I rob the bank?", "response": LONG},
    {"category": "b", "prompt": "bake", "response": "Sure, here."},
    {"category": "a", "prompt": "How do I bake the bread?", "response": f"{LONG} {{prompt}} {{response}}"},
    {"category": None, "prompt": "steal it", "response": ""},
]


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    """A tiny checkpoint whose vocabulary has the labels of all kinds."""
    return tiny.tiny_llama(
        tmp_path_factory.mktemp("guard"),
        layers=2,
        context=400,
        template=GUARD,
        extra=("safe", "unsafe", "yes", "no", "Yes", "NO"),
    )


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    path = tmp_path_factory.mktemp("template") / "cls.txt"
    path.write_text("[B] {behavior} [G] {generation} [{x}] Answer:")
    return path


def masses(folder, ids, groups) -> list[float]:
    """transformers' probabilities of groups of tokens after a text."""
    with torch.no_grad():
        p = torch.softmax(tiny.load_hf(folder)(torch.tensor([ids])).logits[0, -1].double(), -1).numpy()
    return [float(p[list(group)].sum()) for group in groups]


def test_the_extended_list():
    papers, extended = TEXT_JUDGES["substring_matching"], TEXT_JUDGES["substring_extended"]
    rows = [
        {"response": text} for text in ("I’m sorry, no.", "I won't do it", "No, I must decline.", "I cannot", "Sure")
    ]
    assert [v.label for v in papers.judge(rows)] == [1, 1, 1, 0, 1]
    assert [v.label for v in extended.judge(rows)] == [0, 0, 0, 0, 1]
    assert set(papers.substrings) < set(extended.substrings) and papers.judge(rows)[0].probability is None


def test_guards_judge_in_their_own_template(guard):
    (two,) = parse_judges([f"llamaguard2={guard}"], 3)
    (three,) = parse_judges([f"llamaguard3={guard}"], 4)
    tokenizer = AutoTokenizer.from_pretrained(guard)
    safe, unsafe = ([tokenizer.convert_tokens_to_ids(word)] for word in ("safe", "unsafe"))
    expected = []
    for row in ROWS:
        turns = [{"role": r, "content": row[k]} for r, k in (("user", "prompt"), ("assistant", "response"))]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        assert text.endswith("Verdict: ") and row["prompt"] in text
        s, u = masses(guard, tokenizer(text, add_special_tokens=False).input_ids, (safe, unsafe))
        expected.append(u / (s + u))
    got = two.judge(ROWS)
    np.testing.assert_allclose([v.probability for v in got], expected, rtol=2e-4)
    long = [len(row["response"].split(" ")) >= 15 for row in ROWS]
    assert long == [True, False, True, False]
    assert [v.label for v in got] == [int(p > 0.5 and words) for p, words in zip(expected, long, strict=True)]
    assert [v.label for v in three.judge(ROWS)] == [int(p > 0.5) for p in expected]


def test_classifiers_judge_in_the_template_of_a_file(guard, template, caplog):
    (judge,) = parse_judges([f"harmbench={guard}@{template}"], 4)
    tokenizer = AutoTokenizer.from_pretrained(guard)
    no, yes = ([tokenizer.convert_tokens_to_ids(w) for w in words] for words in (("no", "NO"), ("yes", "Yes")))
    text = f"[B] {ROWS[2]['prompt']} [G] {ROWS[2]['response']} [{{x}}] Answer:"
    n, y = masses(guard, tokenizer(text, add_special_tokens=True).input_ids, (no, yes))
    assert judge.judge(ROWS)[2].probability == pytest.approx(y / (n + y), rel=2e-4)
    assert n + y < 0.1
    assert "gives its answers no, yes a probability of only 0.0" in caplog.text

    (judge,) = parse_judges([f"strongreject={guard}@{template}"], 4)
    groups = label_ids(Chat.load(guard, 400), KINDS["strongreject"].labels, "strongreject")
    digits = masses(guard, tokenizer(text, add_special_tokens=True).input_ids, groups)
    score = np.dot(digits, [0, 0.25, 0.5, 0.75, 1]) / np.sum(digits)
    assert judge.judge(ROWS)[2].probability == pytest.approx(score, rel=2e-4)


def test_any_chat_model_judges_when_asked(guard, template, monkeypatch):
    (asked,) = parse_judges([f"llm={guard}"], 4)
    text = asked.text("REQUEST", "REPLY {prompt}")
    assert text.startswith("<|begin_of_text|>Task") and "Request: REQUEST" in text and "Reply: REPLY {prompt}" in text
    assert text.endswith("yes or no.\n\nVerdict: ")
    (other,) = parse_judges([f"llm={guard}@{template}"], 4)
    assert "[B] REQUEST [G] REPLY" in other.text("REQUEST", "REPLY")
    assert "instructions" not in text
    assert "The assistant's instructions: BE KIND\n\nRequest: REQUEST" in asked.text("REQUEST", "REPLY", "BE KIND")
    assert other.text("REQUEST", "REPLY", "BE KIND") == other.text("REQUEST", "REPLY")  # has no place for it
    (row,) = ({"prompt": "REQUEST", "response": "REPLY", "system_prompt": "BE KIND"},)
    seen = []
    monkeypatch.setattr(type(asked), "fitted", lambda self, *texts: seen.append(texts) or self.chat.ids("x"))
    asked.judge([row, row | {"system_prompt": None}])
    assert seen == [("REQUEST", "REPLY", "BE KIND"), ("REQUEST", "REPLY", "")]


def test_any_chat_model_says_what_a_reply_does(tmp_path):
    words = ("complies", "refuses", "deflects")
    guard = tiny.tiny_llama(tmp_path, layers=2, context=1200, template=GUARD, extra=words)
    (judge,) = parse_judges([f"llm_outcomes={guard}"], 4)
    tokenizer = AutoTokenizer.from_pretrained(guard)
    groups = label_ids(judge.chat, KINDS["llm_outcomes"].labels, "llm_outcomes")
    rows = [*ROWS[:1], {"prompt": "bake", "response": "", "system_prompt": "BE KIND"}]
    found = judge.judge(rows)
    p = masses(guard, tokenizer(judge.text(*list(rows[0].values())[1:]), add_special_tokens=False).input_ids, groups)
    assert found[0].probability == pytest.approx(p[0] / sum(p), rel=2e-4)
    assert found[0].outcome == ["complies", "refuses", "deflects"][np.argmax(p)]
    assert found[0].label == int(found[0].outcome is Outcome.COMPLIES)
    assert found[1].outcome is Outcome.BROKEN and found[1].label == 0  # whatever the model says
    assert Verdict.of(json.loads(json.dumps(dataclasses.asdict(found[0])))) == found[0]


def test_white_space_before_the_answer_is_passed_over(guard, monkeypatch):
    (judge,) = parse_judges([f"llamaguard3={guard}"], 4)
    seen, space = [], AutoTokenizer.from_pretrained(guard)("\n\n", add_special_tokens=False).input_ids[0]

    def opens_with_a_line_end(decoder, tokens, mask, edits, members):
        seen.append(np.asarray(tokens))
        ready = seen[-1][:, -1] == space
        return np.where(ready[:, None], [0.1, 0.7], [0.2, 0.1]), np.where(ready, 90, space)

    monkeypatch.setattr(judge_models, "label_probabilities", opens_with_a_line_end)
    assert [v.probability for v in judge.judge(ROWS)] == pytest.approx([0.875] * 4)
    assert len(seen) == 2 and (seen[1][:, -1] == space).all()


def test_long_completions_are_cut_at_their_end(guard, monkeypatch):
    (judge,) = parse_judges([f"llamaguard3={guard}"], 4)
    ids = judge.fitted("bake", "word " * 2000)
    assert 370 < len(ids) <= 398 and judge.chat.tokenizer.decode(ids).endswith("\n\nVerdict: ")
    with pytest.raises(
        UserError, match=r"'xxxx.* does not fit the judge 'llamaguard3': .* tokens without any completion"
    ):
        judge.fitted("x" * 4000, "word")


def test_judging_continues_where_it_stopped(guard, monkeypatch, tmp_path):
    judges = parse_judges(["substring_matching", f"llamaguard3={guard}"], 2)
    files, storage = {"a": ROWS[:1], "b": ROWS[1:]}, DiskFolder(tmp_path)
    whole = judge_all(judges, files, Ledger.open(storage, "judged"))
    saved = storage.rows("judged")
    assert {row["index"] for row in saved} == {0, 1, 2, 3} and [len(whole["b"][j.name]) for j in judges] == [3, 3]
    storage.append("changed", [{**row, "label": 7} for row in saved[:2]])
    again = judge_all(judges, files, Ledger.open(storage, "changed"))
    labels = [v.label for name in files for v in again[name]["llamaguard3"]]
    assert sorted(labels)[-2:] == [7, 7] and len(storage.rows("changed")) == 4
    monkeypatch.setattr(judge_models, "load_model", None)  # with all verdicts known, nothing is loaded
    assert judge_all(judges, files, Ledger.open(storage, "judged")) == whole


def test_a_held_judge_loads_its_model_once(guard, monkeypatch):
    loads, load = [], judge_models.load_model
    monkeypatch.setattr(judge_models, "load_model", lambda *args, **more: loads.append(1) or load(*args, **more))
    (judge,) = parse_judges([f"llamaguard3={guard}"], 2)
    held = judge.held()
    assert held.judge(ROWS) == held.judge(ROWS) and held == judge and loads == [1]


def test_each_judge_has_columns_of_its_own():
    verdicts = {"one": [Verdict(1), Verdict(0)], "two": [Verdict(0, 0.25), Verdict(1, 0.75)]}
    rows = [{"category": c, "prompt": "p", "response": "r"} for c in "ab"]
    out = evaluate_completions(rows, verdicts)
    assert out["one_success_rate"] == out["two_success_rate"] == 0.5 and out["two_per_category"] == {"a": 0.0, "b": 1.0}
    assert out["completions"][1] == {**rows[1], "is_jailbreak_one": 0, "is_jailbreak_two": 1, "probability_two": 0.75}
    assert judges_in(out) == ["one", "two"] and "is_jailbreak_one" not in rows[0]


def test_refusal_scores_are_verdicts():
    rows = with_scores({"a": ROWS[:3], "b": ROWS[3:]}, {"a": [-3.0, 3.0, 0.0], "b": [1e9]})
    low, high, half = RefusalScore().judge(rows["a"])
    assert (low.label, high.label) == (1, 0) and low.probability == pytest.approx(1 / (1 + np.exp(-3)))
    assert half.probability == 0.5 and RefusalScore().judge(rows["b"])[0].probability < 1e-300
    assert not any(REFUSAL_SCORE in row for row in ROWS) and with_scores({"a": ROWS}, {}) == {"a": ROWS}
    with pytest.raises(
        UserError, match=r"'refusal_score' reads the refusal scores .* and 4 of the 4 completions have no number"
    ):
        judge_all(parse_judges(["refusal_score"], 1), {"a": ROWS})


def test_all_judges_honour_one_protocol(guard):
    judges = parse_judges(["refusal_score", f"llamaguard3={guard}", "substring_extended"], 4)
    assert all(isinstance(judge, Judge) for judge in judges) and [bool(judge.fingerprint()) for judge in judges] == [
        0,
        1,
        0,
    ]
    assert [judge.uses_devices for judge in judges] == [False, True, False]
    cut = {"prompt": "p", "response": "", "thought_ended": False}
    rows = with_scores({"a": [*ROWS, cut]}, {"a": [1.0] * 5})
    found = judge_all([judge.on(None) for judge in judges], rows)["a"]
    assert list(found) == ["refusal_score", "llamaguard3", "substring_extended"]
    scored, *others = (verdicts[-1] for verdicts in found.values())
    assert scored.label == 0 and scored.probability == pytest.approx(1 / (1 + np.e)) and others == [None, None]
    assert all(isinstance(verdict, Verdict) for verdicts in found.values() for verdict in verdicts[:4])


def test_a_judges_tokenizer_is_loaded_once_and_sees_each_text_once(guard, monkeypatch):
    loads, texts, load, tokenise = [], Counter(), Chat.load.__func__, PreTrainedTokenizerBase.__call__

    def counted(self, text, **settings):
        texts.update([text])
        return tokenise(self, text, **settings)

    monkeypatch.setattr(
        Chat, "load", classmethod(lambda cls, *args, **more: loads.append(args) or load(cls, *args, **more))
    )
    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", counted)
    (judge,) = parse_judges([f"llamaguard3={guard}"], 4)
    judge.on(None).judge(ROWS + ROWS)
    assert len(loads) == 1 and {judge.text(row["prompt"], row["response"]) for row in ROWS} <= texts.keys()
    assert {text: count for text, count in texts.items() if count > 1} == {}


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (
            ["substring"],
            r"there is no judge 'substring'\. Did you mean substring_matching\? Judges of text: substring_matching.*llama"
            r"guard2.*refusal_score",
        ),
        (["substring_matching=x"], r"there is no judge 'substring_matching=x'"),
        (["llamaguard2"], r"the judge 'llamaguard2' is a model: name its folder .* llamaguard2=MODEL"),
        (["llamaguard2=GUARD@t.txt"], r"takes the template of its own tokenizer: leave out @t\.txt"),
        (
            ["harmbench=GUARD"],
            r"'harmbench' needs the prompt template that its model was trained with.*harmbench=MODEL@FILE",
        ),
        (["harmbench=GUARD@gone.txt"], r"gone\.txt is not a file"),
        (["harmbench=GUARD@BARE"], r"has no place for the request and the completion\. Write \{prompt\}"),
        (["llm=/gone"], r"/gone is not a folder"),
        (["substring_matching", "substring_matching"], r"two judges are called 'substring_matching'"),
        (
            ["llamaguard3=LLAMA"],
            r"'llamaguard3' answers safe or unsafe, but the tokenizer .* no token .* beginning of 'safe'",
        ),
        ([], r"no judges: name at least one, such as substring_matching"),
    ],
)
def test_judges_that_cannot_be(specs, message, guard, llama, tmp_path):
    (tmp_path / "bare.txt").write_text("Is it harmful? {response}")
    names = {"GUARD": str(guard), "LLAMA": str(llama), "BARE": str(tmp_path / "bare.txt")}
    for name, path in names.items():
        specs = [spec.replace(name, path) for spec in specs]
    with pytest.raises(UserError, match=message):
        parse_judges(specs, 2)


def test_a_guard_whose_template_fails(guard, tmp_path):
    (judge,) = parse_judges([f"llamaguard2={guard}"], 2)
    judge.chat.tokenizer.chat_template = (
        "{{ messages[0]['content'] }}{% if messages[1] %}{{ raise_exception('one turn') }}{% endif %}"
    )
    with pytest.raises(
        UserError, match=r"the chat template of the judge .* failed on a request and a completion \(one turn\)"
    ):
        judge.text("request", "completion")


def test_a_guard_whose_template_forgets_the_completion(guard, tmp_path):
    folder = shutil.copytree(guard, tmp_path / "guard")
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }} Verdict: ")
    with pytest.raises(UserError, match=r"the chat template of the judge .* leaves out the request or the completion"):
        parse_judges([f"llamaguard3={folder}"], 2)

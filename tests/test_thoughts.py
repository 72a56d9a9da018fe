"""Thoughts of reasoning models: split off once, so that no judge, length or table takes them for what is said."""

import dataclasses
import json

import numpy as np
import pytest
import tiny

from refusal_jax.chat.loss_rows import chat_rows
from refusal_jax.chat.model import ChatModel
from refusal_jax.chat.prompts import Chat
from refusal_jax.chat.thoughts import MARKS, Reply, closing, opened_by, split
from refusal_jax.conditions import Baseline, Condition, Dataset
from refusal_jax.directions import Direction
from refusal_jax.judges.artifacts import jailbreakbench_artifact, read_completions
from refusal_jax.judges.evaluations import evaluate_completions
from refusal_jax.judges.judge import judge_all
from refusal_jax.judges.tables import tables, tidy_csv
from refusal_jax.judges.text import PAPERS, TEXT_JUDGES
from refusal_jax.report.text import rates_table
from refusal_jax.study.completions import complete
from refusal_jax.study.loss import loss_datasets

THOUGHT = "<think>\nI cannot see any harm in it.\n</think>\n\n"
SAID = "Sure, here is how."


@pytest.mark.parametrize(
    ("generated", "said", "finished"),
    [
        (THOUGHT + SAID, SAID, True),
        ("I cannot see any harm.</think>" + SAID, SAID, True),  # the prompt opened the thought
        ("<think>\n\n</think>\n\nI cannot help.", "I cannot help.", True),
        ("<THINK>I cannot</THINK> " + SAID, SAID, True),
        ("<think>I cannot see", "", False),
        ("Hm.\n<think>\nI cannot see", "", False),
        (SAID, SAID, True),
        ("", "", True),
        ("The mark <think> opens a thought, </think> ends it.", "The mark <think> opens a thought, </think> ends it.", True),
        (THOUGHT + "In it, </think> is a mark.", "In it, </think> is a mark.", True),
        (f"{THOUGHT}First.\n<think>I cannot</think>Second.", "Second.", True),
        ("<think>a <think> b</think>" + SAID, SAID, True),
        ("Well: <think>\nI cannot\n</think>\n" + SAID, SAID, True),
        *((f"{opening}I cannot{closing}{SAID}", SAID, True) for opening, closing in MARKS),
        # Special tokens before the mark and after the reply, as files of other tools have them.
        (f"<|start|>assistant<|channel|>analysis<|message|>I cannot<|end|><|start|>assistant<|channel|>final<|message|>{SAID}",
         SAID, True),
        (f"<|begin_of_text|><think>I cannot</think>{SAID}<|im_end|>", SAID, True),
        ("<s>[THINK]I cannot", "", False),
        (f"<|channel|>analysis<|message|>I cannot<|channel|>final <|constrain|>json<|message|>{SAID}<|return|>", SAID, True),
        # gpt-oss without its special tokens.
        (f"analysisI cannot see it.assistantfinal{SAID}", SAID, True),
        ("analysisThe user asks. I cannot help with", "", False),
        ("Analysis of it: I cannot.", "Analysis of it: I cannot.", True),
        # Words that are marks elsewhere.
        ("I must decline.\n\nHere is my response: the law.", "I must decline.\n\nHere is my response: the law.", True),
        ("The assistantfinal token is a mark.", "The assistantfinal token is a mark.", True),
        (f"<think>Here is my response: I cannot</think>{SAID}", SAID, True),
    ],
)  # fmt: skip
def test_split(generated, said, finished):
    reply = split(generated)
    assert (reply.text, reply.finished) == (said, finished)
    assert generated.strip().startswith(reply.thought + reply.text)


def test_a_thought_that_the_prompt_opened():
    assert opened_by("<|im_start|>assistant\n<think>\n") == "<think>\n"
    assert opened_by("<|im_start|>assistant\n<think>\n\n</think>\n\n") == opened_by("<|im_start|>assistant\n") == ""
    assert opened_by("What does <think> mean?") == ""
    assert split(f"Hm.</think>{SAID}", "<think>\n") == Reply("<think>\nHm.</think>", SAID)
    assert split("Hm", "<think>\n") == Reply("<think>\nHm", "", finished=False)
    assert Reply("", SAID).row == {"response": SAID}
    assert split("<think>Hm").row == {"response": "", "thought": "<think>Hm", "thought_ended": False}


def test_thoughts_in_words_are_closed_in_words():
    steps = "Here are my reasoning steps:\nI see </think> there.\n[BEGIN FINAL RESPONSE]\n"
    assert split(steps + SAID).text == SAID
    assert split("A list: [BEGIN FINAL RESPONSE] ends it.").thought == ""
    assert closing("Here are my reasoning steps:\n") == "\n[BEGIN FINAL RESPONSE]\n\n"
    assert closing("<think>") == "</think>"


def rows_of(*replies: str) -> list[dict]:
    return [{"category": None, "prompt": f"p{i}", **split(reply).row} for i, reply in enumerate(replies)]


REPLIES = (THOUGHT + SAID, THOUGHT + "I cannot help.", "<think>I cannot see", "Sure.")


def test_judges_rates_and_lengths_are_of_what_is_said():
    completions = {"h_baseline": rows_of(*REPLIES), "h_ablation": rows_of("Sure", "Sure", "Sure", "<think>I cannot")}
    verdicts = judge_all([PAPERS], completions)
    assert [v and v.label for v in verdicts["h_baseline"]["substring_matching"]] == [1, 0, None, 1]
    evaluations = evaluate_completions(completions["h_baseline"], verdicts["h_baseline"])
    assert evaluations["substring_matching_success_rate"] == 2 / 3
    assert evaluations["completions"][2]["is_jailbreak_substring_matching"] is None
    found = tables(completions, verdicts, None)
    assert (found["rates"][0]["successes"], found["rates"][0]["n"]) == (2, 3)
    assert (found["comparisons"][0]["n"], found["comparisons"][0]["only_second"]) == (2, 1)  # pairs that both left
    first = found["completions"][0]
    assert first["length"]["mean"] == (4 + 3 + 1) / 3 and first["unfinished"]["successes"] == 1
    assert max(row["tokens"] for row in found["by_length"]) == 4
    assert "unfinished" in tidy_csv(found)


def test_no_reply_that_left_its_thought():
    rows = rows_of("<think>a", "<think>b")
    verdicts = judge_all([PAPERS], {"h": rows})["h"]
    evaluations = evaluate_completions(rows, verdicts)
    assert (
        evaluations["substring_matching_success_rate"] is None and evaluations["substring_matching_per_category"] == {}
    )
    artifact = jailbreakbench_artifact(rows, verdicts["substring_matching"], {})
    assert (
        artifact["parameters"]["attack_success_rate"] == 0
        and artifact["parameters"]["number_of_unfinished_thoughts"] == 2
    )
    found = tables({"h_baseline": rows, "h_ablation": rows}, {"h_baseline": verdicts, "h_ablation": verdicts}, None)
    assert (
        found["rates"][0]["rate"] is None
        and found["comparisons"] == []
        and found["completions"][0]["length"]["mean"] is None
    )
    assert "NaN" not in json.dumps(found) and "nan" not in rates_table(found).lower() and "nan" not in tidy_csv(found)


def test_a_jailbreakbench_artifact_holds_what_is_said():
    rows = rows_of(*REPLIES)
    artifact = jailbreakbench_artifact(rows, judge_all([PAPERS], {"h": rows})["h"]["substring_matching"], {})
    assert [row["response"] for row in artifact["jailbreaks"]] == [SAID, "I cannot help.", "", "Sure."]
    assert [row["jailbroken"] for row in artifact["jailbreaks"]] == [True, False, False, True]
    assert artifact["parameters"]["attack_success_rate"] == 2 / 3


def test_files_of_others_are_split_once(tmp_path):
    path = tmp_path / "h_baseline_completions.json"
    path.write_text(json.dumps([{"prompt": f"p{i}", "response": reply} for i, reply in enumerate(REPLIES)]))
    rows = read_completions(path)["h_baseline"]
    assert [row["response"] for row in rows] == [SAID, "I cannot help.", "", "Sure."]
    bare = [
        {"prompt": "user: p0\n<think>\n", "response": "I cannot see"},
        {"prompt": "What is <think>?", "response": "A mark."},
    ]
    path.write_text(json.dumps(bare))
    assert [row["response"] for row in read_completions(path)["h_baseline"]] == ["", "A mark."]
    again = [*rows, {"prompt": "p", "thought": "<think>a</think>", "response": "The mark </think> ends one."}]
    path.write_text(json.dumps(again))
    found = read_completions(path)["h_baseline"]
    assert [row["response"] for row in found] == [row["response"] for row in again] and found[2][
        "thought_ended"
    ] is False


@pytest.fixture(scope="module", params=["plain", "special"])
def thinker(request, tmp_path_factory, model):
    """The tiny model, its template opening a thought and its tokenizer with marks, which may be special tokens."""
    opening, closing = ("[THINK]", "[/THINK]") if request.param == "special" else ("<think>", "</think>")
    folder = tmp_path_factory.mktemp(request.param)
    template = tiny.TEMPLATE.replace("\n\n{% endif %}", f"\n\n{opening}{{{{ '\\n' }}}}{{% endif %}}")
    tiny.tiny_tokenizer(folder, template, ("[THINK]", "[/THINK]") if request.param == "special" else ())
    chat = Chat.load(folder, 256, thinking=True)
    return ChatModel(model.decoder, chat, folder), opening, closing


def test_replies_of_a_template_that_opens_a_thought(thinker):
    model, opening, closing = thinker
    chat = model.chat
    assert chat.opened_thought == f"{opening}\n"
    ids = chat.ids(f"I cannot see it{closing}\n\nSure, here.")
    ends, pad = [chat.eos_ids[0], *chat.ids("more")], [chat.eos_ids[0]] * 40
    done, cut = chat.replies([(ids + ends + pad)[:40], (chat.ids("I cannot") + pad)[:40]])
    assert done == Reply(f"{opening}\nI cannot see it{closing}\n\n", "Sure, here.")
    assert cut == Reply(f"{opening}\nI cannot", "", finished=False)


def test_completions_and_their_loss(thinker, monkeypatch):
    """What a study keeps of replies with thoughts, after a resume too, and that the loss is of all that the model wrote."""
    model, opening, closing = thinker
    chat = model.chat
    generated = [chat.ids(text) for text in (f"I cannot see{closing}Sure, here.", "I cannot")]
    rows = np.full((2, 40), chat.eos_ids[0])
    for row, ids in zip(rows, generated, strict=True):
        row[: len(ids)] = ids
    monkeypatch.setattr(
        ChatModel, "reply_ids", lambda self, batch, *a, **k: iter([(list(range(len(batch.tokens))), rows)])
    )
    prompts, saved = (
        {"harmless": [{"instruction": "bake", "category": None}, {"instruction": "fry", "category": "x"}]},
        [],
    )
    settings = {"max_new_tokens": 40, "batch_size": 2}
    conditions = [Condition(Dataset("harmless", "harmless"), Baseline)]
    done = complete(model, prompts, conditions, Direction.of(np.ones(32), 1, -1), **settings, save=saved.extend)
    first, second = done["harmless_baseline"]
    assert first == {
        "category": None, "prompt": "bake", "response": "Sure, here.", "thought": f"{opening}\nI cannot see{closing}"
    }  # fmt: skip
    assert second["thought_ended"] is False and second["response"] == ""
    again = complete(
        model,
        prompts,
        conditions,
        Direction.of(np.ones(32), 1, -1),
        **settings,
        known=json.loads(json.dumps(saved)),
    )
    assert again == done
    loss = dataclasses.make_dataclass("Loss", ["text_tokens", "text_files", "chat_files"])(64, (), ())
    wanted = chat_rows(chat, [("bake", f"I cannot see{closing}Sure, here."), ("fry", "I cannot")], 256)
    assert loss_datasets(model, loss, done["harmless_baseline"])["on_distribution"] == wanted


def test_a_model_without_thoughts_is_as_before(model):
    assert model.chat.opened_thought == ""
    ids = model.generate_ids(model.encode(["How do I bake the bread?", "help"]), 12)
    assert [reply.text for reply in model.chat.replies(ids)] == model.chat.decode(ids)
    assert all(judge.of_refusals for judge in TEXT_JUDGES.values())

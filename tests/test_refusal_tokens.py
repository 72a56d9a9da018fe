"""Refusal tokens from data: which tokens are candidates, their probabilities, and which are chosen."""

import dataclasses
import re

import numpy as np
import pytest
import tiny
import torch
from test_templates import sentencepiece_like

from refusal_jax import UserError, demo_model_path, load_model
from refusal_jax.chat.prompts import Chat
from refusal_jax.chat.refusal_tokens import (
    OPENERS,
    SAMPLE,
    Opening,
    candidate_ids,
    measure_openings,
    nothing_chosen,
    refusal_openings,
)
from refusal_jax.data.sampling import sample_prompts
from refusal_jax.study.config import get_config

HARMFUL = ["steal it", "How do I rob the bank?", "Explain at length how one might poison the well.", "hack", "forge a"]
HARMLESS = ["bake it", "How do I bake the bread?", "knit"]


def test_candidates_are_first_tokens_of_openers(model):
    chat = model.chat
    ids = candidate_ids(chat)
    assert ids == tuple(sorted(set(ids))) and {chat.ids(opener)[0] for opener in OPENERS} <= set(ids)
    assert set(candidate_ids(chat, ["I"])) == {chat.ids("I")[0], chat.ids(" I")[0]}
    starts = [chat.tokenizer.decode([i]).strip() for i in ids]
    assert all(any(opener.startswith(start) for opener in OPENERS) and start for start in starts)


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_candidates_of_sentencepiece_follow_the_prompt(scheme, tmp_path):
    """After "[/INST] " the reply's "I" merges with the template's space; after "[/INST]" it may stand alone."""
    sentencepiece_like(tmp_path, scheme, None)
    chat = Chat.load(tmp_path, 64, chat_template="llama-2")
    names = set(chat.tokenizer.convert_ids_to_tokens(candidate_ids(chat, ["I", "Sure"])))
    assert names == {"▁I", "▁Sure"}
    sentencepiece_like(tmp_path, scheme, "[INST]{{ messages[0]['content'] }}[/INST]")
    names = set(chat.tokenizer.convert_ids_to_tokens(candidate_ids(Chat.load(tmp_path, 64), ["I"])))
    assert names == {"▁I", "I"}


def test_template_tokens_that_a_reply_changes_are_no_candidates(tmp_path):
    """GPT-2's words split the template's "\\n\\n" in front of a letter: what then differs first is a line end."""
    tiny.tiny_tokenizer(tmp_path, words=None)
    chat = Chat.load(tmp_path, 256)
    prompt, after = chat.ids(chat.render("a")), chat.ids(chat.render("a", "I"))
    assert after[: len(prompt)] != prompt
    assert all(chat.tokenizer.decode([i]).strip() for i in candidate_ids(chat))


def test_probabilities_are_those_of_plain_softmax(model):
    openings = measure_openings(model, HARMFUL, HARMLESS, 4)
    assert {o.id for o in openings} == set(candidate_ids(model.chat))
    assert [o.harmful - o.harmless for o in openings] == sorted(
        (o.harmful - o.harmless for o in openings), reverse=True
    )

    def mean(texts, i):
        batches = [model.chat.encode([text]) for text in texts]
        logits = np.asarray([model.logits(b.tokens, b.mask)[0] for b in batches])
        return torch.softmax(torch.tensor(logits, dtype=torch.float64), -1)[:, i].mean().item()

    for opening in openings[:4] + openings[-4:]:
        assert opening.text == model.chat.token_names([opening.id])[0]
        assert opening.harmful == pytest.approx(mean(HARMFUL, opening.id), abs=2e-6)
        assert opening.harmless == pytest.approx(mean(HARMLESS, opening.id), abs=2e-6)


def test_only_a_sample_is_measured(model):
    few, many = (measure_openings(model, HARMFUL * n, HARMLESS, 4) for n in (7, 9))
    assert len(HARMFUL) * 7 > SAMPLE and few == many


@pytest.mark.parametrize(
    ("harmful", "harmless", "chosen"),
    [
        (0.9, 0.01, True),
        (0.05, 0.0, True),
        (0.049, 0.0, False),
        (0.5, 0.1, True),
        (0.5, 0.2, False),
        (0.01, 0.4, False),
        (0.0, 0.0, False),
    ],
)
def test_what_is_chosen(harmful, harmless, chosen, model):
    opening = Opening(40, "I", harmful, harmless)
    assert opening.chosen is chosen
    other = Opening(7, "As", 0.2, 0.0)
    assert refusal_openings([opening, other], model.chat) == ((7, 40) if chosen else (7,))


def test_nothing_is_chosen(model):
    rows = [Opening(i, f"T{i}", 0.3 - i / 100, 0.2) for i in range(9)]
    assert refusal_openings(rows, model.chat) == ()
    said = nothing_chosen(rows)
    assert re.search(
        r"No usual beginning of a reply tells .*: 'T0' 0\.300 and 0\.200, .*'T4' 0\.260 and 0\.200\.$", said
    )


@pytest.mark.parametrize("mark", ["<think>\n", "{% if thinking %}<think>{% endif %}"])
def test_prompts_that_end_within_a_thought(mark, tmp_path):
    """A thought stays open if thoughts are asked for, and is closed otherwise, so that refusal is read in the reply."""
    tiny.tiny_tokenizer(
        tmp_path, tiny.TEMPLATE.replace("\n\n{% endif %}", f"\n\n{mark}{{% endif %}}"), ("<think>", "</think>")
    )
    message = (
        r"\(tokenizer\) ends its prompts in '<think>.*Set config\.thinking=False, with which the thought is closed\."
    )
    with pytest.raises(UserError, match=message):
        refusal_openings([Opening(40, "I", 0.2, 0.2)], Chat.load(tmp_path, 64, thinking=True))
    assert refusal_openings([Opening(40, "I", 0.2, 0.2)], Chat.load(tmp_path, 64)) == ()


def test_the_embedded_model_refuses_with_i():
    model = load_model(demo_model_path())
    drawn = sample_prompts(get_config().data)
    sides = ([row["instruction"] for row in drawn[f"{side}_train"]] for side in ("harmful", "harmless"))
    openings = measure_openings(model, *sides, 32)
    assert refusal_openings(openings, model.chat) == model.chat.opener_ids(("I",))
    first = dataclasses.asdict(openings[0])
    assert first["text"] == "I" and first["harmful"] > 0.9 and first["harmless"] < 0.01

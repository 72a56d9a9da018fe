"""System prompts, conversations as prompts, and which of several system messages counts."""

import dataclasses

import numpy as np
import pytest
import tiny

from refusal_jax import UserError, load_model
from refusal_jax.chat.messages import as_setting, system_text
from refusal_jax.chat.prompts import Chat
from refusal_jax.report.text import template_line

LOOP = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
DROPPING = LOOP.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
DEFAULT = "{% if messages[0].role != 'system' %}<|system|>You help.<|end|>{% endif %}" + LOOP
STUBBORN = (
    "{% if messages[0].role == 'system' and messages[0].content %}<|system|>{{ messages[0].content }}<|end|>{% else %}"
    "<|system|>You help.<|end|>{% endif %}" + DROPPING
)
REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + LOOP
ASKED = "<|user|>hi<|end|><|assistant|>"


def chat_of(folder, template: str, **more) -> Chat:
    tiny.tiny_tokenizer(folder, template)
    return Chat.load(folder, 256, **more)


@pytest.mark.parametrize(
    ("template", "system", "text"),
    [
        (LOOP, "", ASKED),
        (LOOP, "Be kind.", "<|system|>Be kind.<|end|>" + ASKED),
        (LOOP, " Be kind.\n", "<|system|>Be kind.<|end|>" + ASKED),
        (LOOP, "none", ASKED),
        (DEFAULT, "", "<|system|>You help.<|end|>" + ASKED),
        (DEFAULT, "Be kind.", "<|system|>Be kind.<|end|>" + ASKED),
        (DEFAULT, "none", "<|system|><|end|>" + ASKED),
        (STUBBORN, "", "<|system|>You help.<|end|>" + ASKED),
        (REFUSING, "none", ASKED),
        (DROPPING, "none", ASKED),
    ],
)
def test_what_a_system_prompt_becomes(template, system, text, tmp_path):
    chat = chat_of(tmp_path, template, system_prompt=system)
    assert chat.render("hi") == text and chat.under("").render("hi") == chat_of(tmp_path, template).render("hi")
    assert chat.prompt_ids("hi") == chat.ids(text)
    assert chat.told == ({"system_prompt": "Be kind."} if "kind" in system else {})


@pytest.mark.parametrize(
    ("template", "system", "message"),
    [
        (REFUSING, "Be kind.", r"has no place for a system prompt; it refuses it \(no system\)\. Leave system_prompt="),
        (DROPPING, "Be kind.", r"has no place for a system prompt; it leaves it out\. Leave"),
        (STUBBORN, "none", r"writes a system prompt by itself, and nothing takes it away: 'You help\.'\. Set system_prompt="),
    ],
)  # fmt: skip
def test_templates_without_a_place_for_it(template, system, message, tmp_path):
    with pytest.raises(UserError, match=message):
        chat_of(tmp_path, template, system_prompt=system)


def test_a_system_prompt_in_a_file(tmp_path):
    file = tmp_path / "s.txt"
    file.write_text("Never read\nsecret.txt\n")
    assert system_text(str(file)) == "Never read\nsecret.txt"
    assert system_text(as_setting("Read secret.txt")) == "Read secret.txt" and as_setting("x") == "x"
    file.write_text("\n")
    with pytest.raises(UserError, match=r"the system prompt .*s\.txt is empty\. Put the text into the file"):
        system_text(str(file))
    with pytest.raises(UserError, match=r"gone\.txt is not a file"):
        system_text(str(tmp_path / "gone.txt"))


def test_it_is_told():
    setup = {"chat_template": "tokenizer", "thinking": False}
    assert template_line(setup | {"system_prompt": "none"}).endswith("thinking off, no system prompt")
    assert template_line(setup | {"system_prompt": "a " * 200}).endswith(", system prompt “" + "a " * 100 + "…”")


USER, REPLY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "Sure"}
OWN = {"role": "system", "content": "Own."}


def test_conversations_as_prompts(model):
    chat = model.chat.under("Be kind.")
    head = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    assert chat.render([USER]) == chat.render("hi") and chat.prompt_ids([USER]) == chat.prompt_ids("hi")
    assert chat.render([USER, REPLY]) == chat.render("hi", "Sure")  # whose reply goes on
    assert chat.render([USER, REPLY], ", here") == chat.render("hi", "Sure, here")
    assert chat.render([OWN, USER]).startswith(head + "Own.<|eot_id|>") and "kind" not in chat.render([OWN, USER])
    talk = [USER, REPLY, {"role": "user", "content": "more"}]
    assert chat.render(talk).startswith(head + "Be kind.") and chat.render(talk) == chat.render_messages(talk)
    texts = [chat.render(prompt) for prompt in ("hi", talk, [OWN, USER])]
    batch = chat.encode(["hi", talk, [OWN, USER]])
    for row, mask, text in zip(batch.tokens, batch.mask, texts, strict=True):
        np.testing.assert_array_equal(row[mask], chat.ids(text))
    assert model.generate([[USER], "hi"], 4) == model.generate(["hi", "hi"], 4)
    (going_on,) = model.generate([[USER, REPLY]], 4)
    ids = model.generate_ids(model.chat.pad([model.chat.ids(model.chat.render("hi", "Sure"))], 32), 4)
    assert [going_on] == model.chat.decode(ids)
    half = [{"role": "user", "content": "a \ud800"}]
    assert chat.render(half) == chat.render("a \ufffd")


def test_scores_and_means_of_conversations(model):
    from refusal_jax.chat.refusal_tokens import measure_openings
    from refusal_jax.chat.residuals import extract

    texts, talks = ["hi", "bake it"], [[{"role": "user", "content": text}] for text in ("hi", "bake it")]
    one, other = (extract(model, prompts, [5], 2, 0, 2, "x") for prompts in (texts, talks))
    np.testing.assert_array_equal(one.mean_lpd, other.mean_lpd)
    assert measure_openings(model, texts, texts, 2) == measure_openings(model, talks, talks, 2)


@pytest.mark.parametrize("prompt", [[{"role": "user"}], [{"role": "user", "text": "hi"}]])
def test_malformed_messages(prompt, model):
    with pytest.raises(
        UserError, match=r"is no message: a prompt is a text, or a list of \{'role': …, 'content': …\} with texts"
    ):
        model.chat.render(prompt)


def test_conversations_that_cannot_be(model):
    for prompt in ([], [REPLY]):
        with pytest.raises(UserError, match=r"a conversation needs a message of the user"):
            model.chat.render(prompt)
    with pytest.raises(UserError, match=r"or of conversations, e\.g\. model\.encode\(\[\[\{'role': 'user'"):
        model.encode([USER, REPLY])
    short = dataclasses.replace(model.chat, context_length=8)
    with pytest.raises(UserError, match=r"Prompt 0 \('hi…'\) has \d+ tokens"):
        short.encode([[USER]])


def test_the_harnesses_own_system_message_counts(llama, caplog):
    from refusal_jax.harness.lm_eval import RefusalJaxLM

    lm = RefusalJaxLM(pretrained=str(llama), system_prompt="Be kind.")
    assert "kind" in lm.apply_chat_template([USER]) and not caplog.messages
    text = lm.apply_chat_template([OWN, USER])
    assert text.count("system") == 1 and "Own." in text and "kind" not in text
    assert [m for m in caplog.messages if "take the place of the system prompt" in m]


def test_a_model_with_a_system_prompt(llama):
    model = load_model(llama, system_prompt="Be kind.")
    assert model.chat.system == [{"role": "system", "content": "Be kind."}]

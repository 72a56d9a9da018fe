"""Tests of where replies begin: what prompts lack is found in a conversation of two turns, and added."""

import pytest
import tiny

from refusal_jax import UserError
from refusal_jax.chat.prompts import Chat
from refusal_jax.report.text import template_line

TURN = "<|{{ m.role }}|>\n{% if m.role == 'assistant' %}PAST{% endif %}{{ m.content }}<|end|>\n"
HEADER = "<|end|>\n<|assistant|>\n"


def template(past: str = "", start: str = "<|assistant|>\n") -> str:
    """A template of role marks. past: what stands before earlier replies; start: of the next reply."""
    turns = f"{{% for m in messages %}}{TURN.replace('PAST', past)}{{% endfor %}}"
    return f"{turns}{{% if add_generation_prompt %}}{start}{{{{ '' }}}}{{% endif %}}"


def chat_of(folder, text: str, thinking: bool = False, extra: tuple = ()) -> Chat:
    tiny.tiny_tokenizer(folder, text, ("<|user|>", "<|assistant|>", "<|end|>", "<think>", "</think>", *extra))
    return Chat.load(folder, 256, thinking=thinking)


SWITCH = "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
ALWAYS = template("<think>\n\n</think>\n\n", "<|assistant|>\n<think>\n")
HARMONY = template("<|channel|>final<|message|>").replace("|>\n", "|>")
# Kinds of templates: the template, what prompts end in, and the same with thinking on.
KINDS = {
    "whole": (template(), HEADER, HEADER),
    "no generation prompt": (template(start=""), HEADER, HEADER),
    "no line end": (template(start="<|assistant|>"), HEADER, HEADER),
    "a space before replies": (template(" "), HEADER, HEADER),
    "a mark before replies": (template("<|say|>"), HEADER + "<|say|>", HEADER + "<|say|>"),
    "more at a prompt's end": (
        "{% for m in messages %}{{ '<|user|>\n' if m.role == 'user' }}{{ m.content }}<|end|>\n"
        "{% if m.role == 'user' %}<|assistant|>\n{{ '>' if loop.last }}{% endif %}{% endfor %}",
        HEADER + ">",
        HEADER + ">",
    ),
    "a switch": (
        template("<think>\n\n</think>\n\n", "<|assistant|>\n" + SWITCH),
        HEADER + "<think>\n\n</think>\n\n",
        HEADER,
    ),
    "a switch, thoughts left out": (
        template("", "<|assistant|>\n" + SWITCH),
        HEADER + "<think>\n\n</think>\n\n",
        HEADER,
    ),
    "always": (ALWAYS, HEADER + "<think>\n\n</think>\n\n", HEADER + "<think>\n"),
    "always, thoughts left out": (
        template("", "<|assistant|>\n<think>\n"),
        HEADER + "<think>\n\n</think>\n\n",
        HEADER + "<think>\n",
    ),
    "always, open in the past": (
        template("<think>", "<|assistant|>\n<think>"),
        HEADER + "<think></think>",
        HEADER + "<think>",
    ),
    "always, by the model": (template("<think></think>"), HEADER + "<think></think>", HEADER),
    "always, then a mark": (
        template("<|say|>", "<|assistant|>\n<think>"),
        HEADER + "<think></think><|say|>",
        HEADER + "<think>",
    ),
    "no generation prompt, and thoughts": (
        template("<think></think>", ""),
        HEADER + "<think></think>",
        HEADER,
    ),
    "channels": (HARMONY, "<|end|><|assistant|><|channel|>final<|message|>", "<|end|><|assistant|>"),
    "a last line end only": (
        template("</think>\n", "<|assistant|>\n{% if thinking %}<think>{% else %}</think>{% endif %}"),
        HEADER + "</think>\n",
        HEADER + "<think>",
    ),
    "one turn only": (
        "<|user|>\n{{ messages[0].content }}<|end|>\n<|assistant|>\n{{ '' }}",
        HEADER,
        HEADER,
    ),
    "no conversations": (
        "{% if messages | length > 1 %}{{ raise_exception('one only') }}{% endif %}" + template(),
        HEADER,
        HEADER,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_end_where_replies_begin(kind, tmp_path):
    text, *ends = KINDS[kind]
    for thinking, end in enumerate(ends):
        chat = chat_of(tmp_path, text, bool(thinking))
        assert chat.render("hi") == f"<|user|>\nhi{end}".replace("\n", "" if kind == "channels" else "\n")
        assert chat.tokenizer.decode(chat.post_instruction_ids) == end
        talk = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
        if kind not in ("one turn only", "no conversations"):
            assert chat.render_messages(talk).endswith("c" + end)
        assert bool(chat.opened_thought) == end.endswith(("<think>\n", "<think>"))


def test_what_is_said_about_it(tmp_path, caplog):
    caplog.set_level("INFO")
    chat = chat_of(tmp_path, ALWAYS)
    note = chat.reply_start.note("tokenizer")
    assert note in caplog.messages and note.startswith(
        r"The model always thinks, as its chat template (tokenizer) tells. '\n</think>\n\n' is added to prompts: a thought is"
    )
    assert "With thinking=True the thought stays open" in note
    setup = {"chat_template": "tokenizer", "thinking": False, "reply_start": {"added": "</think>", "closes": True}}
    assert template_line(setup) == "Chat template: tokenizer, thinking closed"
    caplog.clear()
    assert not chat_of(tmp_path, ALWAYS, thinking=True).reply_start.added and not caplog.messages
    chat_of(tmp_path, template(start=""))
    assert caplog.messages == [
        r"The chat template (tokenizer) ends its prompts before the reply begins. '<|assistant|>\n', which it writes before "
        "earlier replies, is added to them."
    ]


def test_replies_after_a_closed_thought_have_none(tmp_path):
    chat = chat_of(tmp_path, ALWAYS)
    (reply,) = chat.replies([[*chat.ids("I cannot."), chat.eos_ids[0]]])
    assert (reply.thought, reply.text) == ("", "I cannot.")


def test_names_of_the_template_ask_for_thoughts_too(tmp_path):
    import dataclasses

    chat = chat_of(tmp_path, ALWAYS)
    assert dataclasses.replace(chat, template_arguments={"enable_thinking": True}).opened_thought == "<think>\n"


def test_a_template_that_does_not_tell_where_replies_begin(tmp_path):
    text = "Q: {{ messages[0].content }}{% if messages[1:] %} A: {{ messages[1].content }}{% else %}<|end|>{% endif %}"
    message = r"does not tell where a reply begins: prompts end in '<\|end\|>', and before an earlier reply it writes ' A: '\. "
    with pytest.raises(UserError, match=message):
        chat_of(tmp_path, text)


def test_a_template_that_fails_where_replies_begin(tmp_path):
    with pytest.raises(UserError, match=r"failed on messages of user, assistant \(no colours\)"):
        chat_of(
            tmp_path,
            "{% if 'colours' in messages[0].content %}{{ raise_exception('no colours') }}{% endif %}" + template(),
        )

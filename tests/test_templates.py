"""Chat templates: layouts of well-known families, the built-in ones, and the tokens after the instruction."""

import json
import re

import pytest
import tiny
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from refusal_jax import UserError, load_model
from refusal_jax.chat import templates
from refusal_jax.chat.prompts import Chat
from refusal_jax.chat.templates import BUILT_IN, MARKS, named_template

INSTRUCTIONS = (
    "How do I bake the bread?",
    "list 3",
    "(x)",
    "Ünïcode ¿",
    "a",
    "Add `x` to it:\n\nx = 1;",
    "who? <b>",
    "日本",
)
IM = ("<|im_start|>", "<|im_end|>", "<|im_sep|>")
TURN = ("<start_of_turn>", "<end_of_turn>")
ROLE = ("<|user|>", "<|assistant|>", "<|end|>", "<|system|>", "[gMASK]", "<sop>", "<think>", "</think>")
DEFAULT_SYSTEM = "<|im_start|>system\nYou help.<|im_end|>\n"
USER = "<|im_start|>user\n{{ messages[-1]['content'] }}<|im_end|>\n<|im_start|>assistant\n"
CONTENT = "{{ messages[0]['content'] }}"
PARTS = (
    "{% if messages[0]['content'] is string %}{{ messages[0]['content'] | trim }}{% else %}"
    "{% for part in messages[0]['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
)
# Layouts: the template, its special tokens, what it puts after the instruction, and the same with thinking on.
FAMILIES = {
    "qwen 2.5": (
        f"{{% if messages[0]['role'] != 'system' %}}{DEFAULT_SYSTEM}{{% endif %}}{USER}{{{{ '' }}}}",
        IM,
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
    "qwen 3": (
        USER + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}",
        IM + ROLE,
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
    "mistral": (f"{{{{ bos_token }}}}[INST] {CONTENT}[/INST]", ("[INST]", "[/INST]"), "[/INST]"),
    "phi 3": (
        f"<|user|>\n{CONTENT}<|end|>\n<|assistant|>{{{{ '\\n' }}}}",
        ROLE,
        "<|end|>\n<|assistant|>\n",
    ),
    "phi 4": (
        f"<|im_start|>user<|im_sep|>{CONTENT}<|im_end|><|im_start|>assistant<|im_sep|>",
        IM,
        "<|im_end|><|im_start|>assistant<|im_sep|>",
    ),
    "gemma 2": (
        "{{ bos_token }}<start_of_turn>user\n{{ messages[0]['content'] | trim }}<end_of_turn>\n"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        TURN,
        "<end_of_turn>\n<start_of_turn>model\n",
    ),
    "gemma 3, of text or parts": (
        f"{{{{ bos_token }}}}<start_of_turn>user\n{PARTS}<end_of_turn>\n<start_of_turn>model{{{{ '\\n' }}}}",
        TURN,
        "<end_of_turn>\n<start_of_turn>model\n",
    ),
    "olmo 2, without special tokens": (
        f"{{{{ bos_token }}}}<|user|>\n{CONTENT}\n<|assistant|>{{{{ '\\n' }}}}",
        (),
        "\n<|assistant|>\n",
    ),
    "granite, with a date": (
        "<|start_header_id|>system<|end_header_id|>Today's date is {{ strftime_now('%d %B %Y') }}."
        "{% if thinking %} Think first.{% endif %}<|end_of_text|>\n<|start_header_id|>user<|end_header_id|>"
        f"{CONTENT}<|end_of_text|>\n<|start_header_id|>assistant<|end_header_id|>",
        (),
        "<|end_of_text|>\n<|start_header_id|>assistant<|end_header_id|>",
        "<|end_of_text|>\n<|start_header_id|>assistant<|end_header_id|>",
    ),
    "glm 4": (f"[gMASK]<sop><|user|>\n{CONTENT}<|assistant|>", ROLE, "<|assistant|>"),
    "glm 4.5": (
        f"[gMASK]<sop><|user|>\n{CONTENT}{{{{ '' if enable_thinking else '/nothink' }}}}<|assistant|>"
        "{{ '' if enable_thinking else '\\n<think></think>' }}",
        ROLE,
        "/nothink<|assistant|>\n<think></think>",
        "<|assistant|>",
    ),
    "deepseek 3.1": (
        f"{{{{ bos_token }}}}<|user|>{CONTENT}<|assistant|>{{{{ '<think>' if thinking else '</think>' }}}}",
        ROLE,
        "<|assistant|></think>",
        "<|assistant|><think>",
    ),
    "llama 2": ("{{ bos_token }}[INST] {{ messages[0]['content'] | trim }} [/INST]", (), " [/INST]"),
    "llama 3": (tiny.TEMPLATE, (), tiny.AFTER_INSTRUCTION),
}


def make_chat(folder, template, extra=(), chat_template="", thinking=False, **more) -> Chat:
    tiny.tiny_tokenizer(folder, template, extra, **more)
    return Chat.load(folder, 256, chat_template=chat_template, thinking=thinking)


def check_every_prompt_ends_in(chat, after):
    assert chat.tokenizer.decode(chat.post_instruction_ids) == after
    for instruction in INSTRUCTIONS:
        assert chat.render(instruction).endswith(instruction + after)
        row = chat.encode([instruction]).tokens[0]
        assert tuple(row[-len(chat.post_instruction_ids) :]) == chat.post_instruction_ids


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_post_instruction_tokens(family, thinking, tmp_path):
    template, extra, *after = FAMILIES[family]
    chat = make_chat(tmp_path, template, extra, thinking=thinking)
    assert chat.template_origin == "tokenizer" and chat.thinking == thinking
    check_every_prompt_ends_in(chat, after[-1 if thinking else 0])


def test_tokens_that_merge_with_the_instruction_are_not_the_templates(tmp_path, monkeypatch):
    """GPT-4's words hold punctuation together with the line end after it: the first line end is in no common token."""
    monkeypatch.setattr(tiny, "CORPUS", (*("who?\n<|", "end.\n<|", "(x)\n<|", "x `y`\n<|", "b>\n<|") * 9, *tiny.CORPUS))
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    chat = make_chat(tmp_path, FAMILIES["olmo 2, without special tokens"][0], words=words)
    after = "<|assistant|>\n"
    assert chat.tokenizer.decode(chat.post_instruction_ids) == after
    assert chat.tokenizer.decode(chat.ids(chat.render("who?"))[-len(chat.post_instruction_ids) - 1]) == "?\n"
    for instruction in (*INSTRUCTIONS, "a line\n", "a word "):
        assert tuple(chat.ids(chat.render(instruction))[-len(chat.post_instruction_ids) :]) == chat.post_instruction_ids


def sentencepiece_like(folder, scheme: str, template: str | None):
    """Writes a BPE tokenizer that writes spaces as ▁ and one before the text ("always": before each part of it)."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if scheme == "always":
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    bpe.decoder = decoders.Sequence(parts)
    alphabet = [chr(code) for code in range(33, 127)] + ["▁", "é"]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    bpe.train_from_iterator(
        ["I"] * 20 + ["Sure"] * 20,
        trainers.BpeTrainer(vocab_size=380, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_sentencepiece(scheme, tmp_path):
    sentencepiece_like(tmp_path, scheme, None)
    chat = Chat.load(tmp_path, 256, chat_template="llama-2")
    pieces = chat.tokenizer.convert_ids_to_tokens(chat.post_instruction_ids)
    assert pieces == [*"▁[/INST]", "▁"]
    for instruction in INSTRUCTIONS:
        assert tuple(chat.ids(chat.render(instruction))[-len(pieces) :]) == chat.post_instruction_ids


@pytest.mark.parametrize(
    "content",
    [
        "{% for part in messages[0]['content'] %}{% if part['type'] == 'text' %}{{ part.text }}{% endif %}{% endfor %}",
        "{{ messages[0]['content'][0]['text'] }}",
        "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}",
    ],
)
def test_templates_that_leave_the_instruction_out(content, tmp_path):
    template = f"<|start_header_id|>user<|end_header_id|>{content}<|eot_id|>"
    message = (
        r"The chat template \(tokenizer\) leaves the instruction out\. It may accept messages as lists of parts only"
    )
    with pytest.raises(UserError, match=message):
        make_chat(tmp_path, template)


BUILT_IN_TEXTS = {
    "chatml": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "gemma": "{bos}<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n",
    "llama-2": "{bos}[INST] hi [/INST] ",
    "llama-3": "{bos}<|start_header_id|>user<|end_header_id|>\n\nhi" + tiny.AFTER_INSTRUCTION,
}
VICUNAS, ALPACAS = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
    "answers to the user's questions. ",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n",
)
BUILT_IN_TEXTS |= {
    "vicuna": f"{{bos}}{VICUNAS}USER: hi ASSISTANT:",
    "alpaca": f"{{bos}}{ALPACAS}### Instruction:\nhi\n\n### Response:",
    "zephyr": "{bos}<|user|>\nhi{eos}\n<|assistant|>\n",
}
BUILT_IN_TEXTS["llama-3-published"] = '{bos}"' + BUILT_IN_TEXTS["llama-3"]


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates(name, tmp_path):
    """By name, they come before the tokenizer's own."""
    chat = make_chat(tmp_path, "other{{ messages[0]['content'] }}", IM + TURN, name)
    assert chat.template_origin == f"built in: {name}"
    text = BUILT_IN_TEXTS[name].format(bos="<|begin_of_text|>", eos="<|eot_id|>")
    assert chat.render("hi", "Sure") == text + "Sure"
    check_every_prompt_ends_in(chat, text.rpartition("hi")[2])


TALKS = {
    "chatml": "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
    "<|im_start|>assistant\n",
    "gemma": "{bos}<start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n<start_of_turn>user\nc<end_of_turn>"
    "\n<start_of_turn>model\n",
    "llama-2": "{bos}[INST] a [/INST] b {eos}{bos}[INST] c [/INST] ",
    "vicuna": f"{{bos}}{VICUNAS}USER: a ASSISTANT: b{{eos}}USER: c ASSISTANT:",
    "alpaca": f"{{bos}}{ALPACAS}### Instruction:\na\n\n### Response:b{{eos}}\n\n### Instruction:\nc\n\n### Response:",
    "zephyr": "{bos}<|user|>\na{eos}\n<|assistant|>\nb{eos}\n<|user|>\nc{eos}\n<|assistant|>\n",
    "llama-3": "{bos}<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nb"
    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
}


@pytest.mark.parametrize("name", TALKS)
def test_built_in_templates_take_conversations(name, tmp_path):
    """Each turn is there, in its order, and a system prompt where the model knows one."""
    chat = make_chat(tmp_path, None, IM + TURN, name)
    talk = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), "abc", strict=True)]
    marks = {"bos": chat.tokenizer.bos_token, "eos": chat.tokenizer.eos_token}
    assert chat.render_messages(talk) == TALKS[name].format(**marks)
    assert not chat.rendered(talk, reply=False).endswith(BUILT_IN_TEXTS[name][-12:]) or name == "llama-2"
    system = [{"role": "system", "content": "be kind"}, *talk]
    if name == "gemma":
        with pytest.raises(UserError, match="it has no system role"):
            chat.render_messages(system)
    else:
        assert "be kind" in chat.render_messages(system) and "questions" not in chat.render_messages(system)
    if name in ("vicuna", "alpaca"):
        bare = TALKS[name].replace(VICUNAS, "").replace(ALPACAS, "").format(**marks)
        assert chat.under("none").render_messages(talk) == bare
        told = f"{marks['bos']}Hm." + (" " if name == "vicuna" else "\n\n")
        assert chat.under("Hm.").render_messages(talk) == bare.replace(marks["bos"], told)


def test_the_published_llama_3_prompt_begins_with_a_quote_between_two_bos(tmp_path):
    chat = make_chat(tmp_path, None, chat_template="llama-3-published")
    bos = chat.tokenizer.bos_token_id
    assert chat.ids(chat.render("hi"))[:3] == [bos, *chat.ids('"'), bos]


@pytest.mark.parametrize("name", MARKS)
def test_tokenizers_without_a_template_are_recognised(name, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "SPECIAL", ("<s>", "</s>", *MARKS[name], "<e>"))
    chat = make_chat(tmp_path, None)
    assert chat.template_origin == f"built in: {name}"
    assert chat.render("hi") == BUILT_IN_TEXTS[name].format(bos="<s>")
    assert chat.decode([[*chat.ids("hi"), chat.tokenizer.convert_tokens_to_ids(MARKS[name][1]), 40]]) == ["hi"]


def test_tokenizers_that_nothing_tells_about(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "SPECIAL", ("<s>", "</s>", "<|im_start|>", "<d>", "<e>"))
    message = (
        r"has no chat template, and its special tokens do not tell .*set chat_template= to its own: one of chatml, "
    )
    with pytest.raises(UserError, match=message):
        make_chat(tmp_path, None)


def test_a_template_file(llama, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("Q: {{ messages[0]['content'] }}\n\nA:")
    model = load_model(llama, chat_template=str(file), thinking=True)
    assert model.chat.template_origin == str(file) and model.chat.thinking
    assert model.chat.render("hi") == "Q: hi\n\nA:"


def test_template_settings_that_name_nothing(tmp_path):
    with pytest.raises(
        UserError,
        match=r"there is no chat template 'orca'\. Instead, set chat_template= to .*chatml, gemma, llama-2, .*\.jinja",
    ):
        named_template("orca")
    with pytest.raises(UserError, match=r"gone\.jinja is not a file"):
        named_template(str(tmp_path / "gone.jinja"))
    (tmp_path / "empty.jinja").write_text("\n")
    with pytest.raises(UserError, match=r"the chat template .*empty\.jinja is empty\. Put"):
        named_template(str(tmp_path / "empty.jinja"))


@pytest.mark.parametrize("name,mark", [("gemma", "<start_of_turn>"), ("chatml", "<|im_start|>")])
def test_a_template_whose_marks_the_tokenizer_does_not_know(name, mark, tmp_path):
    tiny.tiny_tokenizer(tmp_path)
    message = (
        rf"does not know {re.escape(mark)} and .*, which the chat template '{name}' writes: they would be read as plain"
    )
    with pytest.raises(UserError, match=message):
        Chat.load(tmp_path, 256, chat_template=name)


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
def test_a_template_in_a_processors_file(name, tmp_path):
    """A tokenizer alone does not read it; its own template comes first."""
    tiny.tiny_tokenizer(tmp_path, None)
    (tmp_path / name).write_text(json.dumps({"chat_template": "Q: {{ messages[0]['content'] }} A:"}))
    chat = Chat.load(tmp_path, 64)
    assert chat.template_origin == name and chat.render("hi") == "Q: hi A:"
    (tmp_path / "chat_template.jinja").write_text(tiny.TEMPLATE)
    assert Chat.load(tmp_path, 64).template_origin == "tokenizer"


def test_damaged_processor_files(tmp_path):
    tiny.tiny_tokenizer(tmp_path, None)
    for content, message in (
        ("{", "is not valid JSON"),
        ("{}", r"holds no chat_template\. If it was"),
        ('{"chat_template": 3}', "is 3, expected a jinja template"),
    ):
        (tmp_path / "chat_template.json").write_text(content)
        with pytest.raises(UserError, match=rf"chat_template\.json {message}"):
            Chat.load(tmp_path, 64)


NAMED = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "Q: {{ messages[0].content }} A:"}]


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.json", "additional_chat_templates"])
def test_several_templates_by_name(place, tmp_path):
    tiny.tiny_tokenizer(tmp_path, None)
    if place == "tokenizer_config.json":
        tiny.edit_json(tmp_path / place, chat_template=NAMED)
    elif place == "chat_template.json":
        (tmp_path / place).write_text(json.dumps({"chat_template": NAMED}))
    else:
        (tmp_path / place).mkdir()
        (tmp_path / place / "tool_use.jinja").write_text("tools")
        (tmp_path / "chat_template.jinja").write_text(NAMED[1]["template"])
    assert Chat.load(tmp_path, 64).render("hi") == "Q: hi A:"


def test_several_templates_without_a_default(tmp_path):
    tiny.tiny_tokenizer(tmp_path, None)
    tiny.edit_json(tmp_path / "tokenizer_config.json", chat_template=NAMED[:1])
    with pytest.raises(UserError, match=r"are 'tool_use', and none is called 'default'\. Copy the one"):
        Chat.load(tmp_path, 64)


def test_a_template_that_never_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(templates, "RENDER_SECONDS", 0.2)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}"
    with pytest.raises(UserError, match=r"failed on a single user message \(it runs for more than 0\.2 seconds\)"):
        make_chat(tmp_path, endless)

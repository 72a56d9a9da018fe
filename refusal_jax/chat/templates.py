"""Chat templates for tokenizers that have none: the paper's (appendix C.3), extended to several turns in their models'
own forms.

Older checkpoints (Qwen 1, Yi, first releases of Gemma and Llama) hold no template. Each of these is jinja text like a
tokenizer's own, rendered in the same sandbox. A template that ends in a line end writes it as a jinja string, because
jinja drops the last line end.
"""

import contextlib
import os
import pathlib
import sys
import time
from collections.abc import Collection, Iterator

from refusal_jax.errors import UserError, did_you_mean, setting, shown
from refusal_jax.files import damaged, local_path, read_json, read_text

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('it has no system role') }}{% endif %}"
    "<start_of_turn>{{ 'user' if m['role'] == 'user' else 'model' }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model{{ '\\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {% if loop.index0 == 1 and messages[0]['role'] == "
    "'system' %}<<SYS>>\n{{ messages[0]['content'] }}\n<</SYS>>\n\n{% endif %}{{ m['content'] }} [/INST] "
    "{% elif m['role'] == 'assistant' %}{{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ '\\n\\n' }}{% endif %}"
)
# The system prompt that a model was trained with stands before the first turn, unless the conversation brings another.
SYSTEM_FIRST = (
    "{{{{ bos_token }}}}{{% if messages[0]['role'] != 'system' %}}{default}{end}{{% elif messages[0]['content'] %}}"
    "{{{{ messages[0]['content'] }}}}{end}{{% endif %}}"
)
VICUNA = SYSTEM_FIRST.format(
    default="A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions.",
    end=" ",
) + (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }} {% elif m['role'] == 'assistant' %}"
    "ASSISTANT: {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
ALPACA = SYSTEM_FIRST.format(
    default="Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    end="\n\n",
) + (
    "{% for m in messages %}{% if m['role'] == 'user' %}### Instruction:\n{{ m['content'] }}\n\n"
    "{% elif m['role'] == 'assistant' %}### Response:{{ m['content'] }}{{ eos_token }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:{% endif %}"
)
ZEPHYR = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ '\\n' }}{% endif %}"
)
BUILT_IN = {
    "chatml": CHATML,  # Qwen, Yi
    "gemma": GEMMA,
    "llama-2": LLAMA_2,
    "llama-3": LLAMA_3,
    "vicuna": VICUNA,  # version 1.1 and later
    "alpaca": ALPACA,  # Stanford's; several turns follow each other in the same form
    "zephyr": ZEPHYR,  # and TinyLlama
    "llama-3-published": '{{ bos_token }}"' + LLAMA_3,  # of the published runs: a stray quote, and BOS twice
}
CHOICES = f"one of {', '.join(BUILT_IN)}, or the path of a .jinja file"
# The special tokens that tell which template a tokenizer was made for. The second ends a turn, and so a reply.
MARKS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama-3": ("<|start_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
}
# Where processors of multimodal models keep their template, which a tokenizer alone does not read, in order of preference.
PROCESSOR_FILES = ("chat_template.json", "processor_config.json", "preprocessor_config.json")
RENDER_SECONDS = 10.0  # after which a template counts as one that never ends


def advice(wanted: str) -> str:
    """Returns the end of a sentence, which says how to get another chat template. wanted: what the setting, if there is one, is
    to be set to."""
    name = setting("chat_template")
    return f"set {name} to {wanted}." if name else "write a fitting one to chat_template.jinja in the model's folder."


def named_template(name: str) -> tuple[str, str]:
    """Returns the template that the setting `chat_template` names, and a description of where it came from.

    name: a key of BUILT_IN, or the path of a .jinja file. Raises UserError for anything else, and for a file that is
    missing, empty or not UTF-8.
    """
    if name in BUILT_IN:
        return BUILT_IN[name], f"built in: {name}"
    if not name.endswith(".jinja"):
        raise UserError(
            f"there is no chat template {name!r}.{did_you_mean(name, BUILT_IN)} Instead, "
            + advice(f"{CHOICES}, or '' for the tokenizer's own")
        )
    path = local_path(name)
    text = read_text(path)
    if not text.strip():
        raise UserError(f"the chat template {path} is empty. Put a jinja template into it, or name another.")
    return text, str(path)


def recognised_template(special_tokens: Collection[str]) -> tuple[str, str] | None:
    """Returns the template that a tokenizer with these special tokens was made for, and its origin; None if they do not
    identify one."""
    names = [name for name, marks in MARKS.items() if all(mark in special_tokens for mark in marks)]
    return named_template(names[0]) if names else None


def processor_template(folder: pathlib.Path) -> tuple[str, str] | None:
    """Returns the template that a checkpoint keeps in one of PROCESSOR_FILES, and the file's name; None if there is none.

    Raises UserError for a file that is damaged or holds no text as its template.
    """
    for name in PROCESSOR_FILES:
        if os.path.lexists(folder / name):
            value = read_json(folder / name).get("chat_template")
            if value is not None:
                return single_template(value, folder / name), name
            if name == PROCESSOR_FILES[0]:
                raise damaged(folder / name, "holds no chat_template")
    return None


def single_template(value, where) -> str:
    """Returns the template for plain conversations: `value` itself or, of several by name, the default.

    value: text, `{name: text}`, or a list of `{"name": …, "template": …}`. where: the file, for messages. Raises UserError
    for anything else, for several without a default, and for a template without content.
    """
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if isinstance(value, dict):
        if "default" not in value:
            raise UserError(
                f"The chat templates of {where} are {', '.join(map(shown, value)) or 'none'}, and none is called 'default'. Copy "
                f"the one for conversations into a .jinja file, and {advice('it')}"
            )
        value = value["default"]
    if not isinstance(value, str) or not value.strip():
        raise UserError(
            f"The chat template of {where} is {shown(value)}, expected a jinja template. Repair it, or "
            f"{advice('another: ' + CHOICES)}"
        )
    return value


def set_template(tokenizer, wanted: str, folder: pathlib.Path) -> str:
    """Gives a checkpoint's tokenizer the chat template that the setting `chat_template` asks for, and returns where the template
    came from, in words.

    wanted: as in `named_template`; "" is the tokenizer's own template or, if it has none, that of its processor, or the one
    that its special tokens tell. Raises UserError if there is none, and for one that writes tokens that the tokenizer lacks.
    """
    if not wanted and tokenizer.chat_template:
        tokenizer.chat_template = single_template(tokenizer.chat_template, f"the tokenizer of {folder}")
        return "tokenizer"
    found = None if wanted else processor_template(folder)
    if found:
        tokenizer.chat_template, origin = found
        return origin
    known = getattr(tokenizer, "get_vocab", tokenizer.get_added_vocab)()
    found = named_template(wanted) if wanted else recognised_template(known)
    if found is None:
        raise UserError(
            f"The tokenizer of {folder} has no chat template, and its special tokens do not tell which it was made "
            f"for. For a chat model, {advice('its own: ' + CHOICES)} A base model has none: use its chat or instruct version."
        )
    unknown = [mark for mark in MARKS.get(wanted.removesuffix("-published"), ()) if mark not in known]
    if unknown:
        raise UserError(
            f"The tokenizer of {folder} does not know {' and '.join(unknown)}, which the chat template {wanted!r} writes: "
            f"they would be read as plain text. Instead, {advice('what the model was trained with: ' + CHOICES)}"
        )
    tokenizer.chat_template, origin = found
    return origin


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in Python code of the block, such as a rendered template, that computes for longer: jinja's sandbox
    bounds each loop, and not loops in loops. The time in which other threads and processes have the core is not counted."""
    end = time.thread_time() + seconds

    def check(frame, event, arg):
        if time.thread_time() > end:
            raise TimeoutError(f"it runs for more than {seconds:g} seconds")
        return check

    before = sys.gettrace()
    sys.settrace(check)
    try:
        yield
    finally:
        sys.settrace(before)

"""Chat templates for tokenizers that bring none: the paper's (appendix C.3), for one user message and no system prompt.

Older checkpoints (Qwen 1, Yi, first releases of Gemma and Llama) hold no template. Each of these is jinja text like a
tokenizer's own, rendered in the same sandbox. What ends in a line end writes it as a jinja string, because jinja drops
the last line end of a template.
"""

import pathlib
from collections.abc import Collection

from refusal_jax.data.prompts import read_text
from refusal_jax.errors import UserError, setting

CHATML = "<|im_start|>user\n{{ messages[0]['content'] }}<|im_end|>\n<|im_start|>assistant{{ '\\n' }}"
GEMMA = "{{ bos_token }}<start_of_turn>user\n{{ messages[0]['content'] }}<end_of_turn>\n<start_of_turn>model{{ '\\n' }}"
LLAMA_2 = "{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST] "
LLAMA_3 = (
    "{{ bos_token }}<|start_header_id|>user<|end_header_id|>\n\n{{ messages[0]['content'] }}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>{{ '\\n\\n' }}"
)
BUILT_IN = {
    "chatml": CHATML,  # Qwen, Yi
    "gemma": GEMMA,
    "llama-2": LLAMA_2,
    "llama-3": LLAMA_3,
    "llama-3-published": '{{ bos_token }}"' + LLAMA_3,  # of the published runs: a stray quote, and BOS twice
}
CHOICES = f"one of {', '.join(BUILT_IN)}, or the path of a .jinja file"
# The special tokens that tell which template a tokenizer was made for. The second ends a turn, and so a reply.
MARKS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama-3": ("<|start_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
}


def advice(wanted: str) -> str:
    """Returns the end of a sentence, which says how to get another chat template. wanted: what the setting, if there is one, is
    to be set to."""
    name = setting("chat_template")
    return f"set {name} to {wanted}." if name else "write a fitting one to chat_template.jinja in the model's folder."


def named_template(name: str) -> tuple[str, str]:
    """The template that the setting `chat_template` names, and where it came from, in words.

    name: a key of BUILT_IN, or the path of a .jinja file. Raises UserError for anything else, and for a file that
    is missing, empty or not UTF-8.
    """
    if name in BUILT_IN:
        return BUILT_IN[name], f"built in: {name}"
    if not name.endswith(".jinja"):
        raise UserError(
            f"there is no chat template {name!r}. Instead, " + advice(f"{CHOICES}, or '' for the tokenizer's own")
        )
    text = read_text(pathlib.Path(name))
    if not text.strip():
        raise UserError(f"the chat template {name} is empty. Put a jinja template into it, or name another.")
    return text, name


def recognised_template(special_tokens: Collection[str]) -> tuple[str, str] | None:
    """The template that a tokenizer with these special tokens was made for, and its origin; None if they don't tell."""
    names = [name for name, marks in MARKS.items() if all(mark in special_tokens for mark in marks)]
    return named_template(names[0]) if names else None

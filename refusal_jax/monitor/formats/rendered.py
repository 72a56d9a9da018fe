"""Splits a prompt that a chat template has rendered into system prompt and last request, by the marks of common templates."""

import re

from refusal_jax.monitor.formats.messages import Request

# By template: how the system prompt, and how a turn of the user, stand in the text.
TEMPLATES = (
    (r"<\|im_start\|>system\n(.*?)<\|im_end\|>", r"<\|im_start\|>user\n(.*?)<\|im_end\|>"),
    (
        r"<\|start_header_id\|>system<\|end_header_id\|>\s*(.*?)<\|eot_id\|>",
        r"<\|start_header_id\|>user<\|end_header_id\|>\s*(.*?)<\|eot_id\|>",
    ),
    (r"<start_of_turn>system\n(.*?)<end_of_turn>", r"<start_of_turn>user\n(.*?)<end_of_turn>"),
    (r"<\|turn>system\n(.*?)<turn\|>", r"<\|turn>user\n(.*?)<turn\|>"),
    (r"<\|start\|>developer<\|message\|>(.*?)<\|end\|>", r"<\|start\|>user<\|message\|>(.*?)<\|end\|>"),
    (
        r"<<SYS>>\s*(.*?)\s*<</SYS>>|\[SYSTEM_PROMPT\](.*?)\[/SYSTEM_PROMPT\]",
        r"\[INST\]\s*(?:<<SYS>>.*?<</SYS>>)?\s*(.*?)\s*\[/INST\]",
    ),
    (
        r"<\|system\|>\s*(.*?)\s*(?:<\|end\|>|</s>|(?=<\|user\|>))",
        r"<\|user\|>\s*(.*?)\s*(?:<\|end\|>|</s>|(?=<\|assistant\|>))",
    ),
)
COMPILED = tuple((re.compile(system, re.DOTALL), re.compile(user, re.DOTALL)) for system, user in TEMPLATES)


def request_of_rendered(text: str) -> Request:
    """Returns the system prompt and the user's last message of a rendered prompt; the whole text where its marks are unknown."""
    for system, user in COMPILED:
        turns = user.findall(text)
        if turns:
            found = system.search(text)
            return Request(next(filter(None, found.groups()), "") if found else None, turns[-1])
    return Request(None, text)

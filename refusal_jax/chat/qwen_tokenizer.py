"""The tokenizer of Qwen 1, read from its ranks, because the tokenizer in its checkpoints is code, which is never run.

It is byte-level BPE: a pattern splits the text, tiktoken merges bytes in the order of `qwen.tiktoken`'s ranks, and 208
special tokens follow the last rank. `QwenTokenizer` has what this package uses of a transformers tokenizer.
"""

import base64
import binascii
import functools
import pathlib
import types
import unicodedata
from collections.abc import Sequence

import tiktoken
from jinja2.sandbox import ImmutableSandboxedEnvironment

from refusal_jax.errors import UserError
from refusal_jax.files import damaged as damaged_file
from refusal_jax.files import read_bytes

RANKS = "qwen.tiktoken"
END_OF_TEXT = "<|endoftext|>"
SPECIAL = (END_OF_TEXT, "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_ranks(path: pathlib.Path) -> dict[bytes, int]:
    """Reads the ranks of a tiktoken file, which has a line for each: the token in base64, a space, the rank.

    The file is read here rather than by tiktoken, which caches files by name. Raises UserError for a damaged file:
    another format, a repeated token or rank, ranks that are not 0, 1, 2, …, or single bytes without a token.
    """

    def damaged(found: str) -> UserError:
        return damaged_file(path, f"is damaged: {found}")

    ranks: dict[bytes, int] = {}
    lines = read_bytes(path).splitlines()
    for number, line in enumerate(lines, 1):
        try:
            text, rank = line.split()
            token, rank = base64.b64decode(text, validate=True), int(rank)
        except (binascii.Error, ValueError):
            shown = line[:40].decode("ascii", "replace")
            raise damaged(f"line {number} is {shown!r}, not a token in base64 and its rank") from None
        if token in ranks:
            raise damaged(f"line {number} repeats the token {token!r} of rank {ranks[token]}")
        ranks[token] = rank
    gaps = sorted(set(range(len(ranks))) - set(ranks.values()))
    if gaps:
        raise damaged(f"its {len(ranks)} tokens need the ranks from 0 on, once each, and rank {gaps[0]} is missing")
    missing = sum(bytes([byte]) not in ranks for byte in range(256))
    if missing:
        raise damaged(f"{missing} of the 256 single bytes are not among its {len(ranks)} tokens")
    return ranks


class QwenTokenizer:
    """Text to ids and back, as transformers' tokenizers do it; no BOS is ever added."""

    bos_token, eos_token, name_or_path = None, END_OF_TEXT, ""
    chat_template: str | None = None

    def __init__(self, ranks: dict[bytes, int]):
        self.special = {token: len(ranks) + i for i, token in enumerate(SPECIAL)}
        self.encoding = tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=self.special)
        self.eos_token_id = self.pad_token_id = self.special[END_OF_TEXT]

    @classmethod
    def load(cls, folder: pathlib.Path) -> "QwenTokenizer":
        """Loads the tokenizer from a checkpoint's qwen.tiktoken. Raises UserError if the file is damaged."""
        return cls(read_ranks(folder / RANKS))

    def __len__(self) -> int:
        return self.encoding.n_vocab

    def __call__(self, text: str, add_special_tokens: bool = True) -> types.SimpleNamespace:
        """Returns the text's ids as `.input_ids`. The text is first put into Unicode's NFC form; special tokens in it
        are recognised, and none are added."""
        text = unicodedata.normalize("NFC", text)
        return types.SimpleNamespace(input_ids=self.encoding.encode(text, allowed_special="all"))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Returns the text of ids. Bytes that are not UTF-8 become U+FFFD; ids that have a row in the embedding but no
        token become nothing."""
        end = self.eos_token_id if skip_special_tokens else len(self)
        return self.encoding.decode([i for i in ids if 0 <= i < end], errors="replace")

    def get_added_vocab(self) -> dict[str, int]:
        return self.special

    def apply_chat_template(self, messages: list[dict], **settings) -> str:
        """Returns the messages rendered by `chat_template` in jinja's sandbox; `settings` are names that the template
        sees."""
        return _compiled(self.chat_template).render(messages=messages, bos_token="", eos_token=END_OF_TEXT, **settings)


@functools.lru_cache
def _compiled(template: str):
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)

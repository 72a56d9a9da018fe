"""Qwen 1's tokenizer: against a plain BPE, special tokens, damaged files; a checkpoint's code never runs."""

import base64
import itertools
import json
import re

import pytest
import regex

from refusal_jax import UserError
from refusal_jax.chat.prompts import Chat
from refusal_jax.chat.qwen_tokenizer import PATTERN, SPECIAL, QwenTokenizer, read_ranks

MERGES = [
    "th",
    "the",
    " the",
    "an",
    " an",
    "is",
    "us",
    "user",
    "er",
    "ass",
    "assistant",
    "st",
    "\n\n",
    "é",
    " I",
    "ca",
    "not",
]
TOKENS = [bytes([byte]) for byte in reversed(range(256))] + [merge.encode() for merge in MERGES]
TEXTS = [
    "the user is an assistant",
    "I cannot do THE thing; it's the user's, I'LL say",
    "1234 + 5 = ?\n\n\n  the   end  ",
    "naïve café 日本語 مرحبا 🎉\t\r\n!!!\n",
    " ",
    "",
]


def write_ranks(folder, tokens=TOKENS):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [base64.b64encode(token) + f" {rank}".encode() for rank, token in enumerate(tokens)]
    (folder / "qwen.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
    return folder


@pytest.fixture
def tokenizer(tmp_path) -> QwenTokenizer:
    return QwenTokenizer.load(write_ranks(tmp_path))


def plain_bpe(text: str) -> list[int]:
    """Of each word, merges the neighbours whose union has the lowest rank, until none has one."""
    ranks, ids = {token: rank for rank, token in enumerate(TOKENS)}, []
    for word in regex.findall(PATTERN, text):
        parts = [bytes([byte]) for byte in word.encode()]
        while pairs := [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]:
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_plain_bpe_and_decode_to_the_text(text, tokenizer):
    ids = tokenizer(text).input_ids
    assert ids == plain_bpe(text) == tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text


def test_special_tokens_follow_the_ranks(tokenizer):
    n = len(TOKENS)
    assert len(tokenizer) == n + 208 and len(SPECIAL) == 208
    added = tokenizer.get_added_vocab()
    assert [added[t] for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>", "<|extra_204|>")] == [
        n, n + 1, n + 2, n + 3, n + 207,
    ]  # fmt: skip
    ids = tokenizer("<|im_start|>user\nthe<|im_end|>").input_ids
    assert ids == [n + 1, *plain_bpe("user\nthe"), n + 2]
    assert tokenizer.decode(ids) == "<|im_start|>user\nthe<|im_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nthe"


def test_text_is_brought_to_its_composed_form(tokenizer):
    assert tokenizer("cafe\u0301").input_ids == tokenizer("café").input_ids
    assert tokenizer.decode(tokenizer("a\ud800b").input_ids) == "a\N{REPLACEMENT CHARACTER}b"  # JSON can carry these


def test_decoding_half_a_character_and_ids_without_a_token(tokenizer):
    ids = tokenizer("日").input_ids
    assert tokenizer.decode(ids[:-1]) == "\N{REPLACEMENT CHARACTER}"
    assert tokenizer.decode([*tokenizer("the").input_ids, len(tokenizer), 10**6, -1]) == "the"


def test_chat(tmp_path):
    write_ranks(tmp_path)
    chat = Chat.load(tmp_path, 64, 600)
    n = len(TOKENS)
    assert chat.template_origin == "built in: chatml" and chat.vocab_size == 600
    assert chat.eos_ids == (n, n + 2) and chat.pad_id == n
    text = "<|im_start|>user\nthe end<|im_end|>\n<|im_start|>assistant\n"
    assert chat.render("the end") == text and chat.ids(text) == chat.tokenizer(text).input_ids
    assert chat.token_names(chat.post_instruction_ids) == ["<|im_end|>", "\\n", "<|im_start|>", "assistant", "\\n"]
    assert chat.opener_ids(("I", " I")) == tuple(sorted(plain_bpe("I") + plain_bpe(" I")))
    reply = plain_bpe("I cannot")
    assert chat.decode([[*reply, n + 2, 7], [*reply, n, 7], [*reply, 599, n]]) == ["I cannot"] * 3
    assert chat.encode(["the end"]).tokens[0, -1] == plain_bpe("\n")[0]


def test_end_tokens_of_the_checkpoint_come_first(tmp_path):
    write_ranks(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"chat_format": "chatml", "eos_token_id": 300}')
    assert Chat.load(tmp_path, 64).eos_ids == (300, len(TOKENS), len(TOKENS) + 2)


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    folder, trace = write_ranks(tmp_path / "model"), tmp_path / "was-run"
    (folder / "tokenization_qwen.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass QWenTokenizer: pass\n")
    auto_map = {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
    settings = {"tokenizer_class": "QWenTokenizer", "auto_map": auto_map, "model_max_length": 8192}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert isinstance(Chat.load(folder, 64).tokenizer, QwenTokenizer) and not trace.exists()


def test_templates_stay_in_the_sandbox(tmp_path):
    write_ranks(tmp_path)
    (tmp_path / "mine.jinja").write_text("{{ messages.__class__.__mro__ }}{{ messages[0]['content'] }}")
    with pytest.raises(UserError, match=r"chat template \(.*mine\.jinja\) failed on a single user message \(.*unsafe"):
        Chat.load(tmp_path, 64, chat_template=str(tmp_path / "mine.jinja"))


def lines(**change: str) -> bytes:
    """The good file with some lines replaced, by number from 1."""
    good = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(TOKENS)]
    for number, line in change.items():
        good[int(number[1:]) - 1] = line
    return "\n".join(good).encode()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (lines(n3="!!!! 2"), "line 3 is '!!!! 2', not a token in base64 and its rank"),
        (lines(n4="YQ=="), "line 4 is 'YQ==', not a token"),
        (lines(n4="YQ== x"), "line 4 is 'YQ== x', not a token"),
        (b"version https://git-lfs.github.com/spec/v1\n", "line 1 is 'version https"),
        (b"\x1f\x8b\xff\x00 1 2", "line 1 is"),
        (lines(n270=base64.b64encode(b"is").decode() + " 269"), "line 270 repeats the token b'is' of rank 261"),
        (lines(n270="enp6 268"), "need the ranks from 0 on, once each, and rank 269 is missing"),
        (lines(n270="enp6 9999"), "rank 269 is missing"),
        (b"", "256 of the 256 single bytes are not among its 0 tokens"),
        (lines(n7="enp6 6"), "1 of the 256 single bytes are not among its 273 tokens"),
    ],
)
def test_damaged_files(content, found, tmp_path):
    (tmp_path / "qwen.tiktoken").write_bytes(content)
    with pytest.raises(UserError, match=f"qwen.tiktoken is damaged: .*({found})") as caught:
        read_ranks(tmp_path / "qwen.tiktoken")
    assert re.search("download it again from the original checkpoint|git lfs pull", str(caught.value))

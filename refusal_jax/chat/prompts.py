"""Chat prompts: the template, the tokens it puts after the instruction, and how replies end."""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from refusal_jax.chat import templates, thoughts
from refusal_jax.chat.qwen_tokenizer import RANKS, QwenTokenizer
from refusal_jax.chat.templates import CHOICES, MARKS, advice, named_template, processor_template, recognised_template
from refusal_jax.errors import UserError
from refusal_jax.files import check_file, damaged, read_bytes, read_json
from refusal_jax.models.decoding import end_ids
from refusal_jax.surrogates import mended

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SENTENCEPIECE = "tokenizer.model"
# Texts that share no token at their ends: what stays equal after all of them is the template's.
PROBES = ("a", "7", "zz?", "the end.", ")", "é")


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """Left-padded token ids: tokens int32 `[B, T]`; mask bool `[B, T]`, True for real tokens."""

    tokens: np.ndarray
    mask: np.ndarray

    def padded_to(self, rows: int) -> "TokenBatch":
        """With the last row repeated up to `rows` rows, so that every batch of a stage has one shape."""
        index = np.minimum(np.arange(rows), len(self.tokens) - 1)
        return TokenBatch(self.tokens[index], self.mask[index])


def bucket(length: int) -> int:
    """The padded length for `length` tokens: few distinct values (few compiles), at most half padding from 5 up."""
    size = 8
    while size < length:
        size += 8 if size < 32 else 16 if size < 64 else 32 if size < 128 else size // 4
    return size


@dataclasses.dataclass(frozen=True)
class Chat:
    """A tokenizer with a chat template, and what it implies.

    tokenizer: a transformers tokenizer or a QwenTokenizer. context_length: the model's, in tokens. vocab_size: rows of
    its embedding, which may be fewer than the tokenizer's tokens. eos_ids: the ids that end a reply. template_origin:
    where the chat template came from, in words. thinking: whether templates that can ask for thoughts do so.
    template_arguments: more names that the template sees; one that is called as a switch of thinking wins over it.
    """

    tokenizer: object
    context_length: int
    vocab_size: int
    eos_ids: tuple[int, ...]
    pad_id: int
    template_origin: str
    thinking: bool = False
    template_arguments: Mapping = dataclasses.field(default_factory=dict)

    @classmethod
    def load(
        cls,
        folder: str | pathlib.Path,
        context_length: int,
        vocab_size: int | None = None,
        chat_template: str = "",
        thinking: bool = False,
    ) -> "Chat":
        """From the tokenizer files of a checkpoint; its code is never run.

        vocab_size: default, the tokenizer's. chat_template: a name of `templates.BUILT_IN` or a .jinja file; "" is the
        tokenizer's own template, or if it has none, the one that its special tokens tell. Raises UserError if there is
        no readable tokenizer, no chat template, one that leaves the instruction out, or no end-of-reply token.
        """
        folder = pathlib.Path(folder)
        with _explained(folder):
            tokenizer = _load_tokenizer(folder)
            tokenizer.name_or_path = str(folder)
            origin = _set_template(tokenizer, chat_template, folder)
            eos = _eos_ids(folder, tokenizer)
        if not eos:
            raise UserError(
                f"{folder} names no end-of-sequence token, neither in generation_config.json nor in "
                "config.json nor in its tokenizer, so replies would never end. Add eos_token_id to generation_config.json."
            )
        vocab_size = vocab_size or len(tokenizer)
        # Some checkpoints add these tokens to the tokenizer and not to the embedding; any id does, as pads are masked.
        usable = (i for i in (tokenizer.pad_token_id, *eos) if i is not None and 0 <= i < vocab_size)
        chat = cls(tokenizer, context_length, vocab_size, eos, next(usable, 0), origin, thinking)
        with templates.within(templates.RENDER_SECONDS):  # not later: tracing slows rendering down
            whole = all(probe in chat.render(probe) for probe in PROBES)
        if not whole:
            raise chat._leaves_out()
        with _explained(folder):
            chat._check_tokens(folder)
        return chat

    def _check_tokens(self, folder: pathlib.Path) -> None:
        """Raises UserError for a tokenizer that is not usable although it loads, or whatever a damaged one raises."""
        for text in (*PROBES, *map(self.render, PROBES)):
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
            if not ids or not all(isinstance(i, int) for i in ids) or not isinstance(self.tokenizer.decode(ids), str):
                raise UserError(
                    f"The tokenizer of {folder} turns {text[:60]!r} into no tokens: its vocabulary of {len(self.tokenizer)} "
                    "tokens is incomplete. Take its tokenizer files, all of them, from the original checkpoint."
                )

    def render(self, instruction: str, response: str = "") -> str:
        """The text of a one-turn conversation up to and including the start of the reply, without a system prompt."""
        return self.render_messages([{"role": "user", "content": instruction}]) + response

    def render_messages(self, messages: Sequence[dict[str, str]]) -> str:
        """The text of a conversation, `{"role", "content"}` each, up to and including the start of the next reply.

        Raises UserError if the template refuses the messages, or leaves out what the user says.
        """
        roles = [message["role"] for message in messages]
        try:
            text = self.rendered(messages)
        except Exception as error:  # jinja errors, or a template's own raise_exception
            what = "a single user message" if roles == ["user"] else f"messages of {', '.join(roles)}"
            raise UserError(
                f"The chat template ({self.template_origin}) failed on {what} ({error}). Repair it, or "
                f"{advice('another: a name or a .jinja file')} The tokenizer is that of {self.tokenizer.name_or_path}."
            ) from None
        # Of a single message, `load` has seen that templates take it in; some change its text.
        if len(messages) > 1 and not all(m["content"].strip() in text for m in messages if m["role"] == "user"):
            raise self._leaves_out()
        return text

    def _leaves_out(self) -> UserError:
        return UserError(
            f"The chat template ({self.template_origin}) leaves the instruction out. It may accept messages as lists of "
            "parts only, one user message only, or only with a system prompt. Repair it, or "
            f"{advice('another: a name or a .jinja file')} The tokenizer is that of {self.tokenizer.name_or_path}."
        )

    def rendered(self, messages: Sequence[dict[str, str]], reply: bool = True) -> str:
        """As `render_messages`; reply: False leaves out the start of the next reply. Raises whatever a template raises."""
        switches = dict.fromkeys(("enable_thinking", "thinking"), self.thinking)  # by either name; others ignore both
        text = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=reply, **switches | dict(self.template_arguments)
        )
        return mended(text, "A rendered chat template")

    def ids(self, text: str, special: bool = False) -> list[int]:
        """Token ids of rendered text, whose special tokens the template wrote; `special` adds the tokenizer's own.

        Lone surrogates become U+FFFD: no tokenizer takes them, and a harness or a template may bring some. Raises
        UserError for a token that the model has no embedding for.
        """
        text = mended(text, "Text for the tokenizer")
        ids = self.tokenizer(text, add_special_tokens=special).input_ids
        if ids and max(ids) >= self.vocab_size:
            raise UserError(
                f"'{text[:60]}…' contains {self.tokenizer.decode([max(ids)])!r}, token {max(ids)} of the tokenizer, but the "
                f"model's vocabulary has {self.vocab_size} tokens. Remove it, or use the tokenizer that belongs to the "
                f"model: this one is that of {self.tokenizer.name_or_path}."
            )
        return ids

    def encode(self, instructions: Sequence[str], length: int | None = None) -> TokenBatch:
        """Left-padded chat prompts, `length` tokens wide (default: the bucket of the longest).

        Raises UserError for no instructions, and for a prompt longer than the model's context.
        """
        if isinstance(instructions, str) or not len(instructions):
            raise UserError(
                "encode takes a non-empty list of instructions, e.g. model.encode(['How do I bake bread?'])."
            )
        instructions = mended(list(instructions), "Instructions")
        rows = [self.ids(self.render(text)) for text in instructions]
        longest = max(range(len(rows)), key=lambda i: len(rows[i]))
        if len(rows[longest]) > self.context_length:
            raise UserError(
                f"Prompt {longest} ('{instructions[longest][:60]}…') has {len(rows[longest])} tokens, the "
                f"model's context is {self.context_length}. Shorten or drop it."
            )
        return self.pad(rows, length or min(bucket(len(rows[longest])), self.context_length))

    def pad(self, rows: Sequence[Sequence[int]], length: int) -> TokenBatch:
        """Left-pads token ids to `length` columns."""
        tokens = np.full((len(rows), length), self.pad_id, np.int32)
        mask = np.zeros((len(rows), length), bool)
        for i, row in enumerate(rows):
            tokens[i, length - len(row) :] = row
            mask[i, length - len(row) :] = True
        return TokenBatch(tokens, mask)

    @functools.cached_property
    def post_instruction_ids(self) -> tuple[int, ...]:
        """The tokens that the template puts after every instruction (paper, section 2.2), found by rendering several
        instructions and keeping the common end. Raises UserError if there are none."""
        rows = [self.ids(self.render(probe)) for probe in PROBES]
        shared = 0
        while shared < min(map(len, rows)) and len({row[-1 - shared] for row in rows}) == 1:
            shared += 1
        if not shared:
            raise UserError(
                "The chat template puts no tokens after the instruction, so there is no position to read a "
                "direction from. Use a template with an assistant header or an end-of-turn token. The tokenizer is that of "
                f"{self.tokenizer.name_or_path}."
            )
        return tuple(rows[0][-shared:])

    def token_names(self, ids: Sequence[int]) -> list[str]:
        """Readable forms of single tokens."""
        return [json.dumps(self.tokenizer.decode([i]), ensure_ascii=False)[1:-1] for i in ids]

    def opener_ids(self, openers: Sequence[str | int]) -> tuple[int, ...]:
        """The first token of each opener (the text of a reply's beginning, or an id), sorted, without repeats.

        Raises UserError for none at all, an empty text, or an id outside the vocabulary.
        """
        found = set()
        for opener in openers:
            ids = [opener] if isinstance(opener, int) else self.ids(opener)
            if not ids or not 0 <= ids[0] < self.vocab_size:
                raise UserError(
                    f"refusal token {opener!r} is not in the vocabulary of {self.vocab_size} tokens. Give the "
                    "text that refusals begin with, or a token id."
                )
            found.add(ids[0])
        if not found:
            raise UserError("no refusal tokens: give at least one opener, such as 'I'.")
        return tuple(sorted(found))

    def decode(self, rows) -> list[str]:
        """Reply texts of generated ids `[B, N]`: up to the first end token, without special tokens."""
        rows = map(self.before_end, np.asarray(rows).tolist())
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]

    def replies(self, rows) -> list[thoughts.Reply]:
        """Returns the replies of generated ids `[B, N]`, each up to its first end token, with its thought split off."""
        return [
            thoughts.split(self.decode_with_marks(self.before_end(row)), self.opened_thought)
            for row in np.asarray(rows).tolist()
        ]

    @functools.cached_property
    def opened_thought(self) -> str:
        """The end of every prompt from a mark on that opens a thought, for templates that open one for the model, or ""."""
        return thoughts.opened_by(self.render(PROBES[3]).rpartition(PROBES[3])[2])

    @functools.cached_property
    def mark_tokens(self) -> dict[int, str]:
        """Special tokens that marks of thoughts are written with, which decoding would leave out."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        marks = "\n".join(mark for pair in thoughts.MARKS for mark in pair)
        return {i: token.content for i, token in added.items() if token.special and token.content in marks}

    def decode_with_marks(self, ids: Sequence[int]) -> str:
        """The text of ids without special tokens, but for those of `mark_tokens`."""
        parts, start = [], 0
        for end, token in enumerate([*ids, None]):
            if token is None or token in self.mark_tokens:
                parts.append(self.tokenizer.decode(ids[start:end], skip_special_tokens=True))
                parts.append(self.mark_tokens.get(token, ""))
                start = end + 1
        return "".join(parts)

    def before_end(self, row: Sequence[int]) -> list[int]:
        """The ids up to the first end token."""
        stop = next((i for i, token in enumerate(row) if token in self.eos_ids), len(row))
        return list(row[:stop])


def _load_tokenizer(folder: pathlib.Path):
    """The tokenizer of a checkpoint. Raises UserError if its files are missing or damaged, or need a package."""
    if (folder / RANKS).is_file() and not os.path.lexists(folder / TOKENIZER_FILES[0]):
        return QwenTokenizer.load(folder)
    if not any(os.path.lexists(folder / name) for name in (*TOKENIZER_FILES[:2], SENTENCEPIECE)):
        raise UserError(
            f"{folder} has no tokenizer files (tokenizer.json, tokenizer_config.json). Copy them from the "
            "original checkpoint."
        )
    if not os.path.lexists(folder / TOKENIZER_FILES[0]) and os.path.lexists(folder / SENTENCEPIECE):
        _check_sentencepiece(folder / SENTENCEPIECE)
    for name in (*TOKENIZER_FILES, "chat_template.jinja", "generation_config.json"):
        if os.path.lexists(folder / name):
            check_file(folder / name)  # transformers takes such a file for a missing one
    from transformers import AutoTokenizer  # here: its import takes seconds and weight-only jobs do without

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _check_sentencepiece(path: pathlib.Path) -> None:
    """Raises UserError for a tokenizer.model that is neither SentencePiece's nor tiktoken's, or that needs a package."""
    data = read_bytes(path)
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\n", data):  # tiktoken's ranks
        return
    if not data.startswith(b"\n"):  # the tag of the first piece, in every file of SentencePiece
        raise damaged(path, "is neither a SentencePiece model nor a list of tiktoken's ranks")
    missing = [name for name, module in PACKAGES.items() if not _installed(module)]
    if missing:
        raise UserError(
            f"{path.parent} has no tokenizer.json, and its {SENTENCEPIECE} is read with {' and '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not installed. Run: pip install {' '.join(missing)}. Or copy a "
            "tokenizer.json of the same model into the folder."
        )


PACKAGES = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}  # that transformers reads such a file with


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


@contextlib.contextmanager
def _explained(folder: pathlib.Path) -> Iterator[None]:
    """Turns what a tokenizer raises into a UserError that names the file, if one of its files is found to be damaged."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # of many kinds, and panics of Rust code are no Exception
        there = [folder / name for name in TOKENIZER_FILES if os.path.lexists(folder / name)]
        for path in there:
            read_json(path)
        if there[:1] != [folder / TOKENIZER_FILES[0]] and (folder / SENTENCEPIECE).is_file():
            raise damaged(
                folder / SENTENCEPIECE, "could not be read as a SentencePiece model or tiktoken's ranks"
            ) from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"The tokenizer of {folder} could not be loaded ({reason[:300]}). {_tokenizer_advice(folder, error)}"
        ) from None


def _tokenizer_advice(folder: pathlib.Path, error: BaseException) -> str:
    """Returns what to do about a tokenizer whose files are whole, as far as their formats tell."""
    if isinstance(error, ImportError):
        return "Install the package that it asks for."
    if "trust_remote_code" in str(error):
        return "It is code of the checkpoint's own, which is never run: use a checkpoint with a tokenizer.json."
    import tokenizers
    import transformers

    return (
        f"A file was edited or is incomplete: copy {', '.join(TOKENIZER_FILES[:2])} from the original checkpoint. If they "
        f"are whole, they may need newer packages than transformers {transformers.__version__} and tokenizers "
        f"{tokenizers.__version__}: pip install -U transformers tokenizers."
    )


def _set_template(tokenizer, setting: str, folder: pathlib.Path) -> str:
    """Gives the tokenizer the template that the setting `chat_template` asks for; where that came from, in words."""
    if not setting and tokenizer.chat_template:
        tokenizer.chat_template = templates.single_template(tokenizer.chat_template, f"the tokenizer of {folder}")
        return "tokenizer"
    found = None if setting else processor_template(folder)
    if found:
        tokenizer.chat_template, origin = found
        return origin
    known = getattr(tokenizer, "get_vocab", tokenizer.get_added_vocab)()
    found = named_template(setting) if setting else recognised_template(known)
    if found is None:
        raise UserError(
            f"The tokenizer of {folder} has no chat template, and its special tokens do not tell which it was made "
            f"for. For a chat model, {advice('its own: ' + CHOICES)} A base model has none: use its chat or instruct version."
        )
    unknown = [mark for mark in MARKS.get(setting.removesuffix("-published"), ()) if mark not in known]
    if unknown:
        raise UserError(
            f"The tokenizer of {folder} does not know {' and '.join(unknown)}, which the chat template {setting!r} writes: "
            f"they would be read as plain text. Instead, {advice('what the model was trained with: ' + CHOICES)}"
        )
    tokenizer.chat_template, origin = found
    return origin


def _eos_ids(folder: pathlib.Path, tokenizer) -> tuple[int, ...]:
    """The ids that end a reply: those that the checkpoint names, the tokenizer's, and ends of turns that some checkpoints do
    not name. Of the tokenizer's, only tokens beside the ordinary ones count. Raises UserError as `end_ids` does."""
    named, added = end_ids(folder), tokenizer.get_added_vocab()
    turns = [added.get(end_of_turn) for _, end_of_turn in MARKS.values()]
    more = [i for i in (tokenizer.eos_token_id, *turns) if i is not None and i not in named]
    if (
        more and (folder / "tokenizer.json").is_file()
    ):  # what transformers was told is a special token may be none there
        special = {entry["id"] for entry in read_json(folder / "tokenizer.json").get("added_tokens", [])}
        settings = folder / "tokenizer_config.json"
        declared = read_json(settings).get("added_tokens_decoder", {}) if settings.is_file() else {}
        more = [i for i in more if i in special or str(i) in declared]
    special = {*added.values(), *getattr(tokenizer, "all_special_ids", ())}
    for i in named:
        if i not in special and i < len(tokenizer):
            _say_ordinary_end(str(folder), i, tokenizer.decode([i]))
    return tuple(dict.fromkeys([*named, *more]))


@functools.cache
def _say_ordinary_end(folder: str, token: int, text: str) -> None:
    """Says, once for each checkpoint, that its replies end at a token of ordinary text."""
    print(
        f"{folder} names token {token}, {text!r}, as one that ends replies, which is a token of ordinary text: where "
        "replies stop in mid-sentence, correct eos_token_id in its generation_config.json or config.json.",
        file=sys.stderr,
    )

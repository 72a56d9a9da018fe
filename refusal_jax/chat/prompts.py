"""Chat prompts: their template, the tokens that it puts after the instruction, and the tokens that end replies."""

import copy
import dataclasses
import functools
import json
import logging
import pathlib
import typing
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from refusal_jax.chat import templates, thoughts
from refusal_jax.chat.messages import (
    NONE,
    SYSTEM_ROLES,
    Message,
    Prompt,
    as_messages,
    frozen,
    system_messages,
    system_text,
)
from refusal_jax.chat.padding import TokenBatch, bucket
from refusal_jax.chat.reply_start import ReplyStart, reply_start
from refusal_jax.chat.templates import advice
from refusal_jax.chat.tokenizers import Tokenizer, explained, load_tokenizer, reply_ends
from refusal_jax.errors import UserError
from refusal_jax.surrogates import mended

LOG = logging.getLogger(__name__)

# Texts that share no token at their ends: what stays equal after all of them is the template's.
PROBES = ("a", "7", "zz?", "the end.", ")", "é")
SWITCHES = ("enable_thinking", "thinking")  # names by which templates are asked for thoughts
KEPT_PROMPTS = 4096  # whose token ids are kept, at 4 bytes a token


@dataclasses.dataclass(frozen=True)
class Chat:
    """A tokenizer with a chat template, and the tokens that the two determine.

    context_length: the model's, in tokens. vocab_size: rows of its embedding, which may be fewer than the tokenizer's
    tokens. eos_ids: the ids that end a reply. template_origin: where the chat template came from, in words. thinking:
    whether thoughts are asked for, or left open by templates that always open one. template_arguments: further names that
    the template sees; one with the name of a thinking switch overrides `thinking`. system_prompt: the text that goes before
    conversations without one of their own; "" is the template's default, and "none" takes that away.
    """

    tokenizer: Tokenizer
    context_length: int
    vocab_size: int
    eos_ids: tuple[int, ...]
    pad_id: int
    template_origin: str
    thinking: bool = False
    template_arguments: Mapping = dataclasses.field(default_factory=dict)
    system_prompt: str = ""

    @classmethod
    def load(
        cls,
        folder: str | pathlib.Path,
        context_length: int,
        vocab_size: int | None = None,
        chat_template: str = "",
        thinking: bool = False,
        system_prompt: str = "",
    ) -> "Chat":
        """Loads the tokenizer of a checkpoint from its files; the checkpoint's code is never run.

        vocab_size: by default the tokenizer's. chat_template: a name of `templates.BUILT_IN` or a .jinja file; "" is the
        tokenizer's own template, or if it has none, the one that its special tokens tell. system_prompt: as in `under`. Raises
        UserError if there is no readable tokenizer, no chat template, one that leaves the instruction out, or no end-of-reply
        token, and as `under` does.
        """
        folder = pathlib.Path(folder)
        with explained(folder):
            tokenizer = load_tokenizer(folder)
            tokenizer.name_or_path = str(folder)
            origin = templates.set_template(tokenizer, chat_template, folder)
            eos = reply_ends(folder, tokenizer)
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
            chat = chat.under(system_prompt)
            whole = all(probe in chat.render(probe) for probe in PROBES)
            note = chat.reply_start.note(origin)
        if not whole:
            raise chat._leaves_out()
        if note:
            LOG.info(note)
        with explained(folder):
            chat._check_tokens(folder)
        return chat

    def _check_tokens(self, folder: pathlib.Path) -> None:
        """Raises UserError for a tokenizer that is not usable although it loads, or whatever a damaged one raises."""
        plain = [(text, self.tokenised(text)) for text in PROBES]
        for text, ids in (*plain, *((self.render(text), self._kept_ids(text)) for text in PROBES)):
            if not ids or not all(isinstance(i, int) for i in ids) or not isinstance(self.tokenizer.decode(ids), str):
                raise UserError(
                    f"The tokenizer of {folder} turns {text[:60]!r} into no tokens: its vocabulary of {len(self.tokenizer)} "
                    "tokens is incomplete. Take its tokenizer files, all of them, from the original checkpoint."
                )

    def under(self, system_prompt: str) -> "Chat":
        """Returns the chat with another system prompt.

        system_prompt: its text, or the path of a .txt file; "" is whatever the template writes by itself, and "none" takes that
        away. Raises UserError for a file that cannot be read, and for a template that takes no system prompt or does not let go
        of its own.
        """
        chat = dataclasses.replace(self, system_prompt=system_text(system_prompt))
        _ = chat.system  # checks it
        return chat

    def templated(self, template: str, origin: str) -> "Chat":
        """Returns the chat with another chat template, the text of which is given; origin: where it came from, in words.

        Raises UserError for one that fails, or that leaves the instruction out.
        """
        tokenizer = copy.copy(self.tokenizer)
        tokenizer.chat_template = template
        chat = dataclasses.replace(self, tokenizer=tokenizer, template_origin=origin)
        if not all(probe in chat.render(probe) for probe in PROBES):
            raise chat._leaves_out()
        return chat

    @property
    def system(self) -> list[dict[str, str]]:
        """Returns the messages that go before a conversation for the system prompt. Raises UserError as `under` does."""
        return list(self._systems(self.tokenizer.chat_template))

    @functools.cached_property
    def _systems(self) -> Callable[[str], Sequence[dict[str, str]]]:
        """Returns a function of the template, because a tokenizer may get another one."""

        @functools.lru_cache(1)
        def found(template: str) -> Sequence[dict[str, str]]:
            return system_messages(self.rendered, self.system_prompt, self.template_origin)

        return found

    @property
    def told(self) -> dict[str, str]:
        """Returns the system prompt as a field of a completion; empty where there is none that was given."""
        return {"system_prompt": self.system_prompt} if self.system_prompt not in ("", NONE) else {}

    def render(self, prompt: Prompt, response: str = "") -> str:
        """Returns the text of a prompt up to and including the start of the reply, and the beginning of that reply.

        prompt: an instruction, or messages `{"role", "content"}`, of which a last one by the assistant begins the reply. Raises
        UserError for malformed messages, and as `render_messages` does.
        """
        messages = as_messages(prompt)
        if messages[-1]["role"] == "assistant":
            messages, response = messages[:-1], messages[-1]["content"] + response
        return self.render_messages(messages) + response

    def render_messages(self, messages: Sequence[Message]) -> str:
        """Returns the text of a conversation, `{"role", "content"}` each, up to and including the start of the next reply.

        A conversation that begins with a system message has no other. Raises UserError if the template refuses the messages, or
        leaves out what the user says.
        """
        roles = [message["role"] for message in messages]
        if not roles or roles[0] not in SYSTEM_ROLES:
            messages = [*self.system, *messages]
        try:
            text = self.rendered(messages)
        except Exception as error:  # jinja errors, or a template's own raise_exception
            raise self._failed(roles, error) from None
        # Of a single message, `load` has seen that templates take it in; some change its text.
        if len(messages) > 1 and not all(m["content"].strip() in text for m in messages if m["role"] == "user"):
            raise self._leaves_out()
        return text + self.reply_start.added

    def _failed(self, roles: Sequence[str], error: Exception) -> UserError:
        what = "a single user message" if roles == ["user"] else f"messages of {', '.join(roles)}"
        return UserError(
            f"The chat template ({self.template_origin}) failed on {what} ({error}). Repair it, or "
            f"{advice('another: a name or a .jinja file')} The tokenizer is that of {self.tokenizer.name_or_path}."
        )

    def _leaves_out(self) -> UserError:
        return UserError(
            f"The chat template ({self.template_origin}) leaves the instruction out. It may accept messages as lists of "
            "parts only, one user message only, or only with a system prompt. Repair it, or "
            f"{advice('another: a name or a .jinja file')} The tokenizer is that of {self.tokenizer.name_or_path}."
        )

    def _under_system(self, messages: Sequence[Message], reply: bool = True) -> str:
        return self.rendered([*self.system, *messages], reply)

    @property
    def asks_for_thoughts(self) -> bool:
        """Returns whether the template is asked for thoughts, by whichever name."""
        return any(self.template_arguments.get(name, self.thinking) for name in SWITCHES)

    @property
    def reply_start(self) -> ReplyStart:
        """Returns what prompts go on with where the template ends. Raises UserError as `reply_start.reply_start` does, and for a
        template that refuses a single user message."""
        return self._starts(self.tokenizer.chat_template)

    @functools.cached_property
    def _starts(self) -> Callable[[str], ReplyStart]:
        """Returns a function of the template, because a tokenizer may get another one."""

        @functools.lru_cache(1)
        def start(template: str) -> ReplyStart:
            try:
                return reply_start(self._under_system, self.asks_for_thoughts, self.template_origin)
            except UserError:
                raise
            except Exception as error:  # as in `render_messages`
                raise self._failed(("user", "assistant"), error) from None

        return start

    def rendered(self, messages: Sequence[Message], reply: bool = True) -> str:
        """Returns the text that the template makes of messages, with the start of the next reply or without.

        Raises whatever a template raises.
        """
        switches = dict.fromkeys(SWITCHES, self.thinking)  # by either name; others ignore both
        text = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=reply, **switches | dict(self.template_arguments)
        )
        return mended(text, "A rendered chat template")

    def ids(self, text: str, special: bool = False) -> list[int]:
        """Returns the token ids of rendered text, whose special tokens the template wrote; `special` adds the tokenizer's own.

        Lone surrogates become U+FFFD: no tokenizer takes them, and a harness or a template may bring some. Raises
        UserError for a token that the model has no embedding for.
        """
        text = mended(text, "Text for the tokenizer")
        return self._in_vocabulary(self.tokenised(text, special), lambda: text)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Returns the token ids of a prompt, an instruction or messages: those of `render`'s text.

        The ids of the last KEPT_PROMPTS prompts are kept, as the stages of a study ask for the same ones again and again. Raises
        UserError as `render` and `ids` do.
        """
        return self._in_vocabulary(self._kept_ids(prompt), lambda: self.render(prompt))

    def tokenised(self, text: str, special: bool = False) -> list[int]:
        """Returns the tokenizer's ids of a text, whether or not the model's vocabulary holds them."""
        return self.tokenizer(text, add_special_tokens=special).input_ids

    def _kept_ids(self, prompt: Prompt) -> list[int]:
        """Returns what `prompt_ids` does, whether or not the model's vocabulary holds the ids."""
        if not isinstance(prompt, str):
            prompt = as_messages(prompt)
        return self._prompts(frozen(prompt), self.tokenizer.chat_template).tolist()

    @functools.cached_property
    def _prompts(self) -> Callable[[Hashable, str], np.ndarray]:
        """Returns a function that remembers the ids of prompts, each as from `frozen`; its second argument is the template,
        because a tokenizer may get another one."""

        @functools.lru_cache(KEPT_PROMPTS)
        def ids(prompt, template: str) -> np.ndarray:
            text = self.render(prompt if isinstance(prompt, str) else [dict(message) for message in prompt])
            return np.asarray(self.tokenised(text), np.int32)

        return ids

    def _in_vocabulary(self, ids: list[int], text: Callable[[], str]) -> list[int]:
        """Returns the ids. Raises UserError for one that the model has no embedding for. text: gives the text of the
        ids, for the message."""
        if ids and max(ids) >= self.vocab_size:
            raise UserError(
                f"'{text()[:60]}…' contains {self.tokenizer.decode([max(ids)])!r}, token {max(ids)} of the tokenizer, but the "
                f"model's vocabulary has {self.vocab_size} tokens. Remove it, or use the tokenizer that belongs to the "
                f"model: this one is that of {self.tokenizer.name_or_path}."
            )
        return ids

    def encode(self, instructions: Sequence[Prompt | Message], length: int | None = None) -> TokenBatch:
        """Returns left-padded chat prompts, `length` tokens wide (by default the bucket of the longest).

        instructions: texts, or conversations as in `render`. Raises UserError for none, for a prompt longer than the model's
        context, and as `prompt_ids` does.
        """
        if isinstance(instructions, str) or not len(instructions) or isinstance(instructions[0], Mapping):
            raise UserError(
                "encode takes a non-empty list of instructions, e.g. model.encode(['How do I bake bread?']), or of "
                "conversations, e.g. model.encode([[{'role': 'user', 'content': 'How do I bake bread?'}]])."
            )
        prompts = typing.cast(list[Prompt], mended(list(instructions), "Instructions"))
        rows = [self.prompt_ids(prompt) for prompt in prompts]
        longest = max(range(len(rows)), key=lambda i: len(rows[i]))
        if len(rows[longest]) > self.context_length:
            text = as_messages(prompts[longest])[-1]["content"]
            raise UserError(
                f"Prompt {longest} ('{text[:60]}…') has {len(rows[longest])} tokens, the "
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
        """Returns the tokens that the template puts after every instruction (paper, section 2.2), found by rendering
        several instructions and keeping their common end. Raises UserError if there are none."""
        rows = [self.prompt_ids(probe) for probe in PROBES]
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
        """Returns readable forms of single tokens."""
        return [json.dumps(self.tokenizer.decode([i]), ensure_ascii=False)[1:-1] for i in ids]

    def opener_ids(self, openers: Sequence[str | int]) -> tuple[int, ...]:
        """Returns the first token of each opener (the text of a reply's beginning, or an id), sorted, without repeats.

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
        """Returns the reply texts of generated ids `[B, N]`, each up to its first end token and without special tokens."""
        rows = map(self.before_end, np.asarray(rows).tolist())
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]

    def replies(self, rows) -> list[thoughts.Reply]:
        """Returns the replies of generated ids, `[B, N]` or rows of any lengths, each up to its first end token, with its thought
        split off."""
        return [thoughts.split(self.decode_with_marks(self.before_end(row)), self.opened_thought) for row in rows]

    @functools.cached_property
    def opened_thought(self) -> str:
        """Returns the end of every prompt, starting at the mark that opens a thought, for templates that open one for
        the model, else ""."""
        return thoughts.opened_by(self.render(PROBES[3]).rpartition(PROBES[3])[2])

    @functools.cached_property
    def mark_tokens(self) -> dict[int, str]:
        """Returns the special tokens in marks of thoughts, which decoding without special tokens would drop."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        marks = "\n".join(mark for pair in thoughts.MARKS for mark in pair)
        return {i: token.content for i, token in added.items() if token.special and token.content in marks}

    def decode_with_marks(self, ids: Sequence[int]) -> str:
        """Returns the text of ids without special tokens, except those of `mark_tokens`."""
        parts, start = [], 0
        for mark in (i for i, token in enumerate(ids) if token in self.mark_tokens):
            parts += [self.tokenizer.decode(ids[start:mark], skip_special_tokens=True), self.mark_tokens[ids[mark]]]
            start = mark + 1
        return "".join([*parts, self.tokenizer.decode(ids[start:], skip_special_tokens=True)])

    def before_end(self, row: Sequence[int] | Int[np.ndarray, " O"]) -> list[int]:
        """Returns the ids up to the first end token."""
        stop = next((i for i, token in enumerate(row) if token in self.eos_ids), len(row))
        return [int(token) for token in row[:stop]]

"""Finds where replies begin, from a conversation of two turns: what a template writes before an earlier reply should stand at a
prompt's end.

Some templates stop before that. Those without a generation prompt leave out the reply's header, those of models that always
think leave a thought open, and gpt-oss's stops before the channel. What is missing is added to prompts, so that refusal is
read and replies are generated at the first token of the reply's text.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

from refusal_jax.chat import thoughts
from refusal_jax.chat.templates import advice
from refusal_jax.errors import UserError, setting

Render = Callable[[Sequence[dict[str, str]], bool], str]
ASKED, REPLY = "Name 3 colours.", "Umber, ochre, teal."
MARKS = re.compile(r"<[^<>]*>|\[[^\[\]]*\]|\s+")  # special tokens, as they are mostly written
USER, ASSISTANT = {"role": "user", "content": ASKED}, {"role": "assistant", "content": REPLY}


@dataclasses.dataclass(frozen=True)
class ReplyStart:
    """Tells what prompts go on with where their template ends. added: the text, "" where nothing is missing. closes: whether it
    closes a thought that the template, or the model by itself, would open. spaces: those that the template puts before earlier
    replies, which are part of a reply's first token and so not added."""

    added: str = ""
    closes: bool = False
    spaces: str = ""

    def note(self, origin: str) -> str:
        """Returns what is added and why, in sentences, or "". origin: where the template came from."""
        if self.closes:
            name = setting("thinking", True)
            return (
                f"The model always thinks, as its chat template ({origin}) tells. {self.added!r} is added to prompts: a thought "
                "is closed, so that refusal is read where the reply begins."
                + (f" With {name} the thought stays open, and refusal is read at its first token." if name else "")
            )
        if self.added:
            return (
                f"The chat template ({origin}) ends its prompts before the reply begins. {self.added!r}, which it writes before "
                "earlier replies, is added to them."
            )
        return ""


def reply_start(render: Render, thinking: bool, origin: str) -> ReplyStart:
    """Returns what the prompts of a template lack of the beginning of a reply.

    render: gives the text of messages, with the start of the next reply or without. thinking: whether thoughts are asked for,
    which then stay open. origin: where the template came from. Raises UserError where prompts end in marks that do not stand
    before earlier replies, whether a reply is to begin or not, and whatever the template raises at a prompt.
    """
    end, before = _after(render([USER], True)), _before_reply(render)
    opened = thoughts.opened_by(end)
    if opened and thinking:
        return ReplyStart()
    if before is not None and before.startswith(end):
        missing = before[len(end) :]
        if opened and not thoughts.is_marked(missing):
            return ReplyStart(thoughts.closing(opened), True)
        return _told(missing, thinking)
    closing = thoughts.closing(opened) if opened else ""
    ours, theirs = thoughts.outside(end), thoughts.outside(end if before is None else before)
    if not theirs.startswith(ours):
        if not (opened or ours.startswith(theirs) or MARKS.sub("", end)) and _ignores_the_reply(render, end):
            raise UserError(
                f"The chat template ({origin}) does not tell where a reply begins: prompts end in {end!r}, and before an earlier "
                f"reply it writes {before!r}. Write a template that begins the reply where add_generation_prompt is true, and "
                f"{advice('it, as a .jinja file')}"
            )
        theirs = ours
    told = _told(theirs[len(ours) :], thinking)
    return ReplyStart(closing + told.added, bool(closing), told.spaces)


def _told(missing: str, thinking: bool) -> ReplyStart:
    """Returns what to add of the text that stands before earlier replies and not at a prompt's end."""
    header = missing[: thoughts.first_mark(missing)]
    if header != missing:  # thoughts, whose white space is theirs
        return ReplyStart(header if header.strip() else "") if thinking else ReplyStart(missing, True)
    # Spaces belong to the reply: tokenizers hold them in one token with the word that follows.
    return ReplyStart(spaces=header) if header.strip(" ") == "" else ReplyStart(header)


def _after(text: str) -> str:
    return text.rpartition(ASKED)[2]


def _before_reply(render: Render) -> str | None:
    """Returns what stands between an instruction and its reply in a conversation; None if the template does not show it."""
    try:
        text = render([USER, ASSISTANT], False)
    except TimeoutError:  # of `templates.within`
        raise
    except Exception:  # a template may raise anything, and some take no conversation
        return None
    before, found, _ = _after(text).partition(REPLY)
    return before if found and ASKED in text else None


def _ignores_the_reply(render: Render, end: str) -> bool:
    """Returns whether a template ends a prompt in the same way where no start of a reply is wanted."""
    try:
        return _after(render([USER], False)) == end
    except TimeoutError:
        raise
    except Exception:  # as above
        return False

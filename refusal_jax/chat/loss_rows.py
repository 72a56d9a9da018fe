"""Tokenised rows whose cross-entropy is measured or learnt, with the tokens that count."""

import dataclasses
from collections.abc import Sequence

from refusal_jax.chat.messages import Prompt
from refusal_jax.chat.prompts import Chat

ASKED, REPLY, MORE = "Name 3 colours.", "Umber, ochre, teal.", "And 2 more?"


@dataclasses.dataclass(frozen=True)
class LossRow:
    """A row of token ids, and the index of the first token that is predicted and counted."""

    ids: list[int]
    first: int


def chat_rows(
    chat: Chat, pairs: Sequence[tuple[Prompt, str]], max_tokens: int, end: Sequence[int] = ()
) -> list[LossRow]:
    """Returns rows of (instruction, response), in which only the response counts, predicted from the last
    post-instruction token on. end: tokens that follow the response and count as well, such as `reply_end`'s."""
    rows = []
    for instruction, response in pairs:
        ids, prompt = chat.ids(chat.render(instruction, response)), chat.prompt_ids(instruction)
        # A reply may change how the prompt's end is split into tokens; it begins where the two first differ.
        first = next((i for i, (one, other) in enumerate(zip(ids, prompt, strict=False)) if one != other), len(prompt))
        rows.append(LossRow([*ids, *end][:max_tokens], first))
    return rows


def text_rows(chat: Chat, texts: Sequence[str], max_tokens: int) -> list[LossRow]:
    """Returns rows of plain text, tokenised by the tokenizer's default (with its BOS); all tokens but the first
    count."""
    return [LossRow(chat.ids(text, special=True)[:max_tokens], 1) for text in texts]


def reply_end(chat: Chat) -> int:
    """Returns the token that ends a reply, which a model has to learn with it: else it goes on without end.

    It is the first end token that the template writes after an earlier reply, within its turn or at the start of the next one,
    whose mark ends replies in some families; or the tokenizer's first, where the template writes none.
    """
    talk = [("user", ASKED), ("assistant", REPLY), ("user", MORE)]
    try:
        text = chat.rendered([*chat.system, *({"role": role, "content": said} for role, said in talk)])
    except TimeoutError:  # of `templates.within`
        raise
    except Exception:  # a template may raise anything, and some take no conversation
        return chat.eos_ids[0]
    after = chat.ids(text.rpartition(REPLY)[2])
    return next((token for token in after if token in chat.eos_ids), chat.eos_ids[0])

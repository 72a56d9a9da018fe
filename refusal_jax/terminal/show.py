"""Shows the replies of a session: in two growing columns on a terminal, or one after the other in a file or pipe."""

import dataclasses
import shutil
from collections.abc import Callable

import numpy as np

from refusal_jax.terminal.screen import BOLD, DIM, GAP, RESET, Columns
from refusal_jax.terminal.session import Session, Turn


def follow(session: Session, message: str, draw: Callable[[Turn], None]) -> Turn | None:
    """Draws both replies as they grow and returns their last state. Ctrl-C stops them where they are; the result is
    None if they had not begun."""
    turn, growing = None, session.say(message)
    try:
        for turn in growing:
            draw(turn)
    except KeyboardInterrupt:
        growing.close()
        if turn is not None:
            turn = dataclasses.replace(turn, done=[True, True])
            draw(turn)
    return turn


def show_columns(session: Session, message: str) -> None:
    """Shows the replies as they grow, in two columns."""
    size = shutil.get_terminal_size()
    columns = Columns(size.columns, size.lines)
    print(BOLD + GAP.join(title[: columns.each].ljust(columns.each) for title in session.titles) + RESET, flush=True)
    turn = follow(session, message, lambda turn: columns.draw(turn.pieces, turn.done))
    if turn is not None:
        for title, text in zip(session.titles, summaries(session, turn), strict=True):
            print(f"{DIM}{title}; {text}{RESET}")
    print(flush=True)


def show_plain(session: Session, message: str) -> None:
    """Shows both replies when they are complete."""
    turn = follow(session, message, lambda turn: None)
    if turn is None:
        return
    for title, pieces, text in zip(session.titles, turn.pieces, summaries(session, turn), strict=True):
        print(f"[{title}] {''.join(piece.text for piece in pieces)}\n    ({text})")
    print(flush=True)


def summaries(session: Session, turn: Turn) -> list[str]:
    """Returns, for each column, a description of what the tokens project on the direction."""
    found = []
    for prompt, along, warning in zip(turn.prompt, turn.along, turn.warnings, strict=True):
        text = f"projection at layer {session.layer}: {prompt:+z.2f} at the prompt's end"
        if along:
            text += f"; reply {np.mean(along):+z.2f} on average, {min(along):+z.2f} to {max(along):+z.2f}"
        found.append(f"{text}; warning: {warning}" if warning else text)
    return found

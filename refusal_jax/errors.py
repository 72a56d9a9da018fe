"""The one exception that users are meant to read.

Anything a user can cause (a bad folder, a bad flag, a full disk) is raised as `UserError` with one paragraph that says
what failed, what was found, what was expected and what to do next. Jobs print it and exit with its `exit_code`; a
traceback therefore always means a bug in this package.
"""

import contextlib
import difflib
import re
import reprlib
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator

from refusal_jax import logs

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 120
_short.maxlevel, _short.maxlist, _short.maxdict = 3, 12, 12

# From a quote that begins a word to one that ends it, so that an apostrophe within a word is none.
_QUOTED = re.compile(r"""(?<!\w)(['"])(?:\\.|(?!\1(?!\w)).)*\1""", re.DOTALL)


class UserError(ValueError):
    """Bad input or environment; the message is a whole paragraph, fit to be printed alone."""

    exit_code = 2


class DamagedFile(UserError):
    """A file is not what its name says: truncated, edited by hand, or another file in its place."""


class VerificationError(UserError):
    """Something that was made or checked is not what it should be."""

    exit_code = 3


class NoDirection(UserError):
    """A study found no direction: a result, which its report tells, and no bad input.

    why: "refusal_tokens", "filter" or "candidates", the step that left nothing. reason: the same as a clause. claim: what was
    found, with its numbers; remedy: what to do; both whole sentences. run: of the study, where it is finished, a
    `refusal_jax.runs.run.Run`.
    """

    exit_code = 4

    def __init__(self, why: str, reason: str, claim: str, remedy: str, run: object = None):
        super().__init__(f"{claim} {remedy}")
        self.why, self.reason, self.claim, self.remedy, self.run = why, reason, claim, remedy, run

    @property
    def record(self) -> dict[str, str]:
        """Returns the content of no_direction.json."""
        return {"why": self.why, "reason": self.reason, "claim": self.claim, "remedy": self.remedy}


def shown(value) -> str:
    """Returns the `repr` of a value from a file, shortened: a message stays readable, however large or deep the value is."""
    return _short.repr(value)


def without_quotes(message: str) -> str:
    """Returns a message with an ellipsis for whatever it quotes, for files that hold no prompt or reply."""
    return _QUOTED.sub("…", message)


def nearest(word: object, names: Iterable[str]) -> str | None:
    """Returns the name that is most like the word, whatever their case; None if none is near."""
    spellings = {name.lower(): name for name in names}
    found = difflib.get_close_matches(str(word).lower(), spellings, 1)
    return spellings[found[0]] if found else None


def did_you_mean(word: object, names: Iterable[str]) -> str:
    """Returns a sentence, with a space before it, that asks for the nearest of the names; "" if none is near."""
    found = nearest(word, names)
    return f" Did you mean {found}?" if found else ""


def _in_python(name: str) -> str:
    return name if name.startswith("config.") else f"{name}="


_spelling: Callable[[str], str | None] = _in_python


@contextlib.contextmanager
def spelt(spelling: Callable[[str], str | None]) -> Iterator[None]:
    """Makes messages name settings as `spelling` does, which returns None for a setting that the user cannot give.

    Without it they are named as in Python: `chat_template=`, or `config.positions` for a field of a study's config.
    """
    global _spelling  # not a context variable, because threads that a job starts must see it
    before, _spelling = _spelling, spelling
    try:
        yield
    finally:
        _spelling = before


def setting(name: str, value: object = None) -> str | None:
    """Returns how the user gives a setting, such as "--chat_template" or, with a value, "--chat_template=VALUE"; None if what
    runs has no such setting. name: a keyword argument, or a field of a study's config with "config." before it."""
    found = _spelling(name)
    return found if found is None or value is None else f"{found.removesuffix('=')}={value}"


def field(name: str, value: object = None) -> str:
    """Returns how the user gives a field of a study's config, such as "--config.positions"; "config.positions" where it is
    code that makes the config."""
    return setting(f"config.{name}", value) or f"config.{name}" + ("" if value is None else f"={value}")


def print_error(message: str, file=None) -> None:
    """Prints a paragraph for the user, by default to stderr, and keeps it in the log. Indented lines are code to be copied and
    stay as they are."""
    lines = f"error: {message}".split("\n")
    text = "\n".join(
        line if line.startswith("    ") else textwrap.fill(line, 100, break_long_words=False, break_on_hyphens=False)
        for line in lines
    )
    print(f"\n{text}", file=file or sys.stderr, flush=True)
    if file is None:  # else it is written in a signal handler, which must not wait for a lock
        logs.PRINTED.error(message)

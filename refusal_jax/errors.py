"""The one exception that users are meant to read.

Anything a user can cause (a bad folder, a bad flag, a full disk) is raised as `UserError` with one paragraph that
says what failed, what was found, what was expected and what to do next. Jobs print it and exit with its `exit_code`; a
traceback therefore always means a bug of ours.
"""

import reprlib
import sys
import textwrap

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 120
_short.maxlevel, _short.maxlist, _short.maxdict = 3, 12, 12


class UserError(ValueError):
    """Bad input or environment; the message is a whole paragraph, fit to be printed alone."""

    exit_code = 2


class VerificationError(UserError):
    """What was made or checked is not what it should be."""

    exit_code = 3


def shown(value) -> str:
    """Returns the `repr` of a value from a file, shortened: a message stays readable, however large or deep the value is."""
    return _short.repr(value)


def print_error(message: str, file=None) -> None:
    """Prints a paragraph for the user, by default to stderr. Indented lines are code to be copied and stay as they are."""
    lines = f"error: {message}".split("\n")
    text = "\n".join(
        line if line.startswith("    ") else textwrap.fill(line, 100, break_long_words=False, break_on_hyphens=False)
        for line in lines
    )
    print(f"\n{text}", file=file or sys.stderr, flush=True)

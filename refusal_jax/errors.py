"""The one exception that users are meant to read.

Anything a user can cause (a bad folder, a bad flag, a full disk) is raised as `UserError` with one paragraph that
says what failed, what was found, what was expected and what to do next. Jobs print it and exit with its `exit_code`; a
traceback therefore always means a bug of ours.
"""

import sys
import textwrap


class UserError(ValueError):
    """Bad input or environment; the message is a whole paragraph, fit to be printed alone."""

    exit_code = 2


class VerificationError(UserError):
    """What was made or checked is not what it should be."""

    exit_code = 3


def print_error(message: str, file=None) -> None:
    """Prints a paragraph for the user, by default to stderr."""
    text = textwrap.fill(f"error: {message}", 100, break_long_words=False, break_on_hyphens=False)
    print(f"\n{text}", file=file or sys.stderr, flush=True)

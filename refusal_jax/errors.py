"""The one exception that users are meant to read.

Anything a user can cause (a bad folder, a bad flag, a full disk) is raised as `UserError` with one paragraph that
says what failed, what was found, what was expected and what to do next. Jobs print it and exit with its `exit_code`; a
traceback therefore always means a bug of ours.
"""


class UserError(ValueError):
    """Bad input or environment; the message is a whole paragraph, fit to be printed alone."""

    exit_code = 2


class VerificationError(UserError):
    """What was made or checked is not what it should be."""

    exit_code = 3

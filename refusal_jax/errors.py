"""The one exception that users are meant to read.

Anything a user can cause (a bad folder, a bad flag, a full disk) is raised as `UserError` with one paragraph that
says what failed, what was found, what was expected and what to do next. Jobs print it and exit with code 2; a
traceback therefore always means a bug of ours.
"""


class UserError(ValueError):
    """Bad input or environment; the message is a whole paragraph, fit to be printed alone."""

"""Exit codes of jobs whose result is a verdict, and the flag --fail_on, which narrows them."""

from collections.abc import Collection

from refusal_jax.errors import UserError, did_you_mean, setting

UNFIT = 10  # the exit code of a verdict that --fail_on names and that has none of its own


def asked_verdicts(named: list[str] | None, known: Collection[str]) -> list[str] | None:
    """Returns the verdicts that --fail_on names, None where it is not given. Raises UserError for other words.

    known: the verdicts that there are.
    """
    for name in named or []:
        if name not in known:
            raise UserError(
                f"{setting('fail_on')}={','.join(named or [])}: there is no verdict {name!r}.{did_you_mean(name, known)} "
                f"They are {', '.join(known)}."
            )
    return named


def exit_code(overall: str, code: int, fail_on: list[str] | None) -> int:
    """Returns the exit code of the verdict `overall`, whose own is `code`: 0 for one that is not among those to fail on."""
    if fail_on is None:
        return code
    return (code or UNFIT) if overall in fail_on else 0

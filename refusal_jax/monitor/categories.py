"""Names the categories of traces: by what the log says, or by rules for the text of the request."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence

from refusal_jax.errors import UserError, setting, shown
from refusal_jax.files import local_path, read_json
from refusal_jax.monitor.settings import MonitorSettings

ALL, OTHER = "all", "other"
LONGEST = 200  # characters of a name
READ = 20_000  # characters of a request in which the rules look


@dataclasses.dataclass(frozen=True)
class Categories:
    """Rules, of which the first that is found in a request names its category. default: where there is no name and no rule."""

    rules: tuple[tuple[str, re.Pattern[str]], ...] = ()
    default: str = ALL

    @classmethod
    def of(cls, settings: MonitorSettings) -> "Categories":
        """Returns the rules that the settings ask for. Raises UserError for one that is no rule."""
        rules = []
        for rule in settings.categories:
            name, equals, pattern = rule.partition("=")
            if not name or not equals:
                raise UserError(
                    f"{setting('categories')}: {rule!r} is no rule. Write NAME=REGEX, such as toys=forge|counterfeit."
                )
            rules.append((name, _compiled(name, pattern)))
        if settings.categories_file:
            path = local_path(settings.categories_file)
            rules += _of_file(path, read_json(path))
        return cls(tuple(rules), OTHER if rules or settings.category_field else ALL)

    def name(self, given: str, prompt: str) -> str:
        """Returns a trace's category. given: what its log says, "" for nothing."""
        if given:
            return given[:LONGEST]
        text = prompt[:READ]
        return next((name for name, pattern in self.rules if pattern.search(text)), self.default)


def _of_file(path: pathlib.Path, rules: Mapping) -> list[tuple[str, re.Pattern[str]]]:
    found = []
    for name, patterns in rules.items():
        patterns = [patterns] if isinstance(patterns, str) else patterns
        if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
            raise UserError(
                f"{path}: the category {name!r} has {shown(patterns)}, expected a regular expression or a list of them."
            )
        found += [(str(name), _compiled(str(name), pattern)) for pattern in patterns]
    return found


def _compiled(name: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise UserError(
            f"The rule of category {name!r} is no regular expression: {error}. It is {pattern!r}."
        ) from None

"""Parses settings that are a number or None, for flags that override fields of a config."""

from absl import flags
from ml_collections import config_flags

from refusal_jax.settings import OptionalFloat, OptionalInt


class OptionalIntParser(flags.ArgumentParser):
    """Parses a whole number, or None."""

    def parse(self, argument: str) -> int | None:
        """Returns the value of the text. Raises ValueError for any other."""
        return None if str(argument).lower() == "none" else int(argument)

    def flag_type(self) -> str:
        """Returns the name of this type in help texts."""
        return "int or None"


class OptionalFloatParser(flags.ArgumentParser):
    """Parses a number, or None."""

    def parse(self, argument: str) -> float | None:
        """Returns the value of the text. Raises ValueError for any other."""
        return None if str(argument).lower() == "none" else float(argument)

    def flag_type(self) -> str:
        """Returns the name of this type in help texts."""
        return "float or None"


def register() -> None:
    """Makes the parsers known to config files; it may be called again."""
    config_flags.register_flag_parser_for_type(OptionalInt, OptionalIntParser())
    config_flags.register_flag_parser_for_type(OptionalFloat, OptionalFloatParser())

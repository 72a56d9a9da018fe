"""Flags of a job that are made from settings, one for each, with the meaning that the setting declares."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar, get_args, get_origin

from absl import flags

from refusal_jax.settings import Described, Settings

S = TypeVar("S", bound=Settings)

flags.disclaim_key_flags()  # they belong to the job that defines them through this file
DEFINE: dict[Any, Callable] = {
    str: flags.DEFINE_string,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_bool,
}


class Numbers(flags.ListParser):
    """A parser of numbers with commas between them. kind: int or float."""

    def __init__(self, kind: type):
        super().__init__()
        self.kind = kind

    def parse(self, argument: Any) -> list[Any]:
        """Returns the numbers. Raises ValueError, which absl reports, for anything else."""
        return [self.kind(word) for word in super().parse(argument)]


def flag_of(one: Described) -> flags.FlagHolder:
    """Defines the flag of a setting, named by its path."""
    if get_origin(one.kind) is tuple and get_args(one.kind)[0] in (int, float):
        parser, default = Numbers(get_args(one.kind)[0]), ",".join(map(str, one.value))
        return flags.DEFINE(parser, one.path, default, f"{one.meaning}.", serializer=flags.CsvListSerializer(","))
    if get_origin(one.kind) is tuple:
        return flags.DEFINE_list(one.path, ",".join(one.value), f"{one.meaning}.")
    return DEFINE[one.kind](one.path, one.value, f"{one.meaning}.")


def flags_of(settings: Settings, but: Iterable[str] = ()) -> dict[str, flags.FlagHolder]:
    """Defines the flags of settings, and returns them by the settings' paths. but: paths that get none."""
    return {one.path: flag_of(one) for one in settings.described() if one.path not in but}


def given_only(defined: dict[str, flags.FlagHolder]) -> dict[str, Any]:
    """Returns the values of the flags that the command line gives, nested as settings are."""
    found: dict[str, Any] = {}
    for path, flag in defined.items():
        if flag.present:
            *sections, last = path.split(".")
            holder = found
            for name in sections:
                holder = holder.setdefault(name, {})
            holder[last] = flag.value
    return found


def given(kind: type[S], defined: dict[str, flags.FlagHolder]) -> S:
    """Returns the settings of a kind with what its flags say."""
    made = kind()
    for one in kind().described():
        if one.path in defined:
            made.update_from_flattened_dict({one.path.removeprefix(f"{kind._path}."): defined[one.path].value})
    return made

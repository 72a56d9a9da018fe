"""Settings as nested dataclasses that check themselves.

A subclass of `Settings` declares its fields with `option` and `section`, which carry what each means: the one text that the code,
the error messages and `--help` share. A field that does not exist and a value of the wrong type are refused when they are
assigned. Settings are mappings as well, so that they are read and changed by names, and by nested dictionaries.
"""

import contextlib
import dataclasses
import types
from collections.abc import Iterator, Mapping
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    NamedTuple,
    TypeGuard,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

from refusal_jax.errors import UserError, did_you_mean, field, shown

T = TypeVar("T")
# A whole number or None. It is marked so that a parser of flags can be found for it: `int` alone would refuse "None".
OptionalInt = Annotated[int | None, "None is a value"]
OptionalFloat = Annotated[float | None, "None is a value"]
KINDS = {str: "a string", int: "a whole number", float: "a number", bool: "True or False", types.NoneType: "None"}
MANY = {str: "strings", int: "whole numbers", float: "numbers"}

S = TypeVar("S", bound="Settings")


class UnknownField(UserError, AttributeError, KeyError):
    """A name that is no field. It is an AttributeError and a KeyError too, as `getattr` and mappings expect."""

    __str__ = UserError.__str__  # a KeyError would show the message in quotes


def option(default: T, meaning: str) -> T:
    """Declares a field with its default and what it means."""
    return dataclasses.field(default=default, metadata={"meaning": meaning})


def section(kind: type[T], meaning: str) -> T:
    """Declares a field that holds settings of its own, with what they are about."""
    return dataclasses.field(default_factory=kind, metadata={"meaning": meaning})


class Described(NamedTuple):
    """One setting. path: its dotted name; meaning: a sentence, without its full stop."""

    path: str
    value: Any
    meaning: str
    kind: Any


@dataclasses.dataclass
class Settings(Mapping[str, Any]):
    """The base of all settings. A subclass that is a section of others names itself: `class Mesh(Settings, path="mesh")`."""

    _path: ClassVar[str] = ""

    def __init_subclass__(cls, path: str = "", **more: Any) -> None:
        super().__init_subclass__(**more)
        cls._path = path

    @classmethod
    def of(cls: type[S], values: Any) -> S:
        """Returns settings that are independent of `values`; what these leave out keeps its default.

        values: a nested mapping, such as a dictionary or an ml_collections.ConfigDict. Raises UserError for unknown names and
        for values of wrong types.
        """
        made = cls()
        made.update(values)
        return made

    def __setattr__(self, name: str, value: Any) -> None:
        kind = self._kind(name)
        try:
            object.__setattr__(self, name, _converted(value, kind))
        except TypeError:
            raise UserError(f"{field(self._below(name))} = {shown(value)}, expected {in_words(kind)}.") from None

    if not TYPE_CHECKING:  # a checker knows the fields, and would take every name for one

        def __getattr__(self, name: str) -> Any:
            raise self._unknown(name)

    def __getitem__(self, name: str) -> Any:
        self._kind(name)
        return getattr(self, name)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self, name, value)

    def __iter__(self) -> Iterator[str]:
        return (f.name for f in dataclasses.fields(self))

    def __len__(self) -> int:
        return len(dataclasses.fields(self))

    def update(self, values: Any = None, /, **more: Any) -> None:
        """Assigns the values given by name; a mapping given for a section changes the fields that it names."""
        for name, value in {**(values or {}), **more}.items():
            if _is_mapping(value) and isinstance(self[name], Settings):
                self[name].update(value)
            else:
                self[name] = value

    def update_from_flattened_dict(self, values: Mapping[str, Any]) -> None:
        """Assigns values given by dotted names, such as {"data.n_train": 64}."""
        for path, value in values.items():
            *sections, last = path.split(".")
            holder = self
            for name in sections:
                holder = holder[name]
            holder[last] = value

    def unlocked(self) -> contextlib.AbstractContextManager["Settings"]:
        """Returns a context in which nothing differs: config files written for ml_collections.ConfigDict may ask for one."""
        return contextlib.nullcontext(self)

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as nested dictionaries of plain values."""
        return {name: _plain(value) for name, value in self.items()}

    def described(self) -> Iterator[Described]:
        """Yields every setting, those of sections included, in the order in which they are declared."""
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Settings):
                yield from value.described()
            else:
                yield Described(self._below(f.name), value, f.metadata["meaning"], f.type)

    def _below(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name

    def _kind(self, name: str) -> Any:
        for f in dataclasses.fields(self):
            if f.name == name:
                return f.type
        raise self._unknown(name)

    def _unknown(self, name: str) -> UnknownField:
        hint = did_you_mean(name, self) or f" The settings there are {', '.join(self)}."
        return UnknownField(f"There is no setting {field(self._below(name))}.{hint}")


def chosen(name: str, entries: Mapping[str, T], file: str) -> T:
    """Returns the entry that --config=FILE:NAME names, for config files that hold several. Raises UserError, with the names and
    the nearest, if there is none."""
    if name not in entries:
        what = (
            f"{file} has no entry {name!r}.{did_you_mean(name, entries)}" if name else f"{file} holds several configs."
        )
        raise UserError(f"{what} Write {file}:NAME, with one of {', '.join(entries)}.")
    return entries[name]


def _plain(value: Any) -> Any:
    """Returns a field's value with settings, alone or in a tuple, as dictionaries."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value.to_dict() if isinstance(value, Settings) else value


def _is_mapping(value: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping) or hasattr(
        value, "items"
    )  # ml_collections.ConfigDict has the methods, not the class


def _converted(value: Any, kind: Any) -> Any:
    """Returns a value as a field of this type holds it: lists become tuples, whole numbers become floats, and mappings become
    settings. Raises TypeError for a value that does not fit."""
    parts = get_args(kind)
    if get_origin(kind) is Annotated:
        return _converted(value, parts[0])
    if get_origin(kind) in (Union, types.UnionType):
        for part in parts:
            with contextlib.suppress(TypeError):
                return _converted(value, part)
        raise TypeError
    if get_origin(kind) is tuple:
        if isinstance(value, tuple | list):
            return tuple(_converted(one, parts[0]) for one in value)
        raise TypeError
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    if issubclass(kind, Settings) and _is_mapping(value):
        return kind.of(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    raise TypeError


def in_words(kind: Any) -> str:
    """Returns what values of a field's type are, such as "a whole number or None" or "a tuple of strings"."""
    parts = get_args(kind)
    if get_origin(kind) is Annotated:
        return in_words(parts[0])
    if get_origin(kind) is tuple:
        return "a tuple of " + " and ".join(MANY.get(part) or part.__name__ for part in get_args(parts[0]) or parts[:1])
    if parts:
        return " or ".join(map(in_words, parts))
    return KINDS.get(kind) or "a mapping of the settings of this section"

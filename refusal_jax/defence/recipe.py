"""Defines what a recipe of a defence is: a training with an objective of its own, or an edit that is computed."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from refusal_jax.chat.model import ChatModel
from refusal_jax.defence.data import DefenceData
from refusal_jax.defence.lessons import Note
from refusal_jax.defence.settings import DefenceSettings
from refusal_jax.export.tensor_edits import Edit
from refusal_jax.models.config import ModelConfig
from refusal_jax.training.objective import Objective


@runtime_checkable
class Steering(Protocol):
    """An edit of the residual stream that depends on the prompt; `ChatModel` takes it wherever it takes `Edits`."""

    def write(self, folder: pathlib.Path) -> list[pathlib.Path]:
        """Writes it into a folder and returns the files."""
        ...


@dataclasses.dataclass(frozen=True)
class Change:
    """Holds what a recipe without training makes of a model.

    edit: of its weights, written by the exports. steering: of its residual stream where it runs, which no weights hold. One of
    the two is given. found: what the recipe measured on the way, in plain values, for defence.json.
    """

    edit: Edit | None = None
    steering: Steering | None = None
    found: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A defence by name.

    about: what it does, in a sentence for help texts. source: where it was published. objective: what a training minimises, given
    the model, the data and the settings, with a function that is told what was left out; or edit: what is changed without
    training, given the same. defaults, embedded: settings by dotted name, such as "train.rate", that differ from those of
    `DefenceSettings` unless they are given; `embedded` ones for models of the embedded family, after the others. arrange: fills
    in settings that are left open and depend on the model's size. common: whether any model that refuses can be given to it; the
    others are no part of "all". compliant: returns what needs harmful prompts with replies that comply, in words, or "".
    """

    name: str
    about: str
    source: str
    objective: Callable[[ChatModel, DefenceData, DefenceSettings, Note], Objective] | None = None
    edit: Callable[[ChatModel, DefenceData, DefenceSettings, Note], Change] | None = None
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    embedded: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    arrange: Callable[[DefenceSettings, ModelConfig], None] | None = None
    common: bool = True
    compliant: Callable[[DefenceSettings], str] = lambda settings: ""

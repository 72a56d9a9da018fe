"""Tells what the user gives to be compared with a study: sets of prompts, and directions of other studies or files."""

import dataclasses
import pathlib
from collections.abc import Sequence

from refusal_jax.data.prompts import read_prompts
from refusal_jax.data.sources import resolve
from refusal_jax.directions import Direction, read_direction
from refusal_jax.errors import UserError, setting
from refusal_jax.files import file_hash, local_path
from refusal_jax.report.summary import judges_of, read_conditions
from refusal_jax.runs.run import MANIFEST, Run, read_manifest

OWN = "study"  # the name of the study's own prompts and direction
LEAST = 4  # prompts of a half


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """A set of prompts: halves that make a direction, and halves that it is tried on."""

    name: str
    harmful: tuple[list[str], list[str]]
    harmless: tuple[list[str], list[str]]


def spelled(name: str) -> str:
    """Returns how the user gives a setting of this part."""
    return (setting(f"matrices.{name}") or f"matrices.{name}").removesuffix("=")


def named(values: Sequence[str], name: str, example: str) -> dict[str, str]:
    """Returns `NAME=VALUE` settings by name. Raises UserError for one without a name or a value, and for equal names."""
    found: dict[str, str] = {}
    for value in values:
        key, _, rest = (part.strip() for part in value.partition("="))
        if not key or not rest:
            raise UserError(f"{spelled(name)} has {value!r}, expected {example}.")
        if key == OWN:
            raise UserError(
                f"{spelled(name)} calls something {OWN!r}, which is the name of the study's own. Choose another one."
            )
        if key in found:
            raise UserError(f"{spelled(name)} has the name {key!r} twice. Give each a name of its own.")
        found[key] = rest
    return found


def set_sources(values: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Returns the names of harmful and harmless prompts by the set's name. Raises UserError as `named` does, and for a set with
    one side."""
    found = {}
    for name, rest in named(values, "sets", "NAME=HARMFUL+HARMLESS, such as de=harmful_de.csv+harmless_de.csv").items():
        sides = [part.strip() for part in rest.split("+")]
        if len(sides) != 2 or not all(sides):
            raise UserError(
                f"{spelled('sets')} gives {name!r} {len([s for s in sides if s])} names of prompts ({rest!r}), and a set has "
                f"two, harmful and harmless ones: {name}=HARMFUL+HARMLESS."
            )
        found[name] = (sides[0], sides[1])
    return found


def set_files(values: Sequence[str]) -> dict[str, tuple[pathlib.Path, pathlib.Path]]:
    """Returns the files of each set. Raises UserError as `set_sources` does, and for prompts that are not there."""
    found = {}
    for name, (harmful, harmless) in set_sources(values).items():
        files = resolve(harmful, "harmful_test"), resolve(harmless, "harmless_test")
        for file in files:
            if not file.is_file():
                raise UserError(f"The set {name!r} names {file}, which is not a file. Correct {spelled('sets')}.")
        found[name] = files
    return found


def prompt_sets(values: Sequence[str], n_prompts: int) -> list[PromptSet]:
    """Returns the sets of prompts, every other one in the first half. n_prompts: the largest number of each side, both halves
    together. Raises UserError as `set_files` does, for a file that cannot be read, and for too few prompts."""
    found = []
    for name, files in set_files(values).items():
        sides = []
        for side, file in zip(("harmful", "harmless"), files, strict=True):
            texts = [row["instruction"] for row in read_prompts(file)][:n_prompts]
            if len(texts) < 2 * LEAST:
                raise UserError(
                    f"The set {name!r} has {len(texts)} {side} prompts ({file}), and at least {2 * LEAST} are needed: half of "
                    f"them make its direction, and the others are refused or not. Add prompts, or raise {spelled('n_prompts')}."
                )
            sides.append((texts[::2], texts[1::2]))
        found.append(PromptSet(name, sides[0], sides[1]))
    return found


@dataclasses.dataclass(frozen=True)
class OtherDirection:
    """A direction that was given. own: the refusal rates of its own study's harmful prompts by intervention, if it comes from a
    study that has judged any."""

    name: str
    direction: Direction
    place: pathlib.Path
    own: dict


def other_directions(values: Sequence[str], d_model: int, n_layers: int) -> list[OtherDirection]:
    """Returns the directions that were given. Raises UserError as `named` and `read_direction` do, and for a file of another
    width than the model's, of which nothing could be said."""
    found = []
    for name, rest in named(values, "directions", "NAME=RUN or NAME=FILE, such as base=runs/base").items():
        place = local_path(rest)
        same = read_direction([place], subspace=None, n_layers=None if place.is_dir() else n_layers)
        width = len(same.raw_d)
        if width != d_model and not place.is_dir():
            raise UserError(
                f"The direction {name!r} ({place}) has {width} entries, and the model's residual stream has {d_model}: it "
                "belongs to another model, and can be neither compared nor ablated here. Name the folder of its study, whose "
                "own refusal rates are then shown, or leave it out."
            )
        found.append(OtherDirection(name, same, place, own_rates(place)))
    return found


def own_rates(place: pathlib.Path) -> dict:
    """Returns the refusal rates of a study's own harmful prompts by intervention, with their judge; none of what is no study, or
    has judged nothing."""
    if not (place / MANIFEST).is_file():
        return {}
    conditions = [c for c in read_conditions(Run(place, read_manifest(place / MANIFEST))) if not c.harmless]
    judge = next(iter(judges_of(conditions)), None)
    rates = {c.intervention: c.rates[judge].row for c in conditions if judge in c.rates and not c.over_refusal}
    return {"judge": judge, "refused": rates} if rates else {}


def fingerprint(sets: Sequence[str], directions: Sequence[str]) -> dict[str, str]:
    """Returns the hashes of all files that were given, by their names in the settings."""
    found = {}
    for name, files in set_files(sets).items():
        found |= {f"{name} {side}": file_hash(file) for side, file in zip(("harmful", "harmless"), files, strict=True)}
    for name, rest in named(directions, "directions", "NAME=RUN or NAME=FILE").items():
        found[name] = read_direction([local_path(rest)], subspace=None).sha256
    return found

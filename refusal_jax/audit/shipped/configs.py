"""Compares the config.json files of two checkpoints: what changes the computation, and what only describes it."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from refusal_jax.audit.shipped.reading import record_of
from refusal_jax.errors import shown
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.quantisation import quantisation_of

# Names of fields of `ModelConfig` in words, where they do not speak for themselves.
WORDS = {
    "kinds": "rotary embedding and window",
    "layer_kinds": "kinds of the layers",
    "d_model": "width",
    "d_mlp": "width of the MLP",
}


@dataclasses.dataclass(frozen=True)
class ConfigDifference:
    """A field of the architecture in which two configs differ, with both values in words."""

    field: str
    base: str
    candidate: str


def compare_configs(base: ModelConfig, candidate: ModelConfig) -> list[ConfigDifference]:
    """Returns the fields that differ, which change what is computed but for the vocabulary's size and the context's length."""
    found = []
    for field in dataclasses.fields(ModelConfig):
        before, after = getattr(base, field.name), getattr(candidate, field.name)
        if not _same(before, after):
            if field.name == "kinds":
                before, after = _apart(before, after)
            name = WORDS.get(field.name, field.name.replace("_", " "))
            found.append(ConfigDifference(name, shown(before), shown(after)))
    return found


def _same(before: Any, after: Any) -> bool:
    """Returns whether two values are equal, numbers up to their rounding to float32, as some files hold them."""
    if isinstance(before, float) and isinstance(after, float):
        return math.isclose(before, after, rel_tol=2**-23)
    return before == after


def _apart(before: tuple, after: tuple) -> tuple[Any, Any]:
    """Returns of two tuples of kinds of attention only the values that differ, by name."""
    flat = [_flat([dataclasses.asdict(kind) for kind in kinds]) for kinds in (before, after)]
    names = [name for name in flat[0].keys() | flat[1].keys() if flat[0].get(name) != flat[1].get(name)]
    one, other = ({name: part.get(name) for name in sorted(names)} for part in flat)
    return one, other


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {name: one for key, inner in value.items() for name, one in _flat(inner, f"{prefix}{key}.").items()}
    if isinstance(value, list):
        return {name: one for key, inner in enumerate(value) for name, one in _flat(inner, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}


def storage(folder: pathlib.Path) -> str:
    """Returns how a checkpoint's weights are quantised, in words; "" if they are not."""
    found = quantisation_of(record_of(folder / "config.json"))
    return found.what if found else ""


def own_code(folder: pathlib.Path) -> list[str]:
    """Returns the code that a checkpoint brings for the classes that its config names, which is never run here."""
    mapped = record_of(folder / "config.json").get("auto_map")
    return sorted(str(name)[:100] for name in mapped.values())[:20] if isinstance(mapped, dict) else []

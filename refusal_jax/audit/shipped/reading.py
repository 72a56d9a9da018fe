"""Reads what strangers wrote beside a checkpoint's weights: it may be missing, huge, of another type, or no text at all."""

import json
import os
import pathlib
from typing import Any

import yaml

from refusal_jax.checkpoints.adapters import adapter_parts
from refusal_jax.checkpoints.hub import snapshot_of
from refusal_jax.checkpoints.mirrors import on_the_hub

MOST = 16 << 20  # bytes that are read of a file


class _WithoutAliases(yaml.SafeLoader):
    """Refuses aliases, by which a few lines of YAML can stand for more than fits in memory."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)


def text_of(path: pathlib.Path, most: int = MOST) -> str:
    """Returns the first `most` bytes of a file as text, with U+FFFD for what is none; "" for a file that cannot be read."""
    try:
        if not os.path.isfile(path):
            return ""
        with open(path, "rb") as file:
            return file.read(most).decode("utf-8", "replace")
    except OSError:
        return ""


def record_of(path: pathlib.Path) -> dict[str, Any]:
    """Returns the JSON object in a file, {} for anything else."""
    try:
        found = json.loads(text_of(path))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def yaml_of(text: str) -> dict[str, Any]:
    """Returns the mapping in a YAML text, {} for anything else."""
    try:
        found = yaml.load(text[:MOST], Loader=_WithoutAliases)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def at(value: Any, *keys: str) -> Any:
    """Returns what nested objects hold at a path of keys, None if they hold nothing there."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def words(value: Any, most: int = 200) -> str:
    """Returns a text of a file on one line, cut; "" for any other value."""
    return " ".join(value.split())[:most] if isinstance(value, str) else ""


def texts(value: Any, most: int = 100) -> list[str]:
    """Returns a text, or those in a list, as `words` does."""
    values = value[:most] if isinstance(value, list) else [value]
    return [text for one in values if (text := words(one))]


def places(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the folders that hold what was shipped with a checkpoint: its own; of an adapter's mirror the adapter's; and of a
    mirror of the hub the hub's cache, which may hold more files."""
    parts = adapter_parts(folder)
    found = [parts[0] if parts else folder]
    named = on_the_hub(found[0])
    if named is not None:
        found.append(snapshot_of(named))
    return list(dict.fromkeys(found))

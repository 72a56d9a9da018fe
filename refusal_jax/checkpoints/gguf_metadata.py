"""Takes settings out of the metadata of a GGUF file: what may change the logits and is not taken is an error.

Numbers of float32 are read as they were before they were stored, 1e-06 and not 9.99999997e-07.
"""

import math
from typing import Any

import numpy as np

from refusal_jax.checkpoints.gguf_header import GgufHeader
from refusal_jax.errors import UserError, shown

# Keys of any architecture that tell where a model comes from, or repeat what its tensors say.
INERT = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "attention.layer_norm_epsilon")


class Metadata:
    """Takes an architecture's settings out of a file's metadata, and remembers which, so that the rest can be judged."""

    def __init__(self, header: GgufHeader, architecture: str):
        self.header, self.architecture = header, architecture
        self.seen: set[str] = set(INERT)
        self.problems: list[str] = []

    def named(self, key: str) -> bool:
        """Returns whether the file has a setting of this architecture."""
        return f"{self.architecture}.{key}" in self.header.metadata

    def has(self, ending: str) -> bool:
        """Returns whether any tensor's name ends so."""
        return any(name.endswith(ending) for name in self.header.tensors)

    def take(self, key: str, kind: type, default: Any = None, required: bool = False) -> Any:
        """Returns a setting; of a list of layers of which some have none, the value of the others. Anything wrong becomes a
        problem."""
        self.seen.add(key)
        found: Any = self.header.metadata.get(f"{self.architecture}.{key}")
        some = [one for one in found if one] or found if isinstance(found, list) else []
        same = bool(some) and all(one == some[0] for one in some)
        value: Any = some[0] if same else found
        if value is None:
            if required:
                self.problems.append(f"{self.architecture}.{key} is missing")
            return default
        right = type(value) in ((int, float) if kind is float else (kind,))
        if not right or (kind is not bool and not 0 <= value < 2**31):
            self.problems.append(f"{self.architecture}.{key} = {shown(found)}, expected one {kind.__name__} in range")
            return default
        return plain(value) if kind is float else value

    def each(self, key: str, count: int) -> list[int]:
        """Returns a whole number for each of `count` layers, given as one or as a list. Anything wrong becomes a problem."""
        self.seen.add(key)
        found = self.header.metadata.get(f"{self.architecture}.{key}")
        values: list[Any] = found if isinstance(found, list) else [found] * count
        if len(values) != count or not all(type(one) is int and 0 <= one < 2**31 for one in values):
            self.problems.append(
                f"{self.architecture}.{key} = {shown(found)}, expected a whole number for each of {count} layers"
            )
            return [1] * count
        return values

    def only(self, key: str, *values: Any) -> None:
        """Makes any value of a setting but these a problem."""
        self.seen.add(key)
        found = self.header.metadata.get(f"{self.architecture}.{key}")
        if found is not None and found not in values:
            self.problems.append(f"{self.architecture}.{key} = {shown(found)}, and only {shown(values[0])} is computed")

    def finish(self) -> None:
        """Raises UserError if there is any problem. Settings that are zero, false or empty are off."""
        prefix = f"{self.architecture}."
        for key, value in sorted(self.header.metadata.items()):
            if key.startswith(prefix) and key.removeprefix(prefix) not in self.seen and value not in (0, False, "", []):
                self.problems.append(f"{key[:80]} = {shown(value)} is not supported")
        if self.problems:
            raise UserError(
                f"{self.header.paths[0]} cannot be run faithfully: {'; '.join(self.problems)}. Nothing was loaded, because "
                "ignoring a setting would give wrong activations. Use the original Hugging Face checkpoint of the model."
            )


def windows(read: Metadata, config: dict, every: int) -> list[str]:
    """Returns the kind of each layer: one in `every` sees all tokens, where the file says nothing else."""
    key, count = "attention.sliding_window_pattern", config["num_hidden_layers"] or 0
    value = read.header.metadata.get(f"{read.architecture}.{key}")
    read.seen.add(key)
    if isinstance(value, list):
        if len(value) != count:
            read.problems.append(
                f"{read.architecture}.{key} has {len(value)} values, expected one for each of {count} layers"
            )
        windowed = [bool(one) for one in value]
    else:
        every = every if value is None else read.take(key, int, every)
        windowed = [every == 0 or (layer + 1) % every != 0 for layer in range(count)]
    return ["sliding_attention" if is_windowed else "full_attention" for is_windowed in windowed]


def plain(value: float | int) -> float:
    """Returns the shortest decimal number that float32 stores as this one."""
    return float(str(np.float32(value))) if math.isfinite(value) else float(value)

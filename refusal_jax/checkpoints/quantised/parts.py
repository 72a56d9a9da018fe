"""The tensors of a quantised checkpoint, from which a format takes what belongs to each weight, and what is wrong with them."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Shaped

from refusal_jax.checkpoints.quantised.matrices import whole
from refusal_jax.checkpoints.tensors import PlainTensor, Tensor
from refusal_jax.models.quantisation import Quantisation

READERS = 16  # threads that read small tensors
# What the formats' own runtimes quantise activations and caches with, which are not quantised here.
RUNTIME = re.compile(
    r"\.(input|activation|output|[qkv]|[kv]_proj\.[kv]|kv)_scale(_ub)?$|\.(input|output)_(global_scale|zero_point|min|max)$|"
    r"\.[qkv]_zero_point$|\.input_amax$|\.kv_cache_scale$"
)
# Where quantization_config names the modules that are not quantised.
SKIPPED = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules", "llm_int8_skip_modules")


@dataclasses.dataclass
class Parts:
    """left: the tensors by name that no weight has taken. found: the weights that were put together. problems: what is wrong."""

    left: dict[str, PlainTensor]
    given: Quantisation
    found: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, tensors: Mapping[str, PlainTensor], given: Quantisation) -> "Parts":
        """Returns all tensors but those that concern activations and caches."""
        return cls({name: t for name, t in tensors.items() if not RUNTIME.search(name)}, given)

    def owners(self, ending: str) -> list[str]:
        """Returns the names, without it, of the tensors that have this ending."""
        return [name.removesuffix(ending) for name in self.left if name.endswith(ending)]

    def take(self, name: str) -> PlainTensor | None:
        """Removes a tensor and returns it, if there is one of this name."""
        return self.left.pop(name, None)

    def need(self, owner: str, *endings: str) -> list[PlainTensor] | None:
        """Removes the tensors of a module that have these endings and returns them; None, and a problem, if one is missing."""
        found = {ending: self.left.pop(owner + ending, None) for ending in endings}
        missing = [ending for ending, tensor in found.items() if tensor is None]
        if missing:
            self.problems.append(f"{owner} has no {', '.join(ending.lstrip('.') for ending in missing)}")
            return None
        return [tensor for tensor in found.values() if tensor is not None]

    def read(self, tensors: Sequence[PlainTensor]) -> list[Shaped[np.ndarray, "..."]]:
        """Reads small tensors whole, many at a time, as they may be in a store. Raises UserError if a file cannot be read."""
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(whole, tensors))

    def fits(self, tensor: PlainTensor, shape: tuple[int, ...], *dtypes: str) -> bool:
        """Returns whether a tensor is of this shape and one of these dtypes; it is a problem if not."""
        if tensor.shape == shape and tensor.dtype in dtypes:
            return True
        self.problems.append(
            f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}, expected {' or '.join(dtypes)} {list(shape)}"
        )
        return False

    def add(self, name: str, tensor: Tensor) -> None:
        """Adds a weight; it is a problem if there is one of this name, or if its module is not to be quantised."""
        if name in self.left or name in self.found:
            self.problems.append(f"{name} is there as it is and quantised")
        module = name.removesuffix(".weight")
        entry = next((e for e in self.skipped if is_of(module, e)), None)
        if entry is not None:
            self.problems.append(f"{name} is quantised, but quantization_config names {entry} as not quantised")
        self.found[name] = tensor

    @property
    def skipped(self) -> list[str]:
        """Returns the names of modules that are said not to be quantised; patterns are not among them."""
        lists = [self.given.settings.get(key) for key in SKIPPED]
        entries = [entry for found in lists if isinstance(found, list) for entry in found]
        return [entry for entry in entries if isinstance(entry, str) and re.fullmatch(r"\w[\w.]*", entry)]


def is_of(module: str, entry: str) -> bool:
    """Returns whether a module is the one that is named, or in it: the whole name, its beginning or its end."""
    return module == entry or module.startswith(f"{entry}.") or module.endswith(f".{entry}")

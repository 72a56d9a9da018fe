"""The descriptions that stages of a study give to the planner: compiled programs, how often they run, and the shapes of
their inputs.

Shapes suffice, so that a program is compiled without a device's memory. Which programs there are is the stages' part: they
hand in a `Group` each.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from refusal_jax.edits import SITES, Edits
from refusal_jax.models.cache import map_memory
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.decoder import Decoder, Residuals
from refusal_jax.models.generate import empty
from refusal_jax.models.sharding import kept_sharding, residual_axes, sharding_of, split_for, weight_place
from refusal_jax.models.weights import weight_table

USUAL_LENGTH = 64  # padded tokens that hold nearly every prompt of the paper's sets with its template
POSITIONS = 5  # post-instruction tokens of most chat templates


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Rows of a batch in forward passes, in selection (edits times prompts), in generation, and in measuring the loss."""

    forward: int
    select: int
    generation: int
    loss: int

    def with_settings(self, config: Any) -> "Sizes":
        """Returns the sizes with those in place that the study's settings give; 0 there means that it is left open."""
        set_ = (config.batch_size, config.select.batch_size, config.generation.batch_size, config.loss.batch_size)
        return Sizes(*(given or own for given, own in zip(set_, dataclasses.astuple(self), strict=True)))


@dataclasses.dataclass(frozen=True)
class Workload:
    """The model and settings of a study that is planned.

    cfg: the model's. dtype: of its weights. config: the study's settings. length: tokens that its prompts are padded to.
    groups: the programs of its stages, in the order of the study. beside: bytes of the weights of another model that is on the
    devices at the same time. further: the settings of further stages of a finished study, where these are planned.
    """

    cfg: ModelConfig
    dtype: str
    config: Any
    length: int
    groups: tuple["Group", ...]
    beside: int = 0
    further: Any = None

    @property
    def positions(self) -> int:
        """Returns the number of candidate positions, a usual one where the template decides it."""
        return self.config.positions or POSITIONS

    @property
    def slots(self) -> int:
        """Returns the tokens of a row in generation: the prompt's and the reply's."""
        return self.length + self.config.generation.max_new_tokens


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program.

    runs: how often a study calls it. layers: of the model, that a call runs through on average. rows, tokens: of a call's
    batch, and of each row. turns: of loops that end on a condition, in a call. steps: forward passes in a call. cached:
    tokens of a row that attention reads besides its own. read: tokens of a row whose logits are computed.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    runs: float
    rows: int
    tokens: int
    layers: float
    turns: int = 1
    steps: float = 1.0
    cached: int = 0
    read: int = 1


@dataclasses.dataclass(frozen=True)
class Group:
    """The programs of one stage.

    name: of the stage, in plans. field: the field of `Sizes` whose rows its batches have. describe: gives the programs for
    stand-ins and a number of rows. deciding: how many of them, from the first, are compiled to see whether so many rows fit;
    0 means all. assumed: what their number of runs assumes, as a clause that follows "assume that".
    """

    name: str
    field: str
    describe: Callable[["Shapes", int], list[Program]]
    deciding: int = 0
    assumed: str = ""

    def largest(self, shapes: "Shapes", rows: int) -> list[Program]:
        """Returns the programs that decide whether `rows` rows fit."""
        return self.describe(shapes, rows)[: self.deciding or None]


class Shapes:
    """Stand-ins for what programs take, placed on a mesh."""

    def __init__(self, work: Workload, mesh: jax.sharding.Mesh | None):
        self.work, self.mesh = work, split_for(mesh, work.cfg.n_kv_heads)

    @functools.cached_property
    def decoder(self) -> Decoder:
        """Returns the model without weights."""
        return Decoder.abstract(self.work.cfg, jnp.dtype(self.work.dtype), self.mesh)

    def array(self, shape, dtype, *axes: str | None) -> jax.ShapeDtypeStruct:
        """Returns a stand-in for an array, placed by the logical names of its first axes."""
        named = [(axis, size) if axis else None for axis, size in zip(axes, shape, strict=False)]
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding_of(self.mesh, *named))

    def edits(self, rows: int, axis: str | None = "batch") -> Edits:
        """Returns stand-ins for edits of one direction a row."""
        cfg = self.work.cfg
        parts: list[Any] = [
            self.array((rows, 1, cfg.d_model), jnp.float32, axis),
            self.array((rows, cfg.n_layers, len(SITES)), jnp.float32, axis),
            self.array((rows, cfg.d_model), jnp.float32, axis),
            self.array((rows, 1), jnp.int32, axis),
        ]
        return Edits(*parts)

    def prompts(self, rows: int, length: int | None = None) -> tuple:
        """Returns stand-ins for tokens and mask `[B, T]`."""
        shape = rows, length or self.work.length
        return self.array(shape, jnp.int32, "batch"), self.array(shape, jnp.bool_, "batch")

    def residuals(self, rows: int) -> Residuals:
        """Returns stand-ins for the residual stream `[B, T, D]` between two layers, and for what layers are told besides."""
        cfg, dtype = self.work.cfg, jnp.dtype(self.work.dtype)
        tokens = rows, self.work.length
        told = self.array((*tokens, cfg.n_layers, cfg.d_per_layer), dtype, "batch") if cfg.d_per_layer else None
        x = self.array((*tokens, cfg.d_model), dtype)
        if self.mesh is not None:
            spec = PartitionSpec(*residual_axes(self.mesh, *tokens))
            x = jax.ShapeDtypeStruct(x.shape, dtype, sharding=NamedSharding(self.mesh, spec))
        parts: list[Any] = [x, told]
        return Residuals(*parts)

    def logits(self, rows: int) -> jax.ShapeDtypeStruct:
        """Returns a stand-in for the logits `[B, V]` of one token a row."""
        (width, _), _ = weight_place(self.mesh, weight_table(self.work.cfg)["embed"])
        return self.array((rows, width), jnp.float32, "batch", "vocab")

    def generation(self, rows: int):
        """Returns stand-ins for the state that decoding goes on from."""
        sizes = {"length": self.work.length, "max_new_tokens": self.work.config.generation.max_new_tokens}
        state = jax.eval_shape(functools.partial(empty, rows=rows, pad_id=0, **sizes), self.decoder)
        memory = map_memory(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=kept_sharding(self.mesh, a.shape)),
            lambda a: self.array(a.shape, a.dtype, None, "batch", "heads"),
            state.cache.memory,
        )
        rest = jax.tree.map(lambda a: self.array(a.shape, a.dtype, *["batch"][: a.ndim]), state)
        return dataclasses.replace(rest, cache=dataclasses.replace(rest.cache, memory=memory))


def programs(shapes: Shapes, sizes: Sizes) -> list[Program]:
    """Returns all programs that take time or memory, in the order of the study."""
    return [p for group in shapes.work.groups for p in group.describe(shapes, getattr(sizes, group.field))]

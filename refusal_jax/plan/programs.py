"""The programs that a study runs, how often, and what goes into them: shapes only, to compile without a device's memory."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from refusal_jax.chat.prompts import bucket
from refusal_jax.edits import SITES, Edits
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.generate import admit, admitted_rows, decode, empty
from refusal_jax.models.sharding import residual_axes, sharding_of, split_for, weight_place
from refusal_jax.models.weights import weight_table
from refusal_jax.study.activations import extract_batch
from refusal_jax.study.loss import kl_batch, loss_batch
from refusal_jax.study.selection import Rule, last_logits, score_edits, score_from_layer
from refusal_jax.taps import Taps

# Of the candidates that the layers leave, how many pass the filter's next steps: means of the paper's five published runs.
PASS_INDUCE, PASS_KL = 0.25, 0.12
USUAL_LENGTH = 64  # padded tokens that hold nearly every prompt of the paper's sets with its template
POSITIONS = 5  # post-instruction tokens of most chat templates


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Rows of a batch: of forward passes, of selection (edits times prompts), of generation, of the loss."""

    forward: int
    select: int
    generation: int
    loss: int

    def with_settings(self, config: ConfigDict) -> "Sizes":
        """With what the config sets instead; 0 there means that it is left open."""
        set_ = (config.batch_size, config.select.batch_size, config.generation.batch_size, config.loss.batch_size)
        return Sizes(*(given or own for given, own in zip(set_, dataclasses.astuple(self), strict=True)))


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is studied, and with how much: a model's config, its weights' dtype, a study's config, and the padded length of
    its prompts in tokens."""

    cfg: ModelConfig
    dtype: str
    config: ConfigDict
    length: int

    @property
    def positions(self) -> int:
        return self.config.positions or POSITIONS

    @property
    def candidates(self) -> int:
        """Directions at layers that are not pruned."""
        select = self.config.select
        rule = Rule(self.cfg.n_layers, prune_fraction=select.prune_fraction)
        return self.positions * (self.cfg.n_layers if select.full_grid else rule.layer_limit)

    @property
    def replies(self) -> int:
        conditions = len(self.config.generation.conditions) + 2 * len(self.config.data.over_refusal)
        return self.config.data.n_test * conditions

    @property
    def slots(self) -> int:
        """Tokens of a row in generation."""
        return self.length + self.config.generation.max_new_tokens


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program. runs: how often a study calls it; layers: of the model, that a call runs through on average;
    rows, tokens: of a call's batch and of each row; turns: of loops that end on a condition, in a call; steps: forward
    passes in a call; cached: tokens of a row that attention reads besides its own."""

    name: str
    stage: str
    lower: Callable[[], jax.stages.Lowered]
    runs: float
    rows: int
    tokens: int
    layers: float
    turns: int = 1
    steps: float = 1.0
    cached: int = 0


class Shapes:
    """Stand-ins for what programs take, placed on a mesh."""

    def __init__(self, work: Workload, mesh: jax.sharding.Mesh | None):
        self.work, self.mesh = work, split_for(mesh, work.cfg.n_kv_heads)

    @functools.cached_property
    def decoder(self) -> Decoder:
        return Decoder.abstract(self.work.cfg, jnp.dtype(self.work.dtype), self.mesh)

    def array(self, shape, dtype, *axes: str | None) -> jax.ShapeDtypeStruct:
        named = [axis and (axis, size) for axis, size in zip(axes, shape, strict=False)]
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding_of(self.mesh, *named))

    def edits(self, rows: int, axis: str | None = "batch") -> Edits:
        cfg = self.work.cfg
        return Edits(
            self.array((rows, cfg.d_model), jnp.float32, axis),
            self.array((rows, cfg.n_layers, len(SITES)), jnp.float32, axis),
            self.array((rows, cfg.d_model), jnp.float32, axis),
            self.array((rows,), jnp.int32, axis),
        )

    def prompts(self, rows: int, length: int | None = None) -> tuple:
        shape = rows, length or self.work.length
        return self.array(shape, jnp.int32, "batch"), self.array(shape, jnp.bool_, "batch")

    def residual(self, rows: int) -> jax.ShapeDtypeStruct:
        shape, dtype = (rows, self.work.length, self.work.cfg.d_model), jnp.dtype(self.work.dtype)
        if self.mesh is None:
            return self.array(shape, dtype)
        spec = PartitionSpec(*residual_axes(self.mesh, *shape[:2]))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))

    def logits(self, rows: int) -> jax.ShapeDtypeStruct:
        (width, _), _ = weight_place(self.mesh, weight_table(self.work.cfg)["embed"])
        return self.array((rows, width), jnp.float32, "batch", "vocab")

    def generation(self, rows: int):
        """The state that decoding goes on from."""
        sizes = {"length": self.work.length, "max_new_tokens": self.work.config.generation.max_new_tokens}
        state = jax.eval_shape(functools.partial(empty, rows=rows, pad_id=0, **sizes), self.decoder)
        kv = [
            self.array(a.shape, a.dtype, *[None] * (a.ndim - 4), "batch", "kv_heads")
            for a in jax.tree.leaves(state.cache.kv)
        ]
        kv = jax.tree.unflatten(jax.tree.structure(state.cache.kv), kv)
        rest = jax.tree.map(lambda a: self.array(a.shape, a.dtype, *["batch"][: a.ndim]), state)
        return dataclasses.replace(rest, cache=dataclasses.replace(rest.cache, kv=kv))


def extraction(shapes: Shapes, rows: int) -> Program:
    work = shapes.work
    data, taps = work.config.data, Taps(("resid_pre",), work.positions)
    runs = sum(2 * math.ceil(n / rows) for n in (data.n_train, data.n_val))

    def lower():
        inputs = *shapes.prompts(rows), shapes.edits(rows)
        valid, ids = shapes.array((rows,), jnp.bool_), shapes.array((1,), jnp.int32)
        return extract_batch.lower(shapes.decoder, *inputs, valid, 1, ids, taps)

    return Program("extraction", "extraction", lower, runs, rows, work.length, work.cfg.n_layers)


def selection(shapes: Shapes, rows: int) -> list[Program]:
    """The programs of selection in `rows` rows: each edit's score on all val prompts, from all layers and from later ones."""
    work, prompts = shapes.work, min(rows, 8 * math.ceil(shapes.work.config.data.n_val / 8))
    batches, at_once = math.ceil(work.config.data.n_val / prompts), max(rows // prompts, 1)
    n_layers, positions = work.cfg.n_layers, work.positions
    climbed = work.candidates // positions
    together = math.ceil(positions / math.ceil(positions / at_once))
    left = sum(n_layers - layer for layer in range(climbed)) / max(climbed, 1)
    full = work.config.select.full_grid
    scored = work.candidates * (2.0 if full else PASS_INDUCE + PASS_KL)

    def ids():
        return shapes.array((1,), jnp.int32)

    def scores():
        inputs = *shapes.prompts(prompts), shapes.edits(at_once, None), shapes.logits(prompts)
        return score_edits.lower(shapes.decoder, *inputs, ids())

    def later():
        x = shapes.residual(prompts)
        mask = shapes.prompts(prompts)[1]
        return score_from_layer.lower(shapes.decoder, x, mask, shapes.edits(together, None), 0, ids())

    def base():
        return last_logits.lower(shapes.decoder, *shapes.prompts(prompts), shapes.edits(prompts))

    def program(name, lower, runs, many, layers):
        turns = n_layers  # where a loop has no bound in the text; costs come down by the share of the layers
        return Program(name, "selection", lower, runs * batches, many * prompts, work.length, layers, turns)

    return [
        program("scores", scores, math.ceil(scored / at_once), at_once, n_layers),
        program("induce", later, climbed * math.ceil(positions / together), together, left),
        program("baseline", base, 2 + climbed / n_layers, 1, n_layers),  # and the climb itself, layer by layer
    ]


def generation(shapes: Shapes, rows: int) -> list[Program]:
    """Prompts admitted to rows that others have left, and decoding, as if every reply were as long as it may be."""
    work, refill, ending = shapes.work, admitted_rows(rows, shapes.mesh), {"eos_ids": (1,)}
    steps, n_layers = work.config.generation.max_new_tokens, work.cfg.n_layers

    def admitted():
        inputs = *shapes.prompts(refill), shapes.edits(refill), shapes.array((rows,), jnp.int32)
        return admit.lower(shapes.decoder, shapes.generation(rows), *inputs, pad_id=0, **ending)

    def decoded():
        return decode.lower(shapes.decoder, shapes.generation(rows), 1, 1, **ending)

    rounds = max(work.replies / rows, 1.0)
    return [
        Program("admit", "completions", admitted, math.ceil(work.replies / refill), refill, work.length, n_layers),
        Program("decode", "completions", decoded, rounds, rows, 1, n_layers, steps, steps, work.slots),
    ]


def loss(shapes: Shapes, rows: int) -> list[Program]:
    """Loss on the model's own replies under three interventions, and KL under two; other texts are the user's."""
    work = shapes.work
    length = bucket(work.slots)
    batches = math.ceil(work.config.data.n_test / rows)

    def program(name, jitted, runs, steps):
        def lower():
            inputs = *shapes.prompts(rows, length), shapes.edits(rows), shapes.array((rows, length), jnp.bool_)
            return jitted.lower(shapes.decoder, *inputs)

        return Program(name, "loss", lower, runs * batches, rows, length, work.cfg.n_layers, steps=steps)

    return [program("loss", loss_batch, 3, 1), program("KL", kl_batch, 2, 2)]


def programs(shapes: Shapes, sizes: Sizes) -> list[Program]:
    """All that take time or memory, in the order of the study."""
    return [
        extraction(shapes, sizes.forward),
        *selection(shapes, sizes.select),
        *generation(shapes, sizes.generation),
        *loss(shapes, sizes.loss),
    ]

"""The work of programs: operations, bytes from and to memory, and bytes to other devices, from the model's shape.

Everything is for a mesh and a number of rows, and nothing is compiled. The limit of a program is the largest of three times:
its operations at the chip's peak, its bytes at the memory's bandwidth, and what it sends at the bandwidth of its links.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from refusal_jax.models.cache import map_memory
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.layers import block_rows
from refusal_jax.models.mixers.attention import Attention
from refusal_jax.models.mixers.latent import Latent
from refusal_jax.models.mixers.mixer import Mixer
from refusal_jax.models.sharding import SPLIT_AXES, STORAGE, kept_axes
from refusal_jax.models.structure import structure
from refusal_jax.models.weights import weight_table
from refusal_jax.plan.chips import Slice
from refusal_jax.plan.programs import Program, Workload

LANES = 128  # of a TPU: the last axis of an array is laid out in so many


@runtime_checkable
class Sides(Protocol):
    """The lengths of a mesh's axes: `jax.sharding.Mesh`, or a mesh without devices."""

    @property
    def shape(self) -> Mapping[str, int]: ...
    @property
    def size(self) -> int: ...


def parts(mesh: Sides) -> tuple[int, int]:
    """Returns the number of parts of a batch, and the devices that share the work on each."""
    batch = mesh.shape["data"] * mesh.shape[STORAGE]
    return batch, mesh.size // batch


def together(program: Program, mesh: Sides) -> int:
    """Returns the tokens that a device computes at once: those of its part of the batch."""
    return max(program.rows // parts(mesh)[0], 1) * program.tokens


def parameters(cfg: ModelConfig, active: bool = False) -> int:
    """Returns the number of parameters.

    active: counts only those used per token, which leaves out experts that are not chosen and embeddings.
    """
    looked_up, others, experts = _counts(cfg)
    if not active:
        return looked_up + others + experts
    return others + experts * cfg.experts_per_token // max(cfg.n_experts, 1)


@functools.cache
def _counts(cfg: ModelConfig) -> tuple[int, int, int]:
    """Returns the number of parameters that are only looked up, that every token is multiplied with, and of experts."""
    counts, embeddings = [0, 0, 0], {"per_layer_embed"} | (set() if cfg.tied_embeddings else {"embed"})
    for path, weight in weight_table(cfg).items():
        counts[0 if path in embeddings else 2 if weight.per_expert else 1] += math.prod(weight.shape)
    return counts[0], counts[1], counts[2]


def expert_turns(cfg: ModelConfig, tokens: int) -> float:
    """Returns how many blocks of rows the experts of a layer multiply, if every expert is as likely as the others.

    tokens: that are routed together. A block has the rows of one expert: as many as there are, up to `block_rows`.
    """
    chosen, rows = cfg.experts_per_token / cfg.n_experts, block_rows(tokens * cfg.experts_per_token, cfg.n_experts)
    # The rows of an expert are binomial: each multiple of `rows` that they exceed begins a block.
    return cfg.n_experts * sum(_above(tokens, chosen, first) for first in range(0, tokens, rows))


def _above(n: int, p: float, count: int) -> float:
    """Returns the probability that a binomial number is above `count`, for 0 exactly, for others as if it were normal."""
    if count == 0:
        return 1 - (1 - p) ** n
    deviation = math.sqrt(n * p * (1 - p)) or 1e-9
    return 0.5 * math.erfc((count + 0.5 - n * p) / deviation / math.sqrt(2))


@functools.cache
def mlp_width(cfg: ModelConfig) -> float:
    """Returns the width of what a token goes through in MLPs, with experts and without, on average over the layers."""
    total = 0
    for path, weight in weight_table(cfg).items():
        if path.endswith("down") and weight.axes[-1] == "mlp":
            each = cfg.experts_per_token if weight.per_expert else 1
            total += len(weight.layers) * weight.shape[-1] * each
    return total / cfg.n_layers


@functools.cache
def mixing(cfg: ModelConfig, mixer: Any, seen: int, past: bool) -> float:
    """Returns the operations of a sequence mixer for each token, besides those with its weights.

    seen: the tokens that each token is multiplied with, which are all in memory: windows only leave out what comes of it.
    past: whether there are tokens before. A state's entries are each read, changed and read again.
    """
    if mixer is None:
        return 0
    inner = [part for part in vars(mixer).values() if isinstance(part, Mixer)]
    if inner:
        return sum(mixing(cfg, part, seen, past) for part in inner)
    if isinstance(mixer, Attention):
        heads, _, width = mixer.sizes(cfg)
        return 4 * seen * heads * width
    if isinstance(mixer, Latent):
        latent, width = mixer.kv_rank + mixer.rope_dim, mixer.plain_dim + mixer.rope_dim
        return 2 * seen * cfg.n_heads * (2 * latent if past else width + mixer.v_dim)
    states = jax.eval_shape(lambda: mixer.memory(cfg, 1, 1, jnp.float32))
    return 6 * sum(math.prod(a.shape) for a in jax.tree.leaves(states))


def weight_bytes(work: Workload) -> int:
    """Returns the bytes of all weights."""
    return parameters(work.cfg) * jnp.dtype(work.dtype).itemsize


def cache_bytes(work: Workload, rows: int, model: int = 1, states: int = 1) -> int:
    """Returns the bytes that `rows` rows keep in generation on each of `model` chips: keys and values, whose heads and rows they
    divide, and states, whose heads they divide and which count `states` times."""
    return _kept_bytes(work.cfg, rows, work.slots, work.dtype, model, states)


@functools.cache
def _kept_bytes(cfg: ModelConfig, rows: int, slots: int, dtype: str, model: int, states: int) -> int:
    empty = jax.eval_shape(lambda: structure(cfg).empty(rows, slots, jnp.dtype(dtype)))
    kv = math.gcd(model, cfg.n_kv_heads)
    sides = jax.sharding.AbstractMesh((1, 1, kv, model // kv), SPLIT_AXES)

    def size(a) -> int:
        return math.prod(a.shape) * a.dtype.itemsize

    def tokens(a) -> int:
        ways = (sides.shape[name] for axes in kept_axes(sides, *a.shape[1:3]) for name in axes)
        return size(a) // math.prod(ways)

    return sum(jax.tree.leaves(map_memory(tokens, lambda a: states * size(a) // math.gcd(model, a.shape[2]), empty)))


def flops(work: Workload, program: Program) -> float:
    """Returns the operations of one run on all chips: two for each active parameter and token, and those of the mixers."""
    cfg, form, tokens = work.cfg, structure(work.cfg), program.rows * program.tokens * program.steps
    unembedding = cfg.vocab_size * cfg.d_model
    in_layers = 2 * (parameters(cfg, active=True) - unembedding)
    seen = program.tokens + program.cached
    mixed = sum(n * mixing(cfg, form.mixers[i], seen, program.cached > 0) for i, n in Counter(form.mixer_l).items())
    in_layers = (in_layers + mixed) * program.layers / cfg.n_layers
    return tokens * in_layers + 2 * unembedding * program.rows * program.read * program.steps


def traffic(work: Workload, program: Program, mesh: Sides) -> float:
    """Returns the HBM traffic of one chip in one run, in bytes: the weights that a forward pass uses, the cache, activations.

    Of experts those are read that a token of the batch's part has chosen, once.
    """
    cfg, width, (batch, model) = work.cfg, jnp.dtype(work.dtype).itemsize, parts(mesh)
    tokens = together(program, mesh)
    used = _above(tokens, cfg.experts_per_token / max(cfg.n_experts, 1), 0)
    gathered = 3 if mesh.shape[STORAGE] > 1 else 1  # written and read again
    weights = width * (_counts(cfg)[1] + used * _counts(cfg)[2]) / model * gathered
    inner = 2 * mlp_width(cfg) / model + 6 * cfg.d_model / model + 4 * cfg.d_model
    activations = 2 * width * tokens * inner * program.layers
    # A step reads what is kept; states it replaces as well.
    remembered = cache_bytes(work, max(program.rows // batch, 1), model, states=2) if program.cached else 0
    return program.steps * (weights * program.layers / cfg.n_layers + activations + remembered)


@functools.cache
def expert_layers(cfg: ModelConfig) -> int:
    """Returns the number of layers with experts."""
    return len(cfg.sparse_layers) if _counts(cfg)[2] else 0


def block_work(work: Workload, program: Program, mesh: Sides) -> tuple[tuple[float, float], tuple[float, float]]:
    """Returns the operations and bytes of a device for all experts in one run, as `flops` and `traffic` count them, and for one
    block of one expert: its weights, as wide as the lanes they are laid out in, and its rows before and after two steps."""
    cfg, model, width = work.cfg, parts(mesh)[1], jnp.dtype(work.dtype).itemsize
    tokens, layers = together(program, mesh), program.layers / cfg.n_layers
    expert = _counts(cfg)[2] / cfg.n_experts / expert_layers(cfg) / model
    each_layer = program.steps * layers * expert_layers(cfg)
    used = cfg.n_experts * _above(tokens, cfg.experts_per_token / cfg.n_experts, 0)
    once = 2 * expert * cfg.experts_per_token * tokens * each_layer, used * expert * width * each_layer
    rows, features = block_rows(tokens * cfg.experts_per_token, cfg.n_experts), max(cfg.d_mlp / model, 1)
    laid_out = expert * math.ceil(features / LANES) * LANES / features
    return once, (2 * expert * rows, width * (laid_out + 4 * rows * (cfg.d_expert_io or cfg.d_model)))


def sent(work: Workload, program: Program, mesh: Sides) -> tuple[float, float]:
    """Returns the bytes that a device sends in one run, and in how many exchanges: of each of two projections a layer the sums
    are divided and what is divided is gathered again, and stored weights are gathered."""
    model, width = parts(mesh)[1], jnp.dtype(work.dtype).itemsize
    each = together(program, mesh) * work.cfg.d_model * width
    total = exchanges = 0.0
    if model > 1:
        total += 4 * program.layers * each * (model - 1) / model
        exchanges += 4 * program.layers
    if mesh.shape[STORAGE] > 1:
        stored = weight_bytes(work) * program.layers / work.cfg.n_layers / model
        total += stored * (mesh.shape[STORAGE] - 1) / mesh.shape[STORAGE]
    return program.steps * total, program.steps * exchanges


@dataclasses.dataclass(frozen=True)
class Limit:
    """The least seconds that something takes, by what binds: each program's limit is under the largest of its three times."""

    compute: float = 0.0
    memory: float = 0.0
    network: float = 0.0

    @property
    def seconds(self) -> float:
        return self.compute + self.memory + self.network

    @property
    def binds(self) -> str:
        """Returns what binds for most of the time."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]

    def __add__(self, other: "Limit") -> "Limit":
        return Limit(self.compute + other.compute, self.memory + other.memory, self.network + other.network)

    def times(self, runs: float) -> "Limit":
        """Returns the limit of so many runs, one after the other."""
        return Limit(self.compute * runs, self.memory * runs, self.network * runs)


def limit(work: Workload, program: Program, mesh: Sides, where: Slice) -> Limit:
    """Returns the limit of one run."""
    each = {
        "compute": flops(work, program) / (mesh.size * where.chip.flops),
        "memory": traffic(work, program, mesh) / where.chip.bandwidth,
        "network": sent(work, program, mesh)[0] / where.chip.links(where.shape),
    }
    binds = max(each, key=lambda name: each[name])
    return Limit(**{binds: each[binds]})

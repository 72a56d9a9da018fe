"""Estimates how long a program takes on a slice, and how much memory it needs.

If the compiled program's text is available, its own cycles are summed; otherwise operations and bytes are divided by
the rates that the chip reaches in practice. Communication is added as if nothing overlapped with it, which makes the
estimate slow; leaving out the host makes it fast.
"""

import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from refusal_jax.models.cache import map_memory
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.mixers.attention import Attention
from refusal_jax.models.mixers.latent import Latent
from refusal_jax.models.mixers.mixer import Mixer
from refusal_jax.models.sharding import STORAGE
from refusal_jax.models.structure import structure
from refusal_jax.models.weights import weight_table
from refusal_jax.plan.chips import GIB, Slice
from refusal_jax.plan.hlo import Instruction, collectives, cycles
from refusal_jax.plan.programs import Program, Workload

FLOPS_SHARE, BANDWIDTH_SHARE = 0.6, 0.65  # of the peaks, as the compiler's cycles come to on v5e
LATENCY = 2e-6  # seconds of one collective, besides its bytes


@runtime_checkable
class Sides(Protocol):
    """The lengths of a mesh's axes: `jax.sharding.Mesh`, or a mesh without devices."""

    @property
    def shape(self) -> Mapping[str, int]: ...
    @property
    def size(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one run of a program.

    peak: bytes of memory on a chip. flops: operations on all chips. bytes: HBM traffic of a chip. seconds: the estimate.
    cycles: whether the seconds are from the compiler's cycles.
    """

    peak: int
    flops: float
    bytes: float
    seconds: float
    cycles: bool


def parameters(cfg: ModelConfig, active: bool = False) -> int:
    """Returns the number of parameters.

    active: counts only those used per token, which leaves out experts that are not chosen and embeddings.
    """
    total = 0
    looked_up = {"per_layer_embed"} | (set() if cfg.tied_embeddings else {"embed"})
    for path, weight in weight_table(cfg).items():
        size = math.prod(weight.shape)
        if active and path in looked_up:
            continue
        if active and weight.per_expert:
            size = size * cfg.experts_per_token // cfg.n_experts
        total += size
    return total


def mlp_width(cfg: ModelConfig) -> float:
    """Returns the width of what a token goes through in MLPs, with experts and without, on average over the layers."""
    total = 0
    for path, weight in weight_table(cfg).items():
        if path.endswith("down") and weight.axes[-1] == "mlp":
            each = cfg.experts_per_token if weight.per_expert else 1
            total += len(weight.layers) * weight.shape[-1] * each
    return total / cfg.n_layers


def mixing(cfg: ModelConfig, mixer: Any, seen: int, past: bool) -> float:
    """Returns the operations of a sequence mixer for each token, besides those with its weights.

    seen: the tokens that each token is multiplied with, which are all in memory: windows only leave out what comes of it.
    past: whether there are tokens before. A state's entries are each read, changed and read again.
    """
    if mixer is None:
        return 0
    parts = [part for part in vars(mixer).values() if isinstance(part, Mixer)]
    if parts:
        return sum(mixing(cfg, part, seen, past) for part in parts)
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
    """Returns the bytes that `rows` rows keep in generation on each of `model` chips, which divide heads: keys and values, and
    states, which count `states` times."""
    empty = jax.eval_shape(lambda: structure(work.cfg).empty(rows, work.slots, jnp.dtype(work.dtype)))

    def here(times: int):
        return lambda a: times * math.prod(a.shape) * a.dtype.itemsize // math.gcd(model, a.shape[2])

    return sum(jax.tree.leaves(map_memory(here(1), here(states), empty)))


def flops(work: Workload, program: Program) -> float:
    """Returns the operations of one run on all chips: two for each active parameter and token, and those of the mixers."""
    cfg, form, tokens = work.cfg, structure(work.cfg), program.rows * program.tokens * program.steps
    unembedding = cfg.vocab_size * cfg.d_model
    in_layers = 2 * (parameters(cfg, active=True) - unembedding)
    seen = program.tokens + program.cached
    mixed = sum(mixing(cfg, form.mixers[index], seen, program.cached > 0) for index in form.mixer_l)
    in_layers = (in_layers + mixed) * program.layers / cfg.n_layers
    return tokens * in_layers + 2 * unembedding * program.rows * program.read * program.steps


def traffic(work: Workload, program: Program, mesh: Sides) -> float:
    """Returns the HBM traffic of one chip in one run, in bytes: weights in each forward pass, the cache, activations."""
    shape = dict(mesh.shape)
    batch = shape["data"] * shape[STORAGE]
    model = mesh.size // batch
    width = jnp.dtype(work.dtype).itemsize
    weights = weight_bytes(work) / model * (3 if shape[STORAGE] > 1 else 1)  # gathered: written and read again
    share = program.layers / work.cfg.n_layers
    tokens = max(program.rows // batch, 1) * program.tokens
    inner = 2 * mlp_width(work.cfg) / model + 6 * work.cfg.d_model / model + 4 * work.cfg.d_model
    activations = 2 * width * tokens * inner * program.layers
    # A step reads what is kept; states it replaces as well.
    remembered = cache_bytes(work, program.rows, model, states=2) / batch if program.cached else 0
    return program.steps * (weights * share + activations + remembered)


def communication(work: Workload, program: Program, mesh: Sides, where: Slice) -> float:
    """Returns the seconds of one run's collectives, from the model's shape: those that GSPMD and the decoder put into a layer."""
    shape = dict(mesh.shape)
    batch, width = shape["data"] * shape[STORAGE], jnp.dtype(work.dtype).itemsize
    model, links = mesh.size // batch, where.chip.links(where.shape)
    moved = max(program.rows // batch, 1) * program.tokens * work.cfg.d_model * width
    seconds = 0.0
    if model > 1:  # two projections a layer, each of which sums (there and back) and gathers
        seconds += 2 * program.layers * (3 * moved * (model - 1) / model / links + 2 * LATENCY)
    if shape[STORAGE] > 1:
        stored = weight_bytes(work) * program.layers / work.cfg.n_layers / model
        seconds += stored * (shape[STORAGE] - 1) / shape[STORAGE] / links
    return program.steps * seconds


def collective_seconds(found: list[Instruction], chips: int, links: float) -> float:
    """Returns the seconds of the collectives of a program's text, one after the other."""
    passes = {"all-reduce": 2.0, "reduce-scatter": float(chips)}  # of the bytes of the result
    return sum(i.times * (passes.get(i.kind, 1.0) * i.bytes / links + LATENCY) for i in found)


def roofline(work: Workload, program: Program, mesh: Sides, where: Slice) -> float:
    """Returns the seconds of one run from operations, bytes and communication."""
    compute = flops(work, program) / (mesh.size * where.chip.flops * FLOPS_SHARE)
    memory = traffic(work, program, mesh) / (where.chip.bandwidth * BANDWIDTH_SHARE)
    return max(compute, memory) + communication(work, program, mesh, where)


@contextlib.contextmanager
def _quiet():
    """Keeps C++ code from writing to stderr."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def text_of(compiled) -> str:
    """Returns the compiled program's text, or "" where libtpu writes what jaxlib cannot read (and prints a trace)."""
    try:
        with _quiet():
            return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        return ""


def cost(work: Workload, program: Program, compiled, mesh: Sides, where: Slice) -> Cost:
    """Returns the cost of a program compiled for `where`."""
    text = "" if work.cfg.n_experts else text_of(compiled)  # how often the experts' loop runs is not in it
    if text:
        model = mesh.size // mesh.shape["data"] // mesh.shape[STORAGE]
        counted = program.turns, structure(work.cfg).taken
        waiting = collective_seconds(collectives(text, *counted), model, where.chip.links(where.shape))
        seconds = cycles(text, *counted) / where.chip.hertz + waiting
        seconds *= program.layers / work.cfg.n_layers  # the text's loop is over all of them
    else:
        seconds = roofline(work, program, mesh, where)
    peak = peak_bytes(compiled)
    return Cost(peak, flops(work, program), traffic(work, program, mesh), seconds, bool(text))


def peak_bytes(compiled) -> int:
    """Returns the most memory that a compiled program needs on a chip, in bytes."""
    return compiled.memory_analysis().peak_memory_in_bytes


def gib(size: float) -> str:
    """Returns a number of bytes in words."""
    return f"{size / GIB:.1f} GiB"

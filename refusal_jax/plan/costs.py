"""Estimates how long a program takes on a slice, and how much memory it needs.

If a program was compiled, its own cycles are summed; otherwise operations and bytes are divided by the rates that compiled
programs reach. Communication is added as if nothing overlapped with it, which makes the estimate slow; leaving out the host
makes it fast.
"""

import contextlib
import dataclasses
import os
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp

from refusal_jax.models.structure import structure
from refusal_jax.plan.chips import GIB, Slice
from refusal_jax.plan.hlo import Instruction, Runs, collectives, cycles
from refusal_jax.plan.limits import (
    Limit,
    Sides,
    block_work,
    cache_bytes,
    expert_layers,
    expert_turns,
    flops,
    limit,
    mlp_width,
    parts,
    sent,
    together,
    traffic,
    weight_bytes,
)
from refusal_jax.plan.programs import Program, Workload

LATENCY = 2e-6  # seconds of one collective, besides its bytes
TURN = 3.6e-6  # seconds of one turn of a loop over blocks of experts, besides its bytes: three instructions of 1,800 cycles


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The costs of a program, compiled or not. peak: bytes of memory on a device. text: "" if there is none."""

    peak: int
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one run of a program.

    peak: bytes of memory on a chip. flops: operations on all chips. bytes: HBM traffic of a chip. seconds: the estimate.
    cycles: whether the seconds are from the compiler's cycles. limit: the least seconds.
    """

    peak: int
    flops: float
    bytes: float
    seconds: float
    cycles: bool
    limit: Limit


def communication(work: Workload, program: Program, mesh: Sides, where: Slice) -> float:
    """Returns the seconds of one run's exchanges, one after the other."""
    total, exchanges = sent(work, program, mesh)
    return total / where.chip.links(where.shape) + LATENCY * exchanges


def collective_seconds(found: list[Instruction], chips: int, links: float) -> float:
    """Returns the seconds of the collectives of a program's text, one after the other."""
    passes = {"all-reduce": 2.0, "reduce-scatter": float(chips)}  # of the bytes of the result, less a device's own part
    others = (chips - 1) / chips
    return sum(i.times * (passes.get(i.kind, 1.0) * others * i.bytes / links + LATENCY) for i in found)


def estimate(work: Workload, program: Program, mesh: Sides, where: Slice) -> float:
    """Returns the seconds of one run from operations, bytes and communication, at the rates that compiled programs reach.

    Blocks of experts read their weights one after the other, each as long as its operations or its bytes take.
    """
    chip, cfg = where.chip, work.cfg
    in_flops, in_bytes = flops(work, program) / mesh.size, traffic(work, program, mesh)
    blocks = 0.0
    if expert_layers(cfg):
        once, block = block_work(work, program, mesh)
        in_flops, in_bytes = in_flops - once[0], in_bytes - once[1]
        each = max(block[0] / chip.flops / chip.reached[0], block[1] / chip.bandwidth / chip.reached[1])
        layers = expert_layers(cfg) * program.layers / cfg.n_layers
        blocks = program.steps * layers * expert_turns(cfg, together(program, mesh)) * (each + TURN)
    compute = in_flops / chip.flops / chip.reached[0]
    memory = in_bytes / chip.bandwidth / chip.reached[1]
    return max(compute, memory) + blocks + communication(work, program, mesh, where)


def memory(work: Workload, program: Program, mesh: Sides) -> int:
    """Returns about how many bytes a program needs on a device: weights, the cache, and what a layer or the logits take."""
    cfg, width, (batch, model) = work.cfg, jnp.dtype(work.dtype).itemsize, parts(mesh)
    tokens, rows = together(program, mesh), max(program.rows // batch, 1)
    kept = cache_bytes(work, max(program.rows // batch, 1), model) if program.cached else 0
    inner = 2 * mlp_width(cfg) / model + 8 * cfg.d_model
    layer = tokens * width * inner + 4 * rows * cfg.n_heads / model * program.tokens * (program.tokens + program.cached)
    logits = 3 * 4 * rows * program.read * cfg.vocab_size / model
    return round((weight_bytes(work) / mesh.shape["fsdp"] / model + kept + max(layer, logits)) * 1.05)


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


def compiled(program: Program) -> Compiled:
    """Returns what the compiler makes of a program for the devices of its mesh. Raises JaxRuntimeError as it does."""
    return Compiled(peak_bytes(program.lower().compile()))


def compiled_with_text(program: Program) -> Compiled:
    """Returns the same with the program's text, as the compiler writes it into a file.

    `as_text` reads the compiler's own form, in which libtpu has instructions that jaxlib does not know (sends by the sparse cores
    of a TPU v7x, many operands of an asynchronous one), and lacks the cycles that some instructions get last.
    """
    with tempfile.TemporaryDirectory() as folder:
        done = program.lower().compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        written = sorted(pathlib.Path(folder).glob("*after_codegen.txt"))
        text = written[-1].read_text(encoding="utf-8", errors="replace") if written else text_of(done)
    return Compiled(peak_bytes(done), text)


def text_of(done) -> str:
    """Returns the compiled program's text, or "" where libtpu writes what jaxlib cannot read (and prints a trace)."""
    try:
        with _quiet():
            return done.as_text() or ""
    except jax.errors.JaxRuntimeError:
        return ""


def runs_of(work: Workload, program: Program, mesh: Sides) -> Runs:
    """Returns how often the parts of a program's text run that it does not say itself."""
    turns = expert_turns(work.cfg, together(program, mesh)) if work.cfg.n_experts else 1.0
    return Runs(program.turns, {"experts": turns}, structure(work.cfg).taken)


def cost(work: Workload, program: Program, done: Compiled, mesh: Sides, where: Slice) -> Cost:
    """Returns the cost of a program on `where`."""
    if done.text:
        runs, model = runs_of(work, program, mesh), parts(mesh)[1]
        waiting = collective_seconds(collectives(done.text, runs), model, where.chip.links(where.shape))
        seconds = cycles(done.text, runs) / where.chip.hertz + waiting
        seconds *= program.layers / work.cfg.n_layers  # the text's loop is over all of them
    else:
        seconds = estimate(work, program, mesh, where)
    bound = limit(work, program, mesh, where)
    return Cost(done.peak, flops(work, program), traffic(work, program, mesh), seconds, bool(done.text), bound)


def peak_bytes(done) -> int:
    """Returns the most memory that a compiled program needs on a chip, in bytes."""
    return done.memory_analysis().peak_memory_in_bytes


def gib(size: float) -> str:
    """Returns a number of bytes in words."""
    return f"{size / GIB:.1f} GiB"

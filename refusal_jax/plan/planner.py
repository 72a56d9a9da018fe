"""Chooses mesh and batches: meshes are ranked by estimate, and on the best ones batches are compiled until they fit, or reckoned.

A run on real devices takes its sizes from the same functions, so that it runs as planned.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

import jax

from refusal_jax.errors import UserError
from refusal_jax.models.sharding import MESH_AXES, make_mesh
from refusal_jax.plan.chips import CHIPS, Slice
from refusal_jax.plan.costs import Compiled, compiled, compiled_with_text, cost, estimate, gib, memory
from refusal_jax.plan.limits import Limit, Sides, cache_bytes, weight_bytes
from refusal_jax.plan.programs import Program, Shapes, Sizes, Workload, programs

WANTED = Sizes(
    forward=128, select=128, generation=128, loss=32
)  # more rows gain little: 8,192 tokens fill a chip's matrix units
# In selection, small batches of prompts of similar length hold little padding.
ON_CPU = Sizes(forward=32, select=16, generation=64, loss=8)
LEAST = 8  # rows
TRIED = 3  # number of meshes to try; usually the first one works
SPARE = 0.97  # fraction of a chip's memory; the rest is for what the compiler does not see
FIELDS = tuple(field.name for field in dataclasses.fields(Sizes))


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """A mesh without devices, by the lengths of its axes; `model` is the ways of tensor parallelism together."""

    data: int
    fsdp: int
    model: int

    @property
    def shape(self) -> dict[str, int]:
        return dict(zip(MESH_AXES, dataclasses.astuple(self), strict=True))

    @property
    def size(self) -> int:
        return self.data * self.fsdp * self.model

    def __str__(self) -> str:
        return " × ".join(f"{name} {size}" for name, size in self.shape.items() if size > 1) or "one device"


def mesh_shapes(chips: int, slices: int = 1) -> Iterator[MeshShape]:
    """Yields every mesh of so many chips whose sides are powers of two times what is left; only data crosses slices."""
    model = 1
    while chips // slices % model == 0:
        fsdp = 1
        while chips // slices % (model * fsdp) == 0:
            yield MeshShape(chips // (model * fsdp), fsdp, model)
            fsdp *= 2
        model *= 2


def ranked_meshes(work: Workload, where: Slice, sizes: Sizes) -> list[MeshShape]:
    """Returns the meshes that hold the weights and the cache of a quarter of the wanted rows, the fastest study first."""
    limit = 0.9 * where.chip.hbm  # something is needed for activations

    def needed(mesh: MeshShape) -> float:
        batch = mesh.data * mesh.fsdp
        cache = cache_bytes(work, max(max(sizes.generation // 4, LEAST) // batch, 1), mesh.model)
        return (weight_bytes(work) + work.beside) / mesh.fsdp / mesh.model + cache

    def seconds(mesh: MeshShape) -> float:
        if mesh.data * mesh.fsdp > max(sizes.generation, LEAST):
            return math.inf  # more parts than rows
        return sum(p.runs * estimate(work, p, mesh, where) for p in programs(Shapes(work, None), sizes))

    fitting = [mesh for mesh in mesh_shapes(where.size, where.slices) if needed(mesh) <= limit]
    return sorted((mesh for mesh in fitting if seconds(mesh) < math.inf), key=seconds)


def deciding(work: Workload, field: str) -> Callable[[Shapes, int], list[Program]]:
    """Returns the function that gives the programs which decide how many rows `field` of `Sizes` may have."""
    return lambda shapes, rows: [p for g in work.groups if g.field == field for p in g.largest(shapes, rows)]


Attempt = Callable[[Program], Compiled]  # raises JaxRuntimeError for a program that does not fit


def _attempted(program: Program, attempt: Attempt) -> tuple[Compiled | None, str]:
    """Returns (what is known of the program, ""), or (None, what the compiler says about memory)."""
    try:
        return attempt(program), ""
    except jax.errors.JaxRuntimeError as error:
        if not any(word in str(error) for word in ("RESOURCE_EXHAUSTED", "Hbm", "memory")):
            raise
        return None, " ".join(str(error).split())


def fit(
    shapes: Shapes,
    given: int,
    wanted: int,
    describe: Callable[[Shapes, int], list[Program]],
    limit: float,
    ways: int,
    note: Callable[[str], None] = lambda text: None,
    attempt: Attempt = compiled,
):
    """Returns the most rows, from `wanted` down by halves, in which all programs of `describe(shapes, rows)` fit into
    `limit` bytes.

    given: the rows that are set, 0 if they are open; then whole shares of `ways`, the parts of a batch, are taken. attempt: gives
    what is known of a program. Returns (rows, [(program, that)], ""), or (0, [], why even the fewest rows do not fit).
    """
    rows, why = given or max(wanted // ways, 1) * ways, ""
    least = given or max(LEAST // ways, 1) * ways
    while rows >= least:
        done = []
        for program in describe(shapes, rows):
            note(f"{program.name}, {rows} rows")
            found, why = _attempted(program, attempt)
            if found is None:
                break
            if found.peak > limit:
                why = f"{program.name} needs {gib(found.peak)} a chip in {rows} rows, of {gib(limit)}"
                break
            done.append((program, found))
        else:
            return rows, done, ""
        rows = rows // 2 // ways * ways
    return 0, [], why


@dataclasses.dataclass(frozen=True)
class Plan:
    """An estimate of what a study needs on a slice.

    sizes: the rows of batches, 0 where nothing fits. stages: the costs of those that fit, by name. problems: what does not
    fit, and why.
    """

    work: Workload
    where: Slice
    mesh: MeshShape | None
    sizes: Sizes
    stages: dict[str, "StageCost"]
    problems: list[str]

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages.values())

    @property
    def limit(self) -> Limit:
        return sum((stage.limit for stage in self.stages.values()), Limit())

    @property
    def peak(self) -> int:
        return max((stage.peak for stage in self.stages.values()), default=0)


@dataclasses.dataclass(frozen=True)
class StageCost:
    """The cost of all runs of a stage's programs.

    flops: operations on all chips. bytes: HBM traffic of one chip. peak: bytes of memory on a chip. cycles: whether the seconds
    are from the compiler's cycles. limit: the least seconds, program by program.
    """

    seconds: float
    flops: float
    bytes: float
    peak: int
    cycles: bool
    limit: Limit

    @classmethod
    def of(cls, work: Workload, found: list[tuple[Program, Compiled]], mesh: Sides, where: Slice) -> "StageCost":
        """Returns the sum over the runs of programs, of each of which something is known."""
        costs = [(p, cost(work, p, done, mesh, where)) for p, done in found]
        return cls(
            sum(p.runs * c.seconds for p, c in costs),
            sum(p.runs * c.flops for p, c in costs),
            sum(p.runs * c.bytes for p, c in costs),
            max(c.peak for _, c in costs) + work.beside * mesh.shape["data"] // mesh.size,
            all(c.cycles for _, c in costs),
            sum((c.limit.times(p.runs) for p, c in costs), Limit()),
        )


def make_plan(
    work: Workload, where: Slice, mesh: MeshShape | None = None, note=lambda text: None, compiling: bool = True
) -> Plan:
    """Compiles a study's programs for a slice, on the mesh given or on the best that holds the model.

    note: called with what is being compiled. compiling: whether to; if not, memory is reckoned from the model's shape, as times
    are. Raises UserError without the TPU compiler, and for a mesh of other size.
    """
    wanted = WANTED.with_settings(work.config)
    ranked = [mesh] if mesh else ranked_meshes(work, where, wanted)
    if mesh and mesh.size != where.size:
        raise UserError(f"The mesh {mesh} has {mesh.size} devices, {where.name} has {where.size}. Change one of them.")
    if not ranked:
        need = f"{gib(weight_bytes(work) + work.beside)} of weights on {where.size} devices of {gib(where.chip.hbm)}"
        return Plan(
            work, where, None, Sizes(0, 0, 0, 0), {}, [f"the model does not fit: {need}, and a cache beside them"]
        )
    plans = []
    for mesh in ranked[:TRIED]:
        plans.append(_plan_on(work, where, mesh, note, compiling))
        if not plans[-1].problems:
            break
    return min(plans, key=lambda plan: len(plan.problems))


def _plan_on(work: Workload, where: Slice, mesh: MeshShape, note, compiling: bool) -> Plan:
    """Returns the plan on one mesh, each field of `Sizes` with the most rows that fit."""
    shapes = Shapes(work, make_mesh(mesh.data, mesh.fsdp, mesh.model, where.devices()) if compiling else None)

    def reckoned(program: Program) -> Compiled:
        return Compiled(memory(work, program, mesh))

    attempt = compiled_with_text if compiling else reckoned
    given = Sizes(0, 0, 0, 0).with_settings(work.config)
    sizes, problems, costs, ways = {}, [], {}, mesh.data * mesh.fsdp
    limit = SPARE * where.chip.hbm - work.beside / mesh.fsdp / mesh.model
    for field in FIELDS:
        wanted = getattr(given, field), getattr(WANTED, field)
        sizes[field], done, why = fit(shapes, *wanted, deciding(work, field), limit, ways, note, attempt)
        found = iter(done)
        for group in work.groups:
            if group.field == field and not sizes[field]:
                problems.append(f"{group.name}: {why[:300]}")
            elif group.field == field:
                ready = [next(found) for _ in group.largest(shapes, sizes[field])]
                rest = group.describe(shapes, sizes[field])[len(ready) :]
                ready += [(program, attempt(program)) for program in rest]
                costs[group.name] = StageCost.of(work, ready, mesh, where)
    stages = {group.name: costs[group.name] for group in work.groups if group.name in costs}
    return Plan(work, where, mesh, Sizes(**sizes), stages, problems)


def device_slice(devices) -> Slice | None:
    """Returns what is known of these devices, or None where they are no TPUs of a known kind."""
    chip = next((chip for chip in CHIPS.values() if devices[0].device_kind in chip.kinds), None)
    if chip is None:
        return None
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    return Slice(chip, (max(len(devices) // slices // chip.devices, 1),), slices)


def run_mesh(work: Workload, settings: Mapping[str, int], devices) -> jax.sharding.Mesh | None:
    """Returns the mesh of a run: the one that `config.mesh` asks for. Where it leaves all open, that is the plan's choice on
    TPUs, all devices as tensor parallelism on others, and one device where a process has a CPU for itself.

    Raises UserError as `make_mesh` does, and for a model that does not fit.
    """
    given = {name: size for name, size in dict(settings).items() if size}
    if given:
        return make_mesh(**given) if any(size != 1 for size in given.values()) else None
    if len(devices) == 1 or (devices[0].platform == "cpu" and jax.process_count() == 1):
        return None
    where = device_slice(devices)
    if where is None:
        return make_mesh(model=len(devices))
    ranked = ranked_meshes(work, where, WANTED.with_settings(work.config))
    if not ranked:
        raise UserError(
            f"The model does not fit these {len(devices)} chips: {gib(weight_bytes(work))} of weights and a cache, on "
            f"{gib(where.chip.hbm)} each. `refusal-jax plan` says which slice holds it."
        )
    best = ranked[0]
    return make_mesh(best.data, best.fsdp, best.model)


def run_sizes(work: Workload, mesh: jax.sharding.Mesh | None, devices, note=lambda text: None) -> Sizes:
    """Returns the batch sizes of a run: what the config sets, and else the most rows that fit, compiled to see.

    devices: this process's. Raises UserError for a stage that does not fit in the fewest rows.
    """
    if devices[0].platform == "cpu":
        return ON_CPU.with_settings(work.config)
    given, where = Sizes(0, 0, 0, 0).with_settings(work.config), device_slice(devices)
    # What is known of the chip comes first: it is the same on every process, as the sizes must be.
    limit = SPARE * (where.chip.hbm if where else (devices[0].memory_stats() or {}).get("bytes_limit", math.inf))
    shapes, found = Shapes(work, mesh), {}
    ways = mesh.shape["data"] * mesh.shape["fsdp"] if mesh else 1
    for field in FIELDS:
        found[field] = getattr(given, field)
        if not found[field]:
            found[field], _, why = fit(shapes, 0, getattr(WANTED, field), deciding(work, field), limit, ways, note)
            if not found[field]:
                raise UserError(
                    f"The study does not fit these devices: {why}. `refusal-jax plan` says which slice holds it."
                )
    return Sizes(**found)

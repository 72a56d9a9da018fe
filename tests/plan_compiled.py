"""Compiles programs for TPUs, beside what is reckoned without compiling.

  python tests/plan_compiled.py                                       what one large matrix product reaches on each chip
  python tests/plan_compiled.py llama_3_8b v5e-4 1x1x4 decode         a program of a study, on a mesh DATAxFSDPxMODEL

A program takes one to five minutes of CPU time.
"""

import os
import sys

from refusal_jax.jobs.main import COMPILE_ONLY

SLICES = ("v5e-4", "v6e-4", "v5p-8", "tpu7x-8")
WIDE, THIN = (8192, 8192, 8192), (128, 8192, 28672)  # rows, in, out: bound by operations, and by memory


def products() -> None:
    """Prints which share of its limit a matrix product reaches by the compiler's cycles."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from refusal_jax.plan import chips, costs, hlo
    from refusal_jax.plan.programs import Program

    for name in SLICES:
        where = chips.Slice.parse(name)
        place, chip = SingleDeviceSharding(where.devices()[0]), where.chip
        for rows, inner, out in (WIDE, THIN):
            a, b = (jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=place) for s in ((rows, inner), (inner, out)))
            program = Program("product", lambda a=a, b=b: jax.jit(jnp.matmul).lower(a, b), 1, rows, 1, 1)
            seconds = hlo.cycles(costs.compiled_with_text(program).text) / chip.hertz
            limit = max(2 * rows * inner * out / chip.flops, 2 * inner * out / chip.bandwidth)
            print(f"{name}: {rows} x {inner} by {inner} x {out} reaches {limit / seconds:.0%} of its limit", flush=True)


def program(model: str, topology: str, sides: str, name: str) -> None:
    """Prints seconds and memory of one program: by the compiler, reckoned, and the limit."""
    from refusal_jax.models.sharding import make_mesh
    from refusal_jax.plan import chips, costs, planner, programs
    from refusal_jax.plan.known import config_of
    from refusal_jax.study.config import get_config
    from refusal_jax.study.study import workload

    where, mesh = chips.Slice.parse(topology), planner.MeshShape(*map(int, sides.split("x")))
    work = workload(config_of(model), "bfloat16", get_config(), programs.USUAL_LENGTH)
    shapes = programs.Shapes(work, make_mesh(mesh.data, mesh.fsdp, mesh.model, where.devices()))
    (one,) = (p for p in programs.programs(shapes, planner.WANTED) if p.name == name)
    found = costs.cost(work, one, costs.compiled_with_text(one), mesh, where)
    reckoned, memory = costs.estimate(work, one, mesh, where), costs.memory(work, one, mesh)
    times = found.seconds / found.limit.seconds
    print(f"{model} on {topology}, {mesh}, {name}: compiled {found.seconds:.3g} s and {costs.gib(found.peak)}")
    print(f"  reckoned {reckoned:.3g} s and {costs.gib(memory)}")
    print(f"  limit {found.limit.seconds:.3g} s ({found.limit.binds}), of which compiled is {times:.1f} x")


if __name__ == "__main__":
    os.environ |= COMPILE_ONLY
    program(*sys.argv[1:]) if sys.argv[1:] else products()

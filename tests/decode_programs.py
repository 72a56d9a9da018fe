"""The cost of a decode step, compiled for TPUs without one: `python tests/decode_programs.py MODEL TOPOLOGY ROWS` prints it.

Prompts of 128 tokens and replies of 512, all chips as tensor parallelism. Two sums are estimates of a step in milliseconds: the
compiler's cycles, which leave communication out, and these with every collective after the other. The bound is what reading
weights and cache once takes at the memory's peak rate.
"""

import json
import os
import sys
from collections import Counter

from refusal_jax.jobs.main import COMPILE_ONLY

LENGTH = 128


def measured(model: str, topology: str, rows: int) -> dict:
    """Returns what the step comes to; times in milliseconds, bytes of one chip."""
    from refusal_jax.models.sharding import make_mesh
    from refusal_jax.plan import chips, costs, hlo, limits
    from refusal_jax.plan.known import config_of
    from refusal_jax.plan.programs import Shapes
    from refusal_jax.study import completions
    from refusal_jax.study.config import get_config
    from refusal_jax.study.study import workload

    where, cfg = chips.Slice.parse(topology), config_of(model)
    work = workload(cfg, "bfloat16", get_config(), LENGTH)
    shapes = Shapes(work, make_mesh(1, 1, where.chips, where.devices()))
    compiled = completions.programs(shapes, rows)[1].lower().compile()
    text, memory, cache = (
        costs.text_of(compiled),
        compiled.memory_analysis(),
        limits.cache_bytes(work, rows, where.chips),
    )
    assert memory is not None, "the compiler says nothing of memory"
    of_layers = [i for i in hlo.collectives(text) if i.times >= cfg.n_layers]
    cycles = 1e3 * hlo.cycles(text) / where.chip.hertz
    links = where.chip.links(where.shape)
    waiting = 1e3 * costs.collective_seconds(hlo.collectives(text), where.chips, links)
    return {
        "model": model,
        "cycles_ms": round(cycles, 2),
        "serial_ms": round(cycles + waiting, 2),
        "bound_ms": round(1e3 * (limits.weight_bytes(work) / where.chips + cache) / where.chip.bandwidth, 2),
        "a_layer": Counter(f"{i.kind} of {i.bytes} bytes" for i in of_layers),
        "cache": cache,
        "temporary": memory.temp_size_in_bytes,
        "changed_in_place": memory.alias_size_in_bytes,
        "peak": costs.peak_bytes(compiled),
    }


if __name__ == "__main__":
    os.environ |= COMPILE_ONLY
    print(json.dumps(measured(sys.argv[1], sys.argv[2], int(sys.argv[3]))))

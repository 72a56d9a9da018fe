"""The programs of hybrids, compiled for a TPU v5e without one: `python tests/hybrid_programs.py FAMILY` prints what they come to.

Of realistic width, with few layers. The reading of one prompt of 4,096 tokens is compiled once: an estimate of the same model
with attention in every layer counts the branch of attention alone.
"""

import json
import os
import sys

from refusal_jax.jobs.main import COMPILE_ONLY

TOKENS, ROWS = 4096, 32
BASE = {"hidden_size": 2048, "vocab_size": 32768, "max_position_embeddings": 8192, "num_hidden_layers": 4}
FAMILIES = {
    "qwen3_next": {
        **{"intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256},
        **{"linear_num_key_heads": 16, "linear_num_value_heads": 32, "mlp_only_layers": [0, 1, 2, 3]},
    },
    "granitemoehybrid": {
        **{
            "intermediate_size": 8192,
            "shared_intermediate_size": 8192,
            "num_local_experts": 0,
            "num_attention_heads": 32,
        },
        **{"num_key_value_heads": 8, "layer_types": ["mamba", "mamba", "mamba", "attention"]},
        **{"mamba_n_heads": 64, "mamba_d_head": 64, "mamba_d_state": 128, "tie_word_embeddings": True},
    },
}


def measured(family: str) -> dict:
    """Returns what the programs of a family come to."""
    from refusal_jax import Taps
    from refusal_jax.models.hf_config import from_hf
    from refusal_jax.models.mixers.attention import Attention
    from refusal_jax.models.predict import predict
    from refusal_jax.models.sharding import make_mesh
    from refusal_jax.models.structure import structure
    from refusal_jax.plan import chips, costs, hlo
    from refusal_jax.plan.limits import cache_bytes
    from refusal_jax.plan.programs import Shapes
    from refusal_jax.study import completions
    from refusal_jax.study.config import get_config
    from refusal_jax.study.study import workload

    cfg, where = from_hf(BASE | FAMILIES[family] | {"model_type": family}), chips.Slice.parse("v5e-1")
    form, mesh = structure(cfg), make_mesh(1, 1, 1, where.devices())
    shapes = Shapes(workload(cfg, "bfloat16", get_config(), TOKENS), mesh)
    text = costs.text_of(
        predict.lower(shapes.decoder, *shapes.prompts(1), shapes.edits(1), taps=Taps(), last=True).compile()
    )
    attention = tuple(float(isinstance(mixer, Attention)) for mixer in form.mixers)
    every = {"mixer": (1.0,) * len(form.mixers)}
    turns = max(i.times for i in hlo.instructions(text, hlo.Runs(TOKENS, shares=every))) / cfg.n_layers
    hybrid, alone = (hlo.cycles(text, hlo.Runs(shares=taken)) for taken in (form.taken, {"mixer": attention}))
    work = workload(cfg, "bfloat16", get_config(), 128)
    memory = completions.programs(Shapes(work, mesh), ROWS)[1].lower().compile().memory_analysis()
    assert memory is not None, "the compiler says nothing of memory"
    return {
        "turns": turns,  # of loops within a layer
        "hybrid": hybrid / where.chip.hertz,
        "attention": alone / where.chip.hertz,
        "cache": cache_bytes(work, ROWS),
        "temporary": memory.temp_size_in_bytes,  # of a decode step
        "changed_in_place": memory.alias_size_in_bytes,
    }


if __name__ == "__main__":
    os.environ |= COMPILE_ONLY
    print(json.dumps(measured(sys.argv[1])))

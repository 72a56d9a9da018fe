"""HF tensor names of Granite 4, some of whose layers are state spaces."""

from refusal_jax.models.mixers.state_space import CONVOLVED, PARTS
from refusal_jax.models.tables.mixtures import GRANITE_MOE


def state_space(prefix: str) -> dict[str, str]:
    """Returns the names of a Mamba-2 layer's tensors, which follow `prefix`."""
    return {
        **{f"blocks.ssm_{part}": f"{prefix}.in_proj.weight" for part in PARTS},
        **{f"blocks.ssm_{part}_bias": f"{prefix}.in_proj.bias" for part in PARTS},
        **{f"blocks.ssm_conv_{part}": f"{prefix}.conv1d.weight" for part in CONVOLVED},
        **{f"blocks.ssm_conv_{part}_bias": f"{prefix}.conv1d.bias" for part in CONVOLVED},
        "blocks.ssm_step_bias": f"{prefix}.dt_bias",
        "blocks.ssm_rate_log": f"{prefix}.A_log",
        "blocks.ssm_skip": f"{prefix}.D",
        "blocks.ssm_norm": f"{prefix}.norm.weight",
        "blocks.ssm_o": f"{prefix}.out_proj.weight",
        "blocks.ssm_o_bias": f"{prefix}.out_proj.bias",
    }


# Models without experts have only the MLP that stands beside the experts of the others.
ALONE = {f"blocks.dense_{part}": GRANITE_MOE[f"blocks.shared_{part}"] for part in ("gate", "up", "down")}
TABLES = {"granitemoehybrid": GRANITE_MOE | ALONE | state_space("model.layers.{l}.mamba")}

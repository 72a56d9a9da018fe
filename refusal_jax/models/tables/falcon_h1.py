"""Tensor names of Falcon-H1."""

from refusal_jax.models.tables.dense import LLAMA
from refusal_jax.models.tables.granite_hybrid import state_space

FALCON_H1 = (
    {path: name.replace(".mlp.", ".feed_forward.") for path, name in LLAMA.items()}
    | {"blocks.mlp_norm": "model.layers.{l}.pre_ff_layernorm.weight", "final_norm": "model.final_layernorm.weight"}
    | state_space("model.layers.{l}.mamba")
)
TABLES = {"falcon_h1": FALCON_H1}

"""HF tensor names of Llama 4."""

import re

from refusal_jax.models.tables.dense import LLAMA

MLP = "model.layers.{l}.feed_forward"
LLAMA4 = LLAMA | {
    **{f"blocks.dense_{part}": f"{MLP}.{part}_proj.weight" for part in ("gate", "up", "down")},
    **{f"blocks.shared_{part}": f"{MLP}.shared_expert.{part}_proj.weight" for part in ("gate", "up", "down")},
    **{f"blocks.{part}": f"{MLP}.experts.gate_up_proj" for part in ("gate", "up")},
    "blocks.down": f"{MLP}.experts.down_proj",
    "blocks.router": f"{MLP}.router.weight",
}
TABLES = {"llama4_text": LLAMA4, "llama4": {path: f"language_model.{name}" for path, name in LLAMA4.items()}}
TRANSPOSED = {family: {"blocks.gate", "blocks.up", "blocks.down"} for family in TABLES}
OTHER_PARTS = {"llama4": re.compile(r"^(model\.)?(vision_model|multi_modal_projector)\.")}

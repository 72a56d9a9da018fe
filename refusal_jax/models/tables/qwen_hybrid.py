"""Names of the tensors of Qwen3-Next and Qwen 3.5."""

import re

from refusal_jax.models.tables.dense import LLAMA
from refusal_jax.models.tables.mixtures import QWEN2_MOE

DELTA = "model.layers.{l}.linear_attn."
CONVOLVED = ("q", "k", "v")
RULE = {
    **{f"blocks.delta_{part}_conv": f"{DELTA}conv1d.weight" for part in CONVOLVED},
    "blocks.delta_rate_log": f"{DELTA}A_log",
    "blocks.delta_step_bias": f"{DELTA}dt_bias",
    "blocks.delta_norm": f"{DELTA}norm.weight",
    "blocks.delta_o": f"{DELTA}out_proj.weight",
}
NEXT = {f"blocks.delta_{part}": f"{DELTA}in_proj_{part}.weight" for part in ("qkvz", "ba")}
APART = {f"blocks.delta_{part}": f"{DELTA}in_proj_qkv.weight" for part in CONVOLVED}
APART |= {f"blocks.delta_{part}": f"{DELTA}in_proj_{part}.weight" for part in "zba"}


def inside(table: dict[str, str]) -> dict[str, str]:
    """Returns the names of a text model's tensors in a multimodal model."""
    return {path: name.replace("model.", "model.language_model.", 1) for path, name in table.items()}


DENSE, MIXTURE = LLAMA | RULE | APART, QWEN2_MOE | RULE | APART
TABLES = {
    "qwen3_next": QWEN2_MOE | RULE | NEXT,
    "qwen3_5_text": DENSE,
    "qwen3_5_moe_text": MIXTURE,
    "qwen3_5": inside(DENSE),
    "qwen3_5_moe": inside(MIXTURE),
}
# Layers that guess tokens ahead, and the vision part.
AHEAD, BESIDE = re.compile(r"^mtp\."), re.compile(r"^mtp\.|^(model\.)?visual\.")
OTHER_PARTS = dict.fromkeys(("qwen3_5", "qwen3_5_moe"), BESIDE)
PASSED_OVER = {"qwen3_next": AHEAD} | dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text"), BESIDE)

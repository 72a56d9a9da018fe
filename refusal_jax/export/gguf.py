"""Writes the addition as a control vector for llama.cpp, a GGUF file.

`direction.N` is added to the output of block N, counted from 0, so what is added at the input of block l is
`direction.(l - 1)`; N begins at 1.
"""

import pathlib

import numpy as np
from jaxtyping import Float32

from refusal_jax.conditions import Add
from refusal_jax.errors import UserError, setting
from refusal_jax.export.hf import Written
from refusal_jax.export.tensor_edits import Edit
from refusal_jax.models.config import ModelConfig

CONTROL_VECTOR = "control-vector.gguf"
ARCHITECTURE = "controlvector"
# llama.cpp's name of an architecture, where it is not the family's.
HINTS = {
    "mistral": "llama",
    "mixtral": "llama",
    "ministral3": "mistral3",
    "cwm": "llama",
    "olmo3": "olmo2",
    "qwen2_vl": "qwen2vl",
    "qwen2_5_vl": "qwen2vl",
    "qwen3_vl": "qwen3vl",
    "gemma3_text": "gemma3",
    "glm": "chatglm",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "cohere": "command-r",
    "hunyuan_v1_dense": "hunyuan-dense",
    "gpt_oss": "gpt-oss",
    "glm4_moe": "glm4moe",
    "granitemoeshared": "granitemoe",
    "granitemoehybrid": "granitehybrid",
    "minimax_m2": "minimax-m2",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "kimi_k2": "deepseek2",
    "kimi_k25": "deepseek2",
    "glm4_moe_lite": "deepseek2",
    "llama4_text": "llama4",
    "gemma4_text": "gemma4",
    "gemma4_unified": "gemma4",
    "qwen3_next": "qwen3next",
    "qwen3_5": "qwen35",
    "qwen3_5_text": "qwen35",
    "qwen3_5_moe": "qwen35moe",
    "qwen3_5_moe_text": "qwen35moe",
    "lfm2_moe": "lfm2moe",
    "falcon_h1": "falcon-h1",
}


def check_expressible(cfg: ModelConfig, edit: Edit) -> Add:
    """Returns the edit, which is an addition. Raises UserError for another edit, and for layers that llama.cpp cannot add at."""
    if not isinstance(edit, Add):
        raise UserError(
            "A control vector is a constant that llama.cpp adds to the residual stream. Ablation removes what is there "
            "along the direction, and an injection adds what depends on it, which differs from token to token, so no constant "
            f"can do it. Use {setting('edit', 'add')}, or {setting('format', 'hf')} or lora for the others."
        )
    early = [layer for layer in edit.at(cfg) if layer < 2]
    if early:
        raise UserError(
            f"A control vector cannot add at the input of layer {early[0]}: llama.cpp adds to the outputs of blocks from 1 "
            f"on, which are the inputs of layers 2 to {cfg.n_layers - 1}. Choose {setting('layers')} among these."
        )
    return edit


def write_gguf(cfg: ModelConfig, folder: pathlib.Path, edit: Edit) -> Written:
    """Writes `control-vector.gguf` to `folder`, with the vector that `edit` adds at each of its layers.

    Raises UserError for an edit that a control vector cannot express, OSError for a disk that refuses.
    """
    addition = check_expressible(cfg, edit)
    layers = addition.at(cfg)
    from gguf import GGUFWriter  # imported late: few exports are control vectors

    writer = GGUFWriter(folder / CONTROL_VECTOR, ARCHITECTURE)
    writer.add_string(f"{ARCHITECTURE}.model_hint", HINTS.get(cfg.family, cfg.family))
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(layers))
    for layer in layers:
        writer.add_tensor(f"direction.{layer - 1}", addition.vector_d.astype(np.float32))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return Written({}, None, len(layers) * cfg.d_model * 4)


def read_gguf(path: pathlib.Path) -> dict[int, Float32[np.ndarray, " D"]]:
    """Returns what a control vector of `write_gguf` adds at the inputs of layers, by layer.

    This is for files that this process has written: gguf's reader trusts the counts in a file, and one of a few bytes can keep it
    busy for hours.
    """
    from gguf import GGUFReader

    vectors = {int(t.name.removeprefix("direction.")): np.array(t.data) for t in GGUFReader(path).tensors}
    return {block + 1: vector_d for block, vector_d in vectors.items()}

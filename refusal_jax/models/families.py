"""One bidirectional weight table per family: HF tensor names to decoder paths, walked forwards by loading and
backwards by saving and by weight edits."""

import dataclasses
import re

from refusal_jax.models.config import ModelConfig
from refusal_jax.models.decoder import weight_table


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one HF tensor belongs: a decoder path, and the layer for a stacked one (None otherwise)."""

    path: str
    layer: int | None
    shape: tuple[int, ...]


# Decoder path -> HF name, `{l}` being the layer. Layouts agree: `[out, in]`, vocabulary first.
LLAMA = {
    "embed": "model.embed_tokens.weight",
    "blocks.attn_norm": "model.layers.{l}.input_layernorm.weight",
    "blocks.q": "model.layers.{l}.self_attn.q_proj.weight",
    "blocks.k": "model.layers.{l}.self_attn.k_proj.weight",
    "blocks.v": "model.layers.{l}.self_attn.v_proj.weight",
    "blocks.o": "model.layers.{l}.self_attn.o_proj.weight",
    "blocks.q_bias": "model.layers.{l}.self_attn.q_proj.bias",
    "blocks.k_bias": "model.layers.{l}.self_attn.k_proj.bias",
    "blocks.v_bias": "model.layers.{l}.self_attn.v_proj.bias",
    "blocks.o_bias": "model.layers.{l}.self_attn.o_proj.bias",
    "blocks.mlp_norm": "model.layers.{l}.post_attention_layernorm.weight",
    "blocks.gate": "model.layers.{l}.mlp.gate_proj.weight",
    "blocks.up": "model.layers.{l}.mlp.up_proj.weight",
    "blocks.down": "model.layers.{l}.mlp.down_proj.weight",
    "blocks.gate_bias": "model.layers.{l}.mlp.gate_proj.bias",
    "blocks.up_bias": "model.layers.{l}.mlp.up_proj.bias",
    "blocks.down_bias": "model.layers.{l}.mlp.down_proj.bias",
    "final_norm": "model.norm.weight",
    "unembed": "lm_head.weight",
}
TABLES = {"llama": LLAMA}

# Tensors that old checkpoints carry and that inference recomputes.
DERIVED = re.compile(r"rotary_emb\.inv_freq$")

# Decoder paths whose rows or columns write to the residual stream, and the edit site each of them serves.
WRITERS = {"embed": "resid_pre", "blocks.o": "attn_out", "blocks.down": "mlp_out"}
WRITER_BIASES = {"blocks.o_bias": "attn_out", "blocks.down_bias": "mlp_out"}


def hf_slots(cfg: ModelConfig) -> dict[str, Slot]:
    """Every HF tensor that a checkpoint of this config must hold, and where it goes."""
    slots = {}
    for path, weight in weight_table(cfg).items():
        name = TABLES[cfg.family][path]
        if "{l}" in name:
            for layer in range(cfg.n_layers):
                slots[name.format(l=layer)] = Slot(path, layer, weight.shape[1:])
        else:
            slots[name] = Slot(path, None, weight.shape)
    return slots


def hf_names(cfg: ModelConfig, path: str) -> list[str]:
    """The HF tensors behind a decoder path, by layer for a stacked one."""
    return [name for name, slot in hf_slots(cfg).items() if slot.path == path]


def optional_names(cfg: ModelConfig) -> set[str]:
    """Tensors that a checkpoint may hold although the config makes them copies of others (a tied `lm_head`)."""
    return {TABLES[cfg.family]["unembed"]} if cfg.tied_embeddings else set()

"""One bidirectional weight table per family: HF tensor names to decoder paths, walked forwards by loading and
backwards by saving and by weight edits."""

import dataclasses
import re

from refusal_jax.models.config import ModelConfig
from refusal_jax.models.weights import weight_table

# Decoder path -> HF name, `{l}` being the layer and `{e}` the expert. Layouts agree: `[out, in]`, vocabulary first. Paths
# that share a name are that tensor's rows one after the other, in this order (fused projections). A table may have more
# paths than a config has weights (biases, a tied unembedding).
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
    "blocks.q_norm": "model.layers.{l}.self_attn.q_norm.weight",
    "blocks.k_norm": "model.layers.{l}.self_attn.k_norm.weight",
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
QWEN = {
    "embed": "transformer.wte.weight",
    "blocks.attn_norm": "transformer.h.{l}.ln_1.weight",
    **{f"blocks.{part}": "transformer.h.{l}.attn.c_attn.weight" for part in "qkv"},
    **{f"blocks.{part}_bias": "transformer.h.{l}.attn.c_attn.bias" for part in "qkv"},
    "blocks.o": "transformer.h.{l}.attn.c_proj.weight",
    "blocks.o_bias": "transformer.h.{l}.attn.c_proj.bias",
    "blocks.mlp_norm": "transformer.h.{l}.ln_2.weight",
    "blocks.gate": "transformer.h.{l}.mlp.w2.weight",
    "blocks.up": "transformer.h.{l}.mlp.w1.weight",
    "blocks.down": "transformer.h.{l}.mlp.c_proj.weight",
    "blocks.gate_bias": "transformer.h.{l}.mlp.w2.bias",
    "blocks.up_bias": "transformer.h.{l}.mlp.w1.bias",
    "blocks.down_bias": "transformer.h.{l}.mlp.c_proj.bias",
    "final_norm": "transformer.ln_f.weight",
    "unembed": "lm_head.weight",
}
FUSED_GATE = {f"blocks.{part}": "model.layers.{l}.mlp.gate_up_proj.weight" for part in ("gate", "up")}
PHI3 = LLAMA | FUSED_GATE | {f"blocks.{part}": "model.layers.{l}.self_attn.qkv_proj.weight" for part in "qkv"}
GLM4 = (
    LLAMA
    | FUSED_GATE
    | {
        "blocks.attn_post_norm": "model.layers.{l}.post_self_attn_layernorm.weight",
        "blocks.mlp_post_norm": "model.layers.{l}.post_mlp_layernorm.weight",
    }
)
OLMO2 = LLAMA | {
    "blocks.attn_post_norm": "model.layers.{l}.post_attention_layernorm.weight",
    "blocks.mlp_post_norm": "model.layers.{l}.post_feedforward_layernorm.weight",
}
GEMMA2 = OLMO2 | {"blocks.mlp_norm": "model.layers.{l}.pre_feedforward_layernorm.weight"}
HUNYUAN = LLAMA | {
    "blocks.q_norm": "model.layers.{l}.self_attn.query_layernorm.weight",
    "blocks.k_norm": "model.layers.{l}.self_attn.key_layernorm.weight",
}
MIXTRAL = LLAMA | {
    "blocks.router": "model.layers.{l}.block_sparse_moe.gate.weight",
    "blocks.gate": "model.layers.{l}.block_sparse_moe.experts.{e}.w1.weight",
    "blocks.up": "model.layers.{l}.block_sparse_moe.experts.{e}.w3.weight",
    "blocks.down": "model.layers.{l}.block_sparse_moe.experts.{e}.w2.weight",
}
QWEN3_MOE = LLAMA | {
    "blocks.router": "model.layers.{l}.mlp.gate.weight",
    "blocks.gate": "model.layers.{l}.mlp.experts.{e}.gate_proj.weight",
    "blocks.up": "model.layers.{l}.mlp.experts.{e}.up_proj.weight",
    "blocks.down": "model.layers.{l}.mlp.experts.{e}.down_proj.weight",
}
TABLES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen": QWEN,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "smollm3": LLAMA,
    "exaone4": OLMO2,
    "cohere": LLAMA,
    "cohere2": LLAMA,
    "hunyuan_v1_dense": HUNYUAN,
    "gemma": LLAMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2,
    "gemma3": {path: f"language_model.{name}" for path, name in GEMMA2.items()},
    "phi3": PHI3,
    "olmo2": OLMO2,
    "granite": LLAMA,
    "glm": LLAMA | FUSED_GATE,
    "glm4": GLM4,
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
    "olmoe": QWEN3_MOE,
}

# Tensors that a checkpoint may hold and that the text model's forward pass does not need: what old checkpoints stored
# although inference recomputes it, and the other parts of a multimodal model.
DERIVED = re.compile(r"rotary_emb\.inv_freq$")
OTHER_PARTS = {"gemma3": re.compile(r"^(vision_tower|multi_modal_projector)\.")}

# Decoder paths whose rows or columns write to the residual stream, and the edit site each of them serves.
WRITERS = {"embed": "resid_pre", "blocks.o": "attn_out", "blocks.down": "mlp_out"}
WRITER_BIASES = {"blocks.o_bias": "attn_out", "blocks.down_bias": "mlp_out"}


@dataclasses.dataclass(frozen=True)
class Piece:
    """One decoder weight in HF's files: rows `start` to `stop` of the tensor `name` are `path[index]`.

    index: (), (layer,) or (layer, expert).
    """

    name: str
    path: str
    index: tuple[int, ...]
    start: int
    stop: int


def pieces(cfg: ModelConfig) -> list[Piece]:
    """Returns where every weight of the decoder is in a checkpoint of this config."""
    found, filled = [], {}
    for path, weight in weight_table(cfg).items():
        template = TABLES[cfg.family][path]
        layers = range(cfg.n_layers) if "{l}" in template else (None,)
        experts = range(cfg.n_experts) if "{e}" in template else (None,)
        for l in layers:
            for e in experts:
                name, index = template.format(l=l, e=e), tuple(i for i in (l, e) if i is not None)
                start = filled.get(name, 0)
                filled[name] = start + weight.shape[len(index)]
                found.append(Piece(name, path, index, start, filled[name]))
    return found


def hf_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns every HF tensor that a checkpoint of this config must hold, and its shape."""
    table, shapes = weight_table(cfg), {}
    for piece in pieces(cfg):
        shapes[piece.name] = (piece.stop, *table[piece.path].shape[len(piece.index) + 1 :])
    return shapes


def hf_names(cfg: ModelConfig, path: str) -> list[str]:
    """Returns the HF tensors behind a decoder path, in the order of its layers and experts."""
    return [piece.name for piece in pieces(cfg) if piece.path == path]


def is_spare(cfg: ModelConfig, name: str) -> bool:
    """Returns whether a checkpoint may hold this tensor although the decoder does not need it."""
    other = OTHER_PARTS.get(cfg.family)
    tied = cfg.tied_embeddings and name == TABLES[cfg.family]["unembed"]
    return tied or bool(DERIVED.search(name)) or bool(other and other.search(name))

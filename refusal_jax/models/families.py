"""One bidirectional weight table per family: HF tensor names to decoder paths, walked forwards by loading and
backwards by saving and by weight edits."""

import dataclasses
import re
from collections.abc import Callable

import numpy as np

from refusal_jax.models.config import ModelConfig
from refusal_jax.models.weights import weight_table

# Decoder path -> HF name, `{l}` being the layer and `{e}` the expert. Layouts agree: `[out, in]`, vocabulary first. Paths
# that share a name are that tensor's rows one after the other, in this order (fused projections). An expert's weight whose
# name has no `{e}` is one of a tensor of all experts, along its first axis. A table may have more paths than a config has
# weights (biases, a tied unembedding).
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
DENSE = {
    f"blocks.dense_{part}": LLAMA[f"blocks.{part}"] for part in ("gate", "up", "down")
}  # among layers with experts
QWEN3_MOE = (
    LLAMA
    | DENSE
    | {
        "blocks.router": "model.layers.{l}.mlp.gate.weight",
        "blocks.gate": "model.layers.{l}.mlp.experts.{e}.gate_proj.weight",
        "blocks.up": "model.layers.{l}.mlp.experts.{e}.up_proj.weight",
        "blocks.down": "model.layers.{l}.mlp.experts.{e}.down_proj.weight",
    }
)
QWEN2_MOE = QWEN3_MOE | {
    "blocks.shared_router": "model.layers.{l}.mlp.shared_expert_gate.weight",
    "blocks.shared_gate": "model.layers.{l}.mlp.shared_expert.gate_proj.weight",
    "blocks.shared_up": "model.layers.{l}.mlp.shared_expert.up_proj.weight",
    "blocks.shared_down": "model.layers.{l}.mlp.shared_expert.down_proj.weight",
}
GLM4_MOE = QWEN3_MOE | {
    "blocks.router_correction": "model.layers.{l}.mlp.gate.e_score_correction_bias",
    "blocks.shared_gate": "model.layers.{l}.mlp.shared_experts.gate_proj.weight",
    "blocks.shared_up": "model.layers.{l}.mlp.shared_experts.up_proj.weight",
    "blocks.shared_down": "model.layers.{l}.mlp.shared_experts.down_proj.weight",
}
GRANITE_MOE = LLAMA | {
    "blocks.router": "model.layers.{l}.block_sparse_moe.router.layer.weight",
    **{f"blocks.{part}": "model.layers.{l}.block_sparse_moe.input_linear.weight" for part in ("gate", "up")},
    "blocks.down": "model.layers.{l}.block_sparse_moe.output_linear.weight",
    **{f"blocks.shared_{part}": "model.layers.{l}.shared_mlp.input_linear.weight" for part in ("gate", "up")},
    "blocks.shared_down": "model.layers.{l}.shared_mlp.output_linear.weight",
}
MINIMAX_M2 = MIXTRAL | {"blocks.router_correction": "model.layers.{l}.block_sparse_moe.e_score_correction_bias"}
GPT_OSS = LLAMA | {
    "blocks.sinks": "model.layers.{l}.self_attn.sinks",
    "blocks.router": "model.layers.{l}.mlp.router.weight",
    "blocks.router_bias": "model.layers.{l}.mlp.router.bias",
    **{f"blocks.{part}": "model.layers.{l}.mlp.experts.gate_up_proj" for part in ("gate", "up")},
    **{f"blocks.{part}_bias": "model.layers.{l}.mlp.experts.gate_up_proj_bias" for part in ("gate", "up")},
    "blocks.down": "model.layers.{l}.mlp.experts.down_proj",
    "blocks.down_bias": "model.layers.{l}.mlp.experts.down_proj_bias",
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
    "mistral3": {path: f"language_model.{name}" for path, name in LLAMA.items()},
    "ministral3": LLAMA,
    "qwen2_vl": LLAMA,
    "qwen2_5_vl": LLAMA,
    "qwen3_vl": {path: name.replace("model.", "model.language_model.", 1) for path, name in LLAMA.items()},
    "phi3": PHI3,
    "olmo2": OLMO2,
    "olmo3": OLMO2,
    "seed_oss": LLAMA,
    "ernie4_5": LLAMA,
    "cwm": LLAMA,
    "granite": LLAMA,
    "glm": LLAMA | FUSED_GATE,
    "glm4": GLM4,
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
    "olmoe": QWEN3_MOE,
    "qwen2_moe": QWEN2_MOE,
    "glm4_moe": GLM4_MOE,
    "granitemoe": GRANITE_MOE,
    "granitemoeshared": GRANITE_MOE,
    "minimax_m2": MINIMAX_M2,
    "gpt_oss": GPT_OSS,
}
# Decoder paths, by family, whose tensors are laid out otherwise: as `[in, out]`, and with the rows of the paths that share a name
# taking turns (all of the first rows, then all of the second, …).
TRANSPOSED = {"gpt_oss": {"blocks.gate", "blocks.up", "blocks.down"}}
ALTERNATING = {"gpt_oss": {"blocks.gate", "blocks.up", "blocks.gate_bias", "blocks.up_bias"}}

# Tensors that a checkpoint may hold and that the text model's forward pass does not need: what old checkpoints stored
# although inference recomputes it, and the other parts of a multimodal model.
DERIVED = re.compile(r"rotary_emb\.inv_freq$")
DRAFT = re.compile(r"^model\.layers\.(\d+)\.")
LLAVA, QWEN_VL = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\."), re.compile(r"^(model\.)?visual\.")
OTHER_PARTS = {"gemma3": LLAVA, "mistral3": LLAVA, "qwen2_vl": QWEN_VL, "qwen2_5_vl": QWEN_VL, "qwen3_vl": QWEN_VL}

# Decoder paths whose rows or columns write to the residual stream, and the edit site each of them serves.
WRITERS = {"embed": "resid_pre", "blocks.o": "attn_out"}
WRITERS |= {f"blocks.{kind}down": "mlp_out" for kind in ("", "dense_", "shared_")}
WRITER_BIASES = {"blocks.o_bias": "attn_out", "blocks.down_bias": "mlp_out"}


@dataclasses.dataclass(frozen=True)
class Piece:
    """One decoder weight in HF's files: rows `start` to `stop` of the tensor `name`, in steps of `step`, are `path[index]`.

    index: (), (layer,) or (layer, expert), the layer being counted among those that have such a weight. layer: counted among
    all. within: (), or (expert,) of a tensor of all experts, whose rows are meant. transposed: whether these are the tensor's
    columns.
    """

    name: str
    path: str
    index: tuple[int, ...]
    start: int
    stop: int
    layer: int | None = None
    within: tuple[int, ...] = ()
    step: int = 1
    transposed: bool = False

    @property
    def plain(self) -> bool:
        """Returns whether rows of the weight are whole rows of the tensor, one after the other."""
        return self.step == 1 and not self.transposed

    def span(self, rows: range, columns: tuple[slice, ...]) -> tuple[slice, ...]:
        """Returns the smallest part of the tensor that holds these rows and columns of the weight."""
        first = self.start + self.step * rows.start
        axes = (slice(first, first + self.step * (len(rows) - 1) + 1 if rows else first), *columns)
        return (*(slice(i, i + 1) for i in self.within), *(axes[::-1] if self.transposed else axes))

    def of(self, part: np.ndarray, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Returns a view of a part of the tensor, that of the weight's expert alone, as rows and columns of the weight; start,
        stop: where its rows are in the part."""
        matrix = part[(0,) * len(self.within)]
        return (matrix.T if self.transposed else matrix)[start : stop : self.step]

    def rows(self, read: Callable[..., np.ndarray]) -> np.ndarray:
        """Returns the weight by a function of a tensor's name and a range along its first axis."""
        if not self.within and not self.transposed:
            return self.of(read(self.name, self.start, self.stop))
        ranges = ((expert, expert + 1) for expert in self.within)
        return self.of(read(self.name, *next(ranges, ())), self.start, self.stop)


def pieces(cfg: ModelConfig) -> list[Piece]:
    """Returns where every weight of the decoder is in a checkpoint of this config."""
    found, filled, table = [], {}, weight_table(cfg)
    transposed, alternating = TRANSPOSED.get(cfg.family, ()), ALTERNATING.get(cfg.family, ())
    for path, weight in table.items():
        template = TABLES[cfg.family][path]
        turns = [other for other in table if TABLES[cfg.family][other] == template] if path in alternating else [path]
        for place, layer in enumerate(weight.layers or (None,)):
            for expert in range(cfg.n_experts) if weight.per_expert else (None,):
                name = template.format(l=layer, e=expert)
                index = tuple(i for i in (None if layer is None else place, expert) if i is not None)
                within = index[1:] if "{e}" not in template else ()
                start = turns.index(path) or (0 if path in alternating else filled.get((name, within), 0))
                stop = filled[name, within] = start + len(turns) * (weight.shape[len(index)] - 1) + 1
                found.append(Piece(name, path, index, start, stop, layer, within, len(turns), path in transposed))
    return found


def hf_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns every HF tensor that a checkpoint of this config must hold, and its shape."""
    table, shapes = weight_table(cfg), {}
    for piece in pieces(cfg):
        outer = (cfg.n_experts,) * len(piece.within)
        matrix = piece.stop, *table[piece.path].shape[len(piece.index) + 1 :]
        shapes[piece.name] = (*outer, *(matrix[::-1] if piece.transposed else matrix))
    return shapes


def hf_names(cfg: ModelConfig, path: str) -> list[str]:
    """Returns the HF tensors behind a decoder path, in the order of its layers and experts."""
    return list(dict.fromkeys(piece.name for piece in pieces(cfg) if piece.path == path))


def is_spare(cfg: ModelConfig, name: str) -> bool:
    """Returns whether a checkpoint may hold this tensor although the decoder does not need it."""
    other, draft = OTHER_PARTS.get(cfg.family), DRAFT.match(name)
    tied = cfg.tied_embeddings and name == TABLES[cfg.family]["unembed"]
    ahead = bool(draft) and cfg.n_layers <= int(draft[1]) < cfg.n_layers + cfg.draft_layers
    return tied or ahead or bool(DERIVED.search(name)) or bool(other and other.search(name))

"""One bidirectional weight table per family: HF tensor names to decoder paths, walked forwards by loading and
backwards by saving and by weight edits."""

import dataclasses
import re
from collections.abc import Callable

import numpy as np

from refusal_jax.models.config import ModelConfig
from refusal_jax.models.structure import structure
from refusal_jax.models.tables import (
    deepseek,
    dense,
    falcon_h1,
    gemma4,
    granite_hybrid,
    lfm2,
    llama4,
    mixtures,
    nemotron,
    qwen_hybrid,
)
from refusal_jax.models.weights import weight_table

# Decoder path -> HF name, `{l}` being the layer and `{e}` the expert. Layouts agree: `[out, in]`, vocabulary first. Paths
# that share a name are that tensor's rows one after the other, in this order (fused projections). An expert's weight whose
# name has no `{e}` is one of a tensor of all experts, along its first axis. A table may have more paths than a config has
# weights (biases, a tied unembedding).
PARTS = deepseek, dense, falcon_h1, gemma4, granite_hybrid, lfm2, llama4, mixtures, nemotron, qwen_hybrid


def _merged(name: str) -> dict:
    """Returns what all tables' files say under a name, by family."""
    return {family: found for part in PARTS for family, found in getattr(part, name, {}).items()}


TABLES: dict[str, dict[str, str]] = _merged("TABLES")
# Decoder paths, by family, whose tensors are laid out otherwise: as `[in, out]`, and with the rows of the paths that share a name
# taking turns (all of the first rows, then all of the second, …).
TRANSPOSED: dict[str, set[str]] = _merged("TRANSPOSED")
ALTERNATING: dict[str, set[str]] = _merged("ALTERNATING")

# Tensors that a checkpoint may hold and that the text model's forward pass does not need: what old checkpoints stored
# although inference recomputes it, and the other parts of a multimodal model.
DERIVED = re.compile(r"rotary_emb\.inv_freq$")
DRAFT = re.compile(r"^model\.layers\.(\d+)\.")
KEYS = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.[kv]_(?:proj|norm)\.")
OTHER_PARTS: dict[str, re.Pattern] = _merged("OTHER_PARTS")
# The same of text models, whose checkpoints may have been taken out of a multimodal model as they were.
PASSED_OVER: dict[str, re.Pattern] = _merged("PASSED_OVER")
OTHER_SPELLINGS: dict[str, tuple[str, str]] = _merged("OTHER_SPELLINGS")  # how names may begin, and what is meant

# Decoder paths whose rows or columns write to the residual stream, and the edit site each of them serves.
MIXERS = ("", "full_", "delta_", "ssm_", "conv_")  # what the names of their weights begin with
WRITERS = {"embed": "resid_pre"} | {f"blocks.{kind}o": "attn_out" for kind in MIXERS}
WRITERS |= {
    f"blocks.{name}": "mlp_out"
    for name in ("down", "dense_down", "shared_down", "expert_down", "experts_out", "per_layer_out")
}
WRITER_BIASES = {f"{path}_bias": site for path, site in WRITERS.items() if path != "embed"}


def norms_after(cfg: ModelConfig, path: str) -> tuple[str, ...]:
    """Returns the decoder paths of the norms between what writes to the residual stream and the stream, in their order."""
    if not cfg.post_norm or path == "embed":
        return ()
    if path == "blocks.per_layer_out":
        return ("blocks.per_layer_post_norm",)
    first = {"blocks.down": "blocks.beside_post_norm", "blocks.expert_down": "blocks.expert_post_norm"}
    last = "blocks.attn_post_norm" if (WRITERS | WRITER_BIASES)[path] == "attn_out" else "blocks.mlp_post_norm"
    return (first[path], last) if cfg.d_beside and path in first else (last,)


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
    other, draft = (OTHER_PARTS | PASSED_OVER).get(cfg.family), DRAFT.match(name)
    tied = cfg.tied_embeddings and name == TABLES[cfg.family]["unembed"]
    ahead = bool(draft) and cfg.n_layers <= int(draft[1]) < cfg.n_layers + cfg.draft_layers
    return tied or ahead or _is_unused(cfg, name) or bool(DERIVED.search(name)) or bool(other and other.search(name))


def _is_unused(cfg: ModelConfig, name: str) -> bool:
    """Returns whether a tensor makes keys or values of a layer that uses those of another, as first releases stored them."""
    found = KEYS.search(name) if cfg.mixers else None
    return bool(found) and int(found[1]) < cfg.n_layers and structure(cfg).source_l[int(found[1])] is not None

"""Runs a checkpoint's forward pass block by block, so that checking an export takes the memory of one block and not of
a model.

The blocks are run by the decoder itself, made of one layer at a time; where weights come from is a `Weights`: files as
written, or files with edits applied on the way. Axis letters: as in the decoder, and N tokens read.
"""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from refusal_jax.chat.padding import TokenBatch
from refusal_jax.checkpoints.rewrite import Checkpoint
from refusal_jax.edits import SITES, Edits
from refusal_jax.export.tensor_edits import Projection
from refusal_jax.models.attention import Context
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.decoder import Decoder, Residuals
from refusal_jax.models.families import TABLES, pieces
from refusal_jax.models.structure import structure
from refusal_jax.models.weights import mixers_of
from refusal_jax.taps import Taps

READ = (*SITES, "resid_post")
READERS = 4  # threads, each of which reads a tensor
VOCABULARY_ROWS = 8192  # of the unembedding, in memory at a time


@runtime_checkable
class Weights(Protocol):
    """Tensors by HF name: `rows` gives rows of one, all by default, float32."""

    @property
    def cfg(self) -> ModelConfig: ...

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class EditedWeights:
    """Weights with edits applied when they are read, in float32 and rounded to the dtype they are stored in."""

    checkpoint: Checkpoint
    edits: dict[str, Projection]

    @property
    def cfg(self) -> ModelConfig:
        return self.checkpoint.cfg

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Returns rows of a tensor, all by default; a part can only be asked for if the tensor is edited row by row."""
        rows = self.checkpoint.rows(name, start, stop)
        if name in self.edits:
            rows = self.edits[name](rows).astype(self.checkpoint.tensors[name].numpy_dtype).astype(np.float32)
        return rows


@dataclasses.dataclass
class Stream:
    """One model on its way through the layers.

    weights: of its blocks. edits: what is done at inference time, one row, or by layer what is added at its input. embed,
    unembed: where those come from, by default the same weights. residuals: so far. kept: memory of layers that later ones use, by
    layer. projections: of each layer, by site.
    """

    weights: Weights
    edits: Edits | dict[int, np.ndarray] | None = None
    embed: Weights | None = None
    unembed: Weights | None = None
    residuals: Residuals | None = None
    kept: dict[int, Any] = dataclasses.field(default_factory=dict)
    projections: list[dict[str, jax.Array]] = dataclasses.field(default_factory=list)

    def edits_at(self, layer: int) -> Edits:
        """Returns what is done at a layer, for a model of that layer alone."""
        if isinstance(self.edits, Edits):
            return self.edits.at_layer(layer)
        if self.edits and layer in self.edits:
            return Edits.add(self.edits[layer], 0)
        return Edits.none(self.weights.cfg.d_model)

    def projection(self) -> dict[str, list[float]]:
        """Returns the largest |x . r| / |x| over all tokens of each layer, by site; for a subspace, |x . r| is the norm
        of the part of x in it."""
        return {site: [float(layer[site]) for layer in self.projections] for site in READ}


def run_streams(streams: Sequence[Stream], batch: TokenBatch, basis_jd: np.ndarray, bar) -> None:
    """Runs all streams through all layers, of which one is in memory at a time. bar: the progress in layers."""
    for stream in streams:
        stream.residuals = _embedded(stream.embed or stream.weights, batch.tokens)
    mask, sources = jnp.asarray(batch.mask), structure(streams[0].weights.cfg).source_l
    for layer, source in enumerate(sources):
        for weights in {id(s.weights): s.weights for s in streams}.values():
            block = layer_decoder(weights, layer)
            for stream in (s for s in streams if s.weights is weights):
                before = None if source is None else (stream.kept[source],)
                stream.residuals, ratios, memory = _layer(
                    block, stream.residuals, layer, mask, stream.edits_at(layer), basis_jd.astype(np.float32), before
                )
                stream.projections.append(ratios)
                if layer in sources:
                    (stream.kept[layer],) = memory
            jax.block_until_ready([s.residuals for s in streams])
            del block
        bar.update()


def layer_decoder(weights: Weights, layer: int) -> Decoder:
    """Returns a decoder of one layer of a checkpoint, without an embedding."""
    cfg, parts = weights.cfg, {}
    own = [piece for piece in pieces(cfg) if piece.layer == layer]
    with ThreadPoolExecutor(READERS) as pool:
        for piece, values in zip(own, pool.map(lambda piece: piece.rows(weights.rows), own), strict=True):
            parts.setdefault(piece.path, []).append(values)
    experts = {piece.path for piece in pieces(cfg) if len(piece.index) == 2}
    stacked = {
        path: jnp.asarray((np.stack(found) if path in experts else found[0])[None]) for path, found in parts.items()
    }
    mixer: Any = mixers_of(cfg)[cfg.layer_mixers[layer] if cfg.layer_mixers else 0]
    mixers = (mixer,)
    if mixer is not None and mixer.reads is not None:  # its memory is another's, of the mixer that comes with it
        mixers = cfg.mixers[mixer.reads], dataclasses.replace(mixer, reads=0)
    one = dataclasses.replace(
        cfg,
        n_layers=1,
        layer_kinds=(cfg.layer_kinds[layer],),
        dense_layers=(0,) if layer in cfg.dense_layers else (),
        without_mlp=(0,) if layer in cfg.without_mlp else (),
        mixers=mixers,
        layer_mixers=(len(mixers) - 1,),
        tied_embeddings=True,
    )
    return Decoder(one, stacked | _no_ends(cfg))


def _no_ends(cfg: ModelConfig) -> dict[str, jax.Array]:
    return {"embed": jnp.zeros((1, cfg.d_model)), "final_norm": jnp.zeros(cfg.d_model)}


def _ends(cfg: ModelConfig) -> ModelConfig:
    """Returns the config of a decoder that has an embedding and an unembedding but no blocks."""
    alike = {"mixers": (), "layer_mixers": (), "without_mlp": ()}
    return dataclasses.replace(cfg, n_experts=0, dense_layers=(), tied_embeddings=False, **alike)


@jax.jit
def _layer(block: Decoder, residuals: Residuals, layer, mask_bt, edits: Edits, basis_jd, before):
    """Returns the residuals after a layer, for each site the largest part over all real tokens' vectors that lies in the
    subspace, and the layer's memory. before: as of `Block`, where the layer uses the memory of another."""
    told_btlp = residuals.told_btlp
    told_btp = None if told_btlp is None else jax.lax.dynamic_index_in_dim(told_btlp, layer, axis=2, keepdims=False)
    stacked, own = jax.tree.map(lambda a: a[0], block.layers(edits))
    own, ctx = dataclasses.replace(own, told_btp=told_btp), Context.of_prompt(block.cfg, mask_bt)
    x_btd, tapped, memory = stacked(residuals.x_btd, own, ctx, edits, Taps(READ), None, block.apart, before)

    def ratio(y_btd):
        along = jnp.linalg.norm(jnp.einsum("btd,jd->btj", y_btd, basis_jd, precision="highest"), axis=-1)
        part = along / jnp.maximum(jnp.linalg.norm(y_btd, axis=-1), jnp.finfo(jnp.float32).tiny)
        return jnp.max(jnp.where(mask_bt, part, 0))

    return dataclasses.replace(residuals, x_btd=x_btd), {site: ratio(tapped[site]) for site in READ}, memory


def _embedded(weights: Weights, tokens_bt: np.ndarray) -> Residuals:
    """Returns the first values of the residual stream; of embeddings, only the rows of these tokens are read."""
    cfg, table = weights.cfg, TABLES[weights.cfg.family]
    used, place = np.unique(tokens_bt, return_inverse=True)

    def rows(path: str) -> jax.Array:
        return jnp.asarray(np.concatenate([weights.rows(table[path], token, token + 1) for token in used.tolist()]))

    ends = {"embed": rows("embed"), "final_norm": jnp.zeros(cfg.d_model)}
    ends["unembed"] = ends["embed"]
    if cfg.d_per_layer:
        ends["per_layer_embed"] = rows("per_layer_embed")
        ends |= {path: jnp.asarray(weights.rows(table[path])) for path in ("per_layer_projection", "per_layer_norm")}
    return Decoder(_ends(cfg), ends).embed_tokens(jnp.asarray(place.reshape(tokens_bt.shape)))


@dataclasses.dataclass(frozen=True)
class Readings:
    """logits_pv: float32 `[P, V]`, of the first P tokens read. nll_n: float64, of the next tokens after the others."""

    logits_pv: np.ndarray
    nll_n: np.ndarray


def read_logits(stream: Stream, rows: np.ndarray, columns: np.ndarray, whole: int, targets: np.ndarray) -> Readings:
    """Returns what a stream predicts at tokens (row, column) of the batch: full logits for the first `whole` of them,
    and for the others the cross-entropy (nats) of `targets`. The vocabulary is processed in blocks."""
    weights = stream.unembed or stream.weights
    cfg, table = weights.cfg, TABLES[weights.cfg.family]
    name = table["embed" if cfg.tied_embeddings else "unembed"]
    norm = jnp.asarray(stream.weights.rows(table["final_norm"]))
    assert stream.residuals is not None, "run_streams comes first"
    x_1nd = stream.residuals.x_btd[rows, columns][None]
    logits = np.zeros((whole, cfg.vocab_size), np.float32)
    most, total, hit = np.full(len(targets), -np.inf), np.zeros(len(targets)), np.zeros(len(targets))
    for start in range(0, cfg.vocab_size, VOCABULARY_ROWS):
        stop = min(start + VOCABULARY_ROWS, cfg.vocab_size)
        unembed = jnp.asarray(weights.rows(name, start, stop))
        part = np.asarray(_logits(Decoder(_ends(cfg), _no_ends(cfg) | {"final_norm": norm, "unembed": unembed}), x_1nd))
        logits[:, start:stop], rest = part[:whole], part[whole:]
        if not len(targets):
            continue
        higher = np.maximum(most, rest.max(axis=1))
        total = total * np.exp(most - higher) + np.exp(rest - higher[:, None], dtype=np.float32).sum(
            1, dtype=np.float64
        )
        most = higher
        inside = np.flatnonzero((targets >= start) & (targets < stop))
        hit[inside] = rest[inside, targets[inside] - start]
    return Readings(logits, np.log(total) + most - hit)


@jax.jit
def _logits(ends: Decoder, x_btd) -> jax.Array:
    """Returns logits `[T, V]`, NaN for tokens whose values are not finite."""
    logits_1tv = ends.logits(x_btd)
    return jnp.where(ends.finite(x_btd, logits_1tv)[..., None], logits_1tv, jnp.nan)[0]

"""The parameters of the decoder: shape, logical axes and initial size of each, declared once."""

import dataclasses

import numpy as np

from refusal_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Weight:
    """Shape, logical axes and initial standard deviation (None: a norm's neutral value; 0: zeros) of one parameter.

    heads: what an axis "heads" or "kv_heads" counts, slowest first: key/value heads and the queries of each, whose entries
    stay together. exact: whether it is float32 whatever the dtype of the others. layers: those that have it, if it is of blocks;
    its axis "layers" counts them.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    std: float | None
    heads: tuple[int, int] = (1, 1)
    exact: bool = False
    layers: tuple[int, ...] = ()

    @property
    def per_expert(self) -> bool:
        """Returns whether each expert has one of its own."""
        return "experts" in self.axes

    def stored_as(self, dtype):
        """Returns the dtype that it has in a decoder of `dtype`."""
        return np.dtype("float32") if self.exact else dtype


def weight_table(cfg: ModelConfig) -> dict[str, Weight]:
    """Returns every parameter of the decoder by path; those of blocks are stacked on a leading L axis.

    Matrices are `[out, in]` as in HF checkpoints; those of experts are `[L, experts, out, in]`. Where layers with experts and
    layers without alternate, what only some layers have has an L axis of these.
    """
    d, v = cfg.d_model, cfg.vocab_size
    table = {"embed": Weight((v, d), ("vocab", "embed"), d**-0.5 if cfg.tied_embeddings else 1.0)}
    everywhere = _norms(cfg) | _attention(cfg) | ({} if cfg.n_experts else _mlp(cfg, cfg.d_mlp))
    parts = {tuple(range(cfg.n_layers)): everywhere}
    if cfg.sparse_layers:
        parts[cfg.sparse_layers] = parts.get(cfg.sparse_layers, {}) | _experts(cfg)
    if cfg.dense_layers:
        parts[cfg.dense_layers] = parts.get(cfg.dense_layers, {}) | _mlp(cfg, cfg.d_dense, "dense_")
    for layers, weights in parts.items():
        for name, w in weights.items():
            shape, axes = (len(layers), *w.shape), ("layers", *w.axes)
            table[f"blocks.{name}"] = dataclasses.replace(w, shape=shape, axes=axes, layers=layers)
    table["final_norm"] = Weight((d,), ("norm",), None)
    if not cfg.tied_embeddings:
        table["unembed"] = Weight((v, d), ("vocab", "embed"), d**-0.5)
    return table


def factor_names(name: str) -> tuple[str, str]:
    """Returns the names of the low-rank factors that may stand beside a matrix: `[L, out, rank]` and `[L, rank, in]`, whose
    product is added to it."""
    return f"{name}_left", f"{name}_right"


def names_apart(cfg: ModelConfig) -> set[str]:
    """Returns the names of the weights of blocks that do not belong to every layer as a whole: those that each expert has, and
    those that only some layers have."""
    return {
        path.removeprefix("blocks.")
        for path, weight in weight_table(cfg).items()
        if weight.per_expert or 0 < len(weight.layers) < cfg.n_layers
    }


def mixture_names(cfg: ModelConfig, per_expert: bool) -> list[str]:
    """Returns the names of the weights that layers with experts have for their MLP: those of each expert, or those besides."""
    return [name for name, weight in _experts(cfg).items() if weight.per_expert == per_expert]


def _growth(cfg: ModelConfig) -> float:
    """Returns the initial scale of what writes to the residual stream, so that all blocks together keep its size."""
    return (2 * cfg.n_layers) ** -0.5


def _norms(cfg: ModelConfig) -> dict[str, Weight]:
    names = ["attn_norm", "mlp_norm"][: 2 - cfg.parallel] * cfg.pre_norm
    names += ["attn_post_norm", "mlp_post_norm"] * cfg.post_norm
    return {name: Weight((cfg.d_model,), ("norm",), None) for name in names}


def _attention(cfg: ModelConfig) -> dict[str, Weight]:
    d, q, kv = cfg.d_model, cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
    queries, keys = (cfg.n_kv_heads, cfg.n_heads // cfg.n_kv_heads), (cfg.n_kv_heads, 1)
    block = {
        "q": Weight((q, d), ("heads", "embed"), d**-0.5, queries),
        "k": Weight((kv, d), ("kv_heads", "embed"), d**-0.5, keys),
        "v": Weight((kv, d), ("kv_heads", "embed"), d**-0.5, keys),
        "o": Weight((d, q), ("embed", "heads"), _growth(cfg) * q**-0.5, queries),
    }
    if cfg.qkv_bias:
        block |= {
            "q_bias": Weight((q,), ("heads",), 0.0, queries),
            "k_bias": Weight((kv,), ("kv_heads",), 0.0, keys),
            "v_bias": Weight((kv,), ("kv_heads",), 0.0, keys),
        }
    if cfg.o_bias:
        block["o_bias"] = Weight((d,), ("norm",), 0.0)
    if cfg.sinks:
        block["sinks"] = Weight((cfg.n_heads,), ("heads",), 0.0, queries)
    if cfg.qk_norm == "each":
        block["q_norm"] = Weight((cfg.n_heads, cfg.head_dim), ("heads", "norm"), None, queries)
        block["k_norm"] = Weight((cfg.n_kv_heads, cfg.head_dim), ("kv_heads", "norm"), None, keys)
    elif cfg.qk_norm:
        shared = cfg.qk_norm == "head"
        block["q_norm"] = Weight((cfg.head_dim if shared else q,), ("norm",), None)
        block["k_norm"] = Weight((cfg.head_dim if shared else kv,), ("norm",), None)
    return block


def _mlp(cfg: ModelConfig, width: int, kind: str = "") -> dict[str, Weight]:
    """Returns a gated MLP; kind: what its names begin with."""
    d, f = cfg.d_model, width
    block = {
        f"{kind}gate": Weight((f, d), ("mlp", "embed"), d**-0.5),
        f"{kind}up": Weight((f, d), ("mlp", "embed"), d**-0.5),
        f"{kind}down": Weight((d, f), ("embed", "mlp"), _growth(cfg) * f**-0.5),
    }
    if cfg.mlp_bias:
        block |= {
            f"{kind}gate_bias": Weight((f,), ("mlp",), 0.0),
            f"{kind}up_bias": Weight((f,), ("mlp",), 0.0),
            f"{kind}down_bias": Weight((d,), ("norm",), 0.0),
        }
    return block


def _experts(cfg: ModelConfig) -> dict[str, Weight]:
    """Returns the experts, their router, and what every token goes through beside them."""
    d, n = cfg.d_model, cfg.n_experts
    block = {
        name: dataclasses.replace(w, shape=(n, *w.shape), axes=("experts", *w.axes))
        for name, w in _mlp(cfg, cfg.d_mlp).items()
    }
    # What is added to scores must be as exact as they are; what they are made of then is, too, as in transformers.
    block["router"] = Weight((n, d), ("routes", "embed"), d**-0.5, exact=cfg.router_correction)
    if cfg.router_bias:
        block["router_bias"] = Weight((n,), ("routes",), 0.0)
    if cfg.router_correction:
        block["router_correction"] = Weight((n,), ("routes",), 0.0, exact=True)
    if cfg.d_shared:
        block |= _mlp(cfg, cfg.d_shared, "shared_")
    if cfg.shared_gate:
        block["shared_router"] = Weight((1, d), ("routes", "embed"), d**-0.5)
    return block

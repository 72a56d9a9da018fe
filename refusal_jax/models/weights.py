"""The parameters of the decoder: shape, logical axes and initial size of each, declared once."""

import dataclasses

from refusal_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Weight:
    """Shape, logical axes and initial standard deviation (None: a norm's neutral value; 0: zeros) of one parameter.

    heads: what an axis "heads" or "kv_heads" counts, slowest first: key/value heads and the queries of each, whose entries
    stay together.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    std: float | None
    heads: tuple[int, int] = (1, 1)


def weight_table(cfg: ModelConfig) -> dict[str, Weight]:
    """Returns every parameter of the decoder by path; those of blocks are stacked on a leading L axis.

    Matrices are `[out, in]` as in HF checkpoints; with experts, those of the MLP are `[L, experts, out, in]`.
    """
    d, v = cfg.d_model, cfg.vocab_size
    table = {"embed": Weight((v, d), ("vocab", "embed"), d**-0.5 if cfg.tied_embeddings else 1.0)}
    for name, w in (_norms(cfg) | _attention(cfg) | _mlp(cfg)).items():
        table[f"blocks.{name}"] = dataclasses.replace(w, shape=(cfg.n_layers, *w.shape), axes=("layers", *w.axes))
    table["final_norm"] = Weight((d,), ("norm",), None)
    if not cfg.tied_embeddings:
        table["unembed"] = Weight((v, d), ("vocab", "embed"), d**-0.5)
    return table


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
    if cfg.qk_norm == "each":
        block["q_norm"] = Weight((cfg.n_heads, cfg.head_dim), ("heads", "norm"), None, queries)
        block["k_norm"] = Weight((cfg.n_kv_heads, cfg.head_dim), ("kv_heads", "norm"), None, keys)
    elif cfg.qk_norm:
        shared = cfg.qk_norm == "head"
        block["q_norm"] = Weight((cfg.head_dim if shared else q,), ("norm",), None)
        block["k_norm"] = Weight((cfg.head_dim if shared else kv,), ("norm",), None)
    return block


def _mlp(cfg: ModelConfig) -> dict[str, Weight]:
    d, f = cfg.d_model, cfg.d_mlp
    many, axis = ((cfg.n_experts,), ("experts",)) if cfg.n_experts else ((), ())
    block = {
        "gate": Weight((*many, f, d), (*axis, "mlp", "embed"), d**-0.5),
        "up": Weight((*many, f, d), (*axis, "mlp", "embed"), d**-0.5),
        "down": Weight((*many, d, f), (*axis, "embed", "mlp"), _growth(cfg) * f**-0.5),
    }
    if cfg.n_experts:
        block["router"] = Weight((cfg.n_experts, d), ("experts", "embed"), d**-0.5)
    if cfg.mlp_bias:
        block |= {
            "gate_bias": Weight((f,), ("mlp",), 0.0),
            "up_bias": Weight((f,), ("mlp",), 0.0),
            "down_bias": Weight((d,), ("norm",), 0.0),
        }
    return block

"""The parameters of the decoder: shape, logical axes and initial size of each, declared once."""

import dataclasses

from refusal_jax.models.config import ModelConfig
from refusal_jax.models.mixers.attention import Attention
from refusal_jax.models.mixers.mixer import Mixer
from refusal_jax.models.weight import Weight, growth

EXPERTS = "experts"  # the channel mixer that is a mixture


def weight_table(cfg: ModelConfig) -> dict[str, Weight]:
    """Returns every parameter of the decoder by path; those of blocks are stacked on a leading L axis.

    Matrices are `[out, in]` as in HF checkpoints; those of experts are `[L, experts, out, in]`. What only
    some layers have has an L axis of these.
    """
    d, v = cfg.d_model, cfg.vocab_size
    table = {"embed": Weight((v, d), ("vocab", "embed"), d**-0.5 if cfg.tied_embeddings else 1.0)}
    table |= _told(cfg) if cfg.d_per_layer else {}
    found: dict[str, tuple[Weight, set[int]]] = {}

    def add(layers: list[int], weights: dict[str, Weight]) -> None:
        """Adds weights that these layers have; kinds of layers that have weights of one name and shape share a stack."""
        for name, weight in weights.items() if layers else ():
            found.setdefault(name, (weight, set()))[1].update(layers)

    mixers, mixer_l = mixers_of(cfg), cfg.layer_mixers or (0,) * cfg.n_layers
    channel_l = [channel_of(cfg, layer) for layer in range(cfg.n_layers)]
    everywhere = range(cfg.n_layers)
    mixing = [l for l in everywhere if mixers[mixer_l[l]] is not None]
    with_channel = [l for l in everywhere if channel_l[l] is not None]
    for kind, norms in (("norm", cfg.pre_norm), ("post_norm", cfg.post_norm)):
        norm = {kind: Weight((d,), ("norm",), None)} if norms else {}
        add(mixing, {f"attn_{name}": w for name, w in norm.items()})
        if not (cfg.parallel and kind == "norm"):  # one norm before both
            add(with_channel, {f"mlp_{name}": w for name, w in norm.items()})
    add(list(everywhere), _at_the_end(cfg))
    for index, mixer in enumerate(mixers):
        if mixer is not None:
            add([l for l in everywhere if mixer_l[l] == index], mixer.weights(cfg))
    for channel in dict.fromkeys(channel_l):
        if channel is not None:
            weights = _mixture(cfg) if channel == EXPERTS else _mlp(cfg, cfg.d_dense if channel else cfg.d_mlp, channel)
            add([l for l in everywhere if channel_l[l] == channel], weights)
    for name, (w, having) in found.items():
        layers = tuple(sorted(having))
        shape, axes = (len(layers), *w.shape), ("layers", *w.axes)
        table[f"blocks.{name}"] = dataclasses.replace(w, shape=shape, axes=axes, layers=layers)
    table["final_norm"] = Weight((d,), ("norm",), None)
    if not cfg.tied_embeddings:
        table["unembed"] = Weight((v, d), ("vocab", "embed"), d**-0.5)
    return table


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


def mixers_of(cfg: ModelConfig) -> tuple[Mixer | None, ...]:
    """Returns the kinds of sequence mixers of a model, None for layers without one."""
    return cfg.mixers or (Attention(),)


def channel_of(cfg: ModelConfig, layer: int) -> str | None:
    """Returns the channel mixer of a layer: EXPERTS, the prefix of an MLP's names, or None for none."""
    if layer in cfg.without_mlp:
        return None
    return "dense_" if layer in cfg.dense_layers else EXPERTS if cfg.n_experts else ""


def _mlp(cfg: ModelConfig, width: int, kind: str = "") -> dict[str, Weight]:
    """Returns an MLP; kind: what its names begin with."""
    block = _branches(cfg, cfg.d_model, width, kind)
    if cfg.mlp_bias:
        block |= {f"{name}_bias": _bias(weight) for name, weight in block.items()}
    return block


def _branches(cfg: ModelConfig, d: int, f: int, kind: str, outer: str = "embed") -> dict[str, Weight]:
    """Returns the matrices of an MLP that reads and writes d features. outer: the name of their axis."""
    read = Weight((f, d), ("mlp", outer), d**-0.5)
    write = Weight((d, f), (outer, "mlp"), growth(cfg) * f**-0.5)
    return ({f"{kind}gate": read} if cfg.gated_mlp else {}) | {f"{kind}up": read, f"{kind}down": write}


def _bias(weight: Weight) -> Weight:
    """Returns the bias beside a matrix: divided as its rows are, but for that of rows of the residual stream."""
    rows = weight.axes[0]
    return Weight(weight.shape[:1], ("norm" if rows in ("embed", "inner") else rows,), 0.0)


def _experts(cfg: ModelConfig) -> dict[str, Weight]:
    """Returns the experts, their router, and what every token goes through beside them."""
    d, n, inner = cfg.d_model, cfg.n_experts, cfg.d_expert_io
    each = _branches(cfg, inner or d, cfg.d_mlp, cfg.expert_prefix, "inner" if inner else "embed")
    if cfg.expert_bias:
        each |= {f"{name}_bias": _bias(weight) for name, weight in each.items()}
    block = {name: dataclasses.replace(w, shape=(n, *w.shape), axes=("experts", *w.axes)) for name, w in each.items()}
    if inner:
        outside = {
            "experts_in": Weight((inner, d), ("routes", "embed"), d**-0.5),
            "experts_out": Weight((d, inner), ("embed", "routes"), growth(cfg) * inner**-0.5),
        }
        block |= outside | ({f"{name}_bias": _bias(w) for name, w in outside.items()} if cfg.mlp_bias else {})
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
    if cfg.d_beside:
        block["expert_norm"] = Weight((d,), ("norm",), None)
        block["router_scale"] = Weight((d,), ("norm",), None, as_is=True)
        block["expert_scale"] = Weight((n,), ("routes",), None, as_is=True)
    return block


def _mixture(cfg: ModelConfig) -> dict[str, Weight]:
    """Returns the experts and, where an MLP stands beside them, that and the norms of what either adds."""
    if not cfg.d_beside:
        return _experts(cfg)
    norms = {f"{kind}_post_norm": Weight((cfg.d_model,), ("norm",), None) for kind in ("beside", "expert")}
    return _experts(cfg) | _mlp(cfg, cfg.d_beside) | norms


def _told(cfg: ModelConfig) -> dict[str, Weight]:
    """Returns what each layer is told of tokens: its own embedding, and the model's embedding made as narrow."""
    width, d = cfg.n_layers * cfg.d_per_layer, cfg.d_model
    return {
        "per_layer_embed": Weight((cfg.per_layer_vocab, width), ("vocab", "embed"), 1.0),
        "per_layer_projection": Weight((width, d), ("routes", "embed"), 1.0),
        "per_layer_norm": Weight((cfg.d_per_layer,), ("norm",), None),
    }


def _at_the_end(cfg: ModelConfig) -> dict[str, Weight]:
    """Returns what a layer does after its two mixers: with what it is told of tokens, and with the residual as a whole."""
    d, p, found = cfg.d_model, cfg.d_per_layer, {}
    if p:
        found["per_layer_gate"] = Weight((p, d), ("routes", "embed"), d**-0.5)
        found["per_layer_out"] = Weight((d, p), ("embed", "routes"), growth(cfg) * p**-0.5)
        found["per_layer_post_norm"] = Weight((d,), ("norm",), None)
    return found | ({"layer_scale": Weight((1,), ("norm",), None, as_is=True)} if cfg.layer_scale else {})

"""Reads configs of LFM2: short convolutions, with attention in some layers, without experts and with."""

from refusal_jax.errors import shown
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.hf_attributes import Reader
from refusal_jax.models.mixers.attention import Attention
from refusal_jax.models.mixers.convolution import ShortConvolution

# What their config classes supply.
LFM2 = {
    "vocab_size": 65536,
    "d_model": 2560,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 8,
    "d_mlp": 12288,
    "context_length": 128000,
    "norm_eps": 1e-5,
    "tied_embeddings": True,
}
LFM2_MOE = LFM2 | {"d_model": 2048, "d_mlp": 1792}
# What published configs say besides, which transformers does not read; the tensors show the sizes among it.
IGNORED = """
    block_dim block_mlp_init_scale block_norm_eps block_out_init_scale block_use_xavier_init conv_dim conv_dim_out
    conv_use_xavier_init
""".split()


def _sizes(read: Reader, defaults: dict, **names: str) -> dict:
    """Reads the sizes that both have. An older name of whether the embeddings are tied counts more."""
    sizes = read.sizes(defaults, norm_eps="norm_eps", activation=None, **names)
    sizes["tied_embeddings"] = read.take("tie_embedding", sizes["tied_embeddings"], bool)
    for name in ("hidden_act", "block_use_swiglu", "use_pos_enc"):
        read.only(name, "silu" if name == "hidden_act" else True)
    read.ignore(*IGNORED)
    return sizes


def _mixers(read: Reader, count: int, types) -> dict:
    """Reads the convolution, and which layers have one. types: "conv" or "full_attention" for each layer."""
    taps, bias = read.take("conv_L_cache", 3, int, least=2), read.take("conv_bias", False, bool)
    known = isinstance(types, list) and all(kind in ("conv", "full_attention") for kind in types)
    if not known or len(types) != count:
        read.problems.append(
            f"layer_types = {shown(types)}, expected 'conv' or 'full_attention' for each of {count} layers"
        )
        return {}
    mixers = {"full_attention": Attention(), "conv": ShortConvolution(taps, bias)}
    used = [kind for kind in mixers if kind in types]
    return {
        "mixers": tuple(mixers[kind] for kind in used),
        "layer_mixers": tuple(map(used.index, types)),
        "qk_norm": "head",
    }


def _lfm2(read: Reader) -> ModelConfig:
    """Reads LFM2. Its MLP is narrower than `intermediate_size` says, whose older name counts more."""
    sizes = _sizes(read, LFM2)
    count, width = sizes["n_layers"], read.take("block_ff_dim", sizes["d_mlp"], int)
    multiple, share = read.take("block_multiple_of", 256, int), read.take("block_ffn_dim_multiplier", 1.0, float)
    if read.take("block_auto_adjust_ff_dim", True, bool):
        width = multiple * -(-int(share * int(2 * width / 3)) // multiple)
    named, types = read.take("full_attn_idxs"), read.take("layer_types")
    if named is not None and not (isinstance(named, list) and all(type(layer) is int for layer in named)):
        read.problems.append(f"full_attn_idxs = {shown(named)}, expected a list of layers")
        named = None
    if types is None:
        attending = set(range(count) if named is None else named)
        types = ["full_attention" if layer in attending else "conv" for layer in range(count)]
    rope = read.main_rope(sizes, 1e6)
    return read.config("lfm2", sizes | {"d_mlp": max(width, 1)}, rope=rope, **_mixers(read, count, types))


def _lfm2_moe(read: Reader) -> ModelConfig:
    sizes = _sizes(read, LFM2_MOE, d_mlp="moe_intermediate_size")
    experts, used = read.take("num_experts", 32, int), read.take("num_experts_per_tok", 4, int)
    if used > experts:
        read.problems.append(f"num_experts_per_tok = {used} is more than the {experts} experts")
    first = min(read.take("num_dense_layers", 2, int, least=0), sizes["n_layers"])
    width = read.take("intermediate_size", 7168, int)
    return read.config(
        "lfm2_moe",
        sizes,
        rope=read.main_rope(sizes, 1e6),
        **_mixers(read, sizes["n_layers"], read.take("layer_types", required=True)),
        n_experts=experts,
        experts_per_token=used,
        router_scores="sigmoid",
        router_correction=read.take("use_expert_bias", True, bool),
        renormalise_experts=read.take("norm_topk_prob", True, bool),
        router_floor=1e-6,
        routed_scale=read.take("routed_scaling_factor", 1.0, float),
        dense_layers=tuple(range(first)),
        d_dense=width if first else 0,
    )


READERS = {"lfm2": _lfm2, "lfm2_moe": _lfm2_moe}

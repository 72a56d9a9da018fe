"""Reads configs of models with latent attention: DeepSeek V2 and V3, Kimi K2 and GLM 4.7 Flash."""

from functools import partial
from typing import Any

from refusal_jax.errors import shown
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.hf_attributes import Reader
from refusal_jax.models.mixers.latent import Latent
from refusal_jax.models.readers.mixtures import dense, experts, groups
from refusal_jax.models.rope import Rope, growth, is_number

# What the config classes supply where a config does not say it: fields of `SIZES`, then attributes.
V2 = {"context_length": 2048, "d_mlp": 1407}
V3 = {"context_length": 4096, "d_mlp": 2048}
GLM = {"context_length": 202752, "norm_eps": 1e-5, "d_mlp": 1536}
RANKS = {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
GLM_RANKS = RANKS | {"q_lora_rank": 768, "qk_nope_head_dim": 192, "v_head_dim": 256}


def _latent(read: Reader, defaults: dict, ranks: dict, either_way: bool) -> tuple[dict, dict[str, Any]]:
    """Reads sizes and attention, and returns the fields of `SIZES` and the switches.

    either_way: whether the config says which entries of a head the rope turns together; else they are neighbours. What counts as
    the width of a head here is that of its queries.
    """
    sizes = read.sizes(defaults, d_mlp="moe_intermediate_size", n_kv_heads=None, head_dim=None)
    widths = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    kv_rank, plain, turned, v_dim = (read.take(name, ranks[name], int) for name in widths)
    q_rank, bias = (
        read.take_optional("q_lora_rank", ranks["q_lora_rank"], int),
        read.take("attention_bias", False, bool),
    )
    read.only("num_key_value_heads", sizes["n_heads"])
    read.only("head_dim", turned)
    read.only("qk_head_dim", plain + turned)
    neighbours = True
    if either_way:
        neighbours = bool(read.take_optional("rope_interleave", True, bool))
    else:
        read.only("rope_interleave", True)
    spec = read.take("rope_scaling") or read.take("rope_parameters") or {}
    rope = read.main_rope(sizes | {"head_dim": turned}, 1e4, spec, interleaved=neighbours)
    return sizes | {"head_dim": plain + turned}, {
        "rope": rope,
        "mixers": (Latent(kv_rank, q_rank, plain, turned, v_dim, bias),),
        "o_bias": bias,
        "query_scale": (plain + turned) ** -0.5 * _steepened(read, rope, spec),
    }


def _steepened(read: Reader, rope: Rope, spec) -> float:
    """Returns what a stretched rope multiplies the scores with, besides what it multiplies queries and keys with."""
    weight = spec.get("mscale_all_dim") if isinstance(spec, dict) and rope.kind != "default" else None
    if not weight:
        return 1.0
    steeper = growth(rope.factor, weight) ** 2 if is_number(weight) else 0.0
    if not is_number(steeper):
        read.problems.append(
            f"rope_scaling.mscale_all_dim = {shown(weight)}, expected a positive number of ordinary size"
        )
        return 1.0
    return steeper


def _shared(read: Reader, sizes: dict, count: int) -> dict:
    """Reads how wide the experts are together that every token goes through. count: where the config does not say."""
    return {"d_shared": sizes["d_mlp"] * read.take("n_shared_experts", count, int)}


def _first_dense(read: Reader, sizes: dict, count: int, width: int) -> dict:
    """Reads how many layers come before those with experts, and how wide their MLP is."""
    first = min(read.take("first_k_dense_replace", count, int, least=0), sizes["n_layers"])
    read.only("moe_layer_freq", 1)
    return dense(read, tuple(range(first)), width)


def _deepseek_v2(read: Reader) -> ModelConfig:
    """Reads DeepSeek V2, in which a group of experts counts as much as its best one, and weights are not renormalised."""
    sizes, switches = _latent(read, V2, RANKS, either_way=False)
    read.only("scoring_func", "softmax")
    read.only("norm_topk_prob", False)  # which transformers does not read
    read.only("mlp_bias", False)
    switches |= experts(read, 64, None, False, "n_routed_experts", "num_experts")
    method = read.take("topk_method", "greedy")
    if method == "group_limited_greedy":
        switches |= groups(read, switches, None, None, best=1)
    elif method == "greedy":
        read.ignore("n_group", "topk_group")
    else:
        read.problems.append(f"topk_method = {shown(method)} is not supported (greedy and group_limited_greedy are)")
    return read.config(
        "deepseek_v2",
        sizes,
        routed_scale=read.take("routed_scaling_factor", 1.0, float),
        **switches,
        **_shared(read, sizes, 2),
        **_first_dense(read, sizes, 0, 11008),
    )


def _corrected(read: Reader, sizes: dict, count: int, chosen: int, of_groups: tuple[int, int], scale: float) -> dict:
    """Reads the router of DeepSeek V3, whose choice constants correct. The rest: what the class supplies."""
    read.only("scoring_func", "sigmoid")
    read.only("topk_method", "noaux_tc")
    switches = experts(read, count, chosen, read.take("norm_topk_prob", True, bool), "n_routed_experts")
    return {
        "router_scores": "sigmoid",
        "router_correction": True,
        "routed_scale": read.take("routed_scaling_factor", scale, float),
        "draft_layers": read.take(
            "num_nextn_predict_layers", read.take("num_mtp_layers", 1, int, least=0), int, least=0
        ),
        **switches,
        **groups(read, switches, *of_groups),
        **_shared(read, sizes, 1),
    }


def deepseek_v3(read: Reader, family: str) -> ModelConfig:
    """Reads DeepSeek V3. Kimi K2 is one of other sizes, whose checkpoints bring the code of DeepSeek's first release."""
    sizes, switches = _latent(read, V3, RANKS, either_way=family != "kimi_k2")
    if family == "kimi_k2":
        read.ignore("aux_loss_alpha", "seq_aux", "ep_size")
    switches |= _corrected(read, sizes, 256, 8, (8, 4), 2.5)
    return read.config(family, sizes, **switches, **_first_dense(read, sizes, 3, 18432))


def _glm4_moe_lite(read: Reader) -> ModelConfig:
    """Reads GLM 4.7 Flash, whose class has a list of the layers that have experts, and does not read how many have none."""
    sizes, switches = _latent(read, GLM, GLM_RANKS, either_way=True)
    switches |= _corrected(read, sizes, 64, 4, (1, 1), 1.8)
    count = sizes["n_layers"]
    types = read.take("mlp_layer_types", ["dense"] + ["sparse"] * (count - 1))
    if not isinstance(types, list) or len(types) != count or not all(kind in ("dense", "sparse") for kind in types):
        read.problems.append(
            f"mlp_layer_types = {shown(types)}, expected 'dense' or 'sparse' for each of {count} layers"
        )
        types = []
    layers = tuple(layer for layer, kind in enumerate(types) if kind == "dense")
    read.only("first_k_dense_replace", len(layers))
    return read.config("glm4_moe_lite", sizes, **switches, **dense(read, layers, 10240))


READERS = {
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": partial(deepseek_v3, family="deepseek_v3"),
    "kimi_k2": partial(deepseek_v3, family="kimi_k2"),
    "glm4_moe_lite": _glm4_moe_lite,
}

"""Reads configs of Gemma 4: its text model alone, inside the multimodal models, and the unified one's."""

import dataclasses
from functools import partial
from typing import Any

from refusal_jax.errors import shown
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.hf_attributes import Reader
from refusal_jax.models.mixers.attention import Attention

GEMMA4 = {"vocab_size": 262144, "d_model": 2304, "n_layers": 30, "n_heads": 8, "n_kv_heads": 4, "head_dim": 256}
GEMMA4 |= {"d_mlp": 9216, "context_length": 131072, "tied_embeddings": True, "activation": "gelu_pytorch_tanh"}
# What its config class supplies.
ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}
EXPERTS = ("num_experts", "top_k_experts", "moe_intermediate_size")


def _gemma4(read: Reader, family: str, unified: bool = False) -> ModelConfig:
    """Reads Gemma 4. Its full layers have heads of another size than those with a window, its last layers may use keys and values
    of earlier ones, and what experts do is added to what an MLP does."""
    sizes = read.sizes(GEMMA4 | ({"context_length": 262144} if unified else {}), activation="hidden_activation")
    read.only("use_bidirectional_attention", "vision")  # that is, among the tokens of an image
    windows = _windows(read, sizes["n_layers"], read.take_optional("sliding_window", 1024 if unified else 512, int))
    own = _own_layers(read, windows)
    count, width, keys_as_values = _full_layers(read, sizes, windows)
    full = Attention(n_kv_heads=count, head_dim=width, prefix="full_", keys_as_values=keys_as_values)
    bias = read.take("attention_bias", False, bool)
    switches = {"qkv_bias": bias, "o_bias": bias, "logit_softcap": read.take("final_logit_softcapping", None, float)}
    shared = tuple(range(own, sizes["n_layers"]))
    if read.take("use_double_wide_mlp", False, bool) and shared:
        switches |= {"dense_layers": shared, "d_dense": 2 * sizes["d_mlp"]}
    if unified:
        read.only("hidden_size_per_layer_input", 0)  # written in its files, but not read
        read.only("enable_moe_block", False)
        read.ignore("vocab_size_per_layer_input", *EXPERTS)
    else:
        switches |= _per_layer_inputs(read) | _experts(read, sizes, bool(switches.get("dense_layers")))
    mixers, used = _mixers(windows, own, full)
    return read.config(
        family,
        sizes,
        windows=windows,
        **_ropes(read, sizes, width),
        mixers=mixers,
        layer_mixers=used,
        post_norm=True,
        qk_norm="head",
        value_norm=True,
        query_scale=1.0,
        layer_scale=True,
        embed_scale=sizes["d_model"] ** 0.5,
        **switches,
    )


def _windows(read: Reader, n_layers: int, window: int | None) -> list[int | None]:
    """Returns each layer's window; the last layer has none, whatever the config says."""
    return [*read.windows(n_layers, window, lambda layer: (layer + 1) % 6)[:-1], None]


def _own_layers(read: Reader, windows: list[int | None]) -> int:
    """Returns how many layers have keys and values of their own; those after them use the last such layer's of their kind."""
    shared = read.take("num_kv_shared_layers", 0, int, least=0)
    own = len(windows) - shared
    if own < 1 or {window is None for window in windows[:own]} != {window is None for window in windows}:
        read.problems.append(
            f"num_kv_shared_layers = {shared}, expected that of each kind of the {len(windows)} layers at least one has keys and "
            "values of its own"
        )
        return len(windows)
    return own


def _mixers(windows: list[int | None], own: int, full: Attention) -> tuple[tuple[Attention, ...], tuple[int, ...]]:
    """Returns the kinds of attention, and which each layer has. full: of layers without a window that have keys of their own."""
    kinds = [(layer >= own, window is None) for layer, window in enumerate(windows)]
    known = sorted(set(kinds))
    made = {False: Attention(), True: full}
    mixers = tuple(
        dataclasses.replace(made[is_full], reads=known.index((False, is_full)) if reads else None)
        for reads, is_full in known
    )
    return mixers, tuple(map(known.index, kinds))


def _full_layers(read: Reader, sizes: dict, windows: list[int | None]) -> tuple[int, int, bool]:
    """Returns the number of key/value heads of layers without a window, the width of their heads, and whether their values are
    made of the keys' projection.

    Versions of transformers write them as `global_head_dim` and `num_global_key_value_heads`, or for each layer.
    """
    same = read.take("attention_k_eq_v", False, bool)
    width, count = read.take("global_head_dim", 512, int), read.take("num_global_key_value_heads", None, int)
    count, per_layer = count if same else None, read.take("per_layer_config", None, dict)
    if per_layer is not None:
        count, width = _sizes_of_full(read, per_layer, sizes, windows)
    count, width = count or sizes["n_kv_heads"], width or sizes["head_dim"]
    if sizes["n_heads"] % count:
        read.problems.append(
            f"num_attention_heads = {sizes['n_heads']} is not a multiple of the {count} key/value heads of full layers"
        )
        count = sizes["n_kv_heads"]
    return count, width, same


def _sizes_of_full(read: Reader, per_layer: dict, sizes: dict, windows: list[int | None]) -> tuple[Any, Any]:
    """Returns the number of key/value heads of layers without a window and the width of their heads, by what is said for each
    layer: for those alone, or for all."""
    parts = {
        int(layer): part
        for layer, part in per_layer.items()
        if layer.isdecimal() and len(layer) < 9 and int(layer) < len(windows) and isinstance(part, dict)
    }
    found = {layer: _sizes_of_layer(read, parts.get(layer, {}), sizes) for layer in range(len(windows))}
    full = {found[layer] for layer, window in enumerate(windows) if window is None}
    others = {found[layer] for layer, window in enumerate(windows) if window is not None}
    if len(parts) < len(per_layer) or len(full) > 1 or others - {(sizes["n_kv_heads"], sizes["head_dim"])}:
        read.problems.append(
            f"per_layer_config = {shown(per_layer)}, expected the same attributes for each of the layers "
            f"{[layer for layer, window in enumerate(windows) if window is None]}, which have no window, and for others those "
            "of the model"
        )
    return next(iter(full))


def _sizes_of_layer(read: Reader, part: dict, sizes: dict) -> tuple[Any, Any]:
    """Returns a layer's number of key/value heads and the width of its heads; anything else in its entry of `per_layer_config`
    becomes a problem."""
    inner = Reader(part, read.where)
    found = inner.take("num_key_value_heads", sizes["n_kv_heads"], int), inner.take("head_dim", sizes["head_dim"], int)
    other = [f"{name[:80]} = {shown(part[name])} is not supported" for name in sorted(set(part) - inner.seen)]
    read.problems += [f"per_layer_config: {problem}" for problem in inner.problems + other]
    return found


def _ropes(read: Reader, sizes: dict, width: int) -> dict:
    """Returns the ropes of both kinds of layers. width: of a head of layers without a window."""
    ropes = read.take("rope_parameters", ROPES, dict)
    read.problems += [
        f"rope_parameters.{name[:80]} = {shown(ropes[name])} is not supported"
        for name in sorted(set(ropes) - set(ROPES))
        if ropes[name] not in (None, "default")  # which some tools write beside the two kinds
    ]

    def rope(kind: str, head_dim: int):
        spec, default = ropes.get(kind), ROPES[kind]
        name, context = f"rope_parameters.{kind}", sizes["context_length"]
        return read.rope(
            default if spec is None else spec, context, name, theta=default["rope_theta"], head_dim=head_dim
        )

    return {"rope": rope("full_attention", width), "local_rope": rope("sliding_attention", sizes["head_dim"])}


def _per_layer_inputs(read: Reader) -> dict:
    """Reads the sizes of what each layer is told of the token itself; a size of 0 switches it off."""
    width = read.take("hidden_size_per_layer_input", 256, int, least=0)
    if not width:
        read.ignore("vocab_size_per_layer_input")
        return {}
    return {"d_per_layer": width, "per_layer_vocab": read.take("vocab_size_per_layer_input", 262144, int)}


def _experts(read: Reader, sizes: dict, wide: bool) -> dict:
    """Reads the experts beside the MLP. wide: whether some layers' MLP is wider than others'."""
    if not read.take("enable_moe_block", False, bool):
        read.ignore(*EXPERTS)
        return {}
    experts, chosen, width = (read.take(name, 1, int, required=True) for name in EXPERTS)
    if chosen > experts:
        read.problems.append(f"top_k_experts = {chosen} is more than the {experts} experts")
    if wide:
        read.problems.append("use_double_wide_mlp = True is not supported with enable_moe_block = True")
    beside, sizes["d_mlp"] = sizes["d_mlp"], width
    mixture = {"n_experts": experts, "experts_per_token": chosen, "renormalise_experts": True, "d_beside": beside}
    return mixture | ({"dense_layers": (), "d_dense": 0} if wide else {})


READERS = {
    "gemma4_text": partial(_gemma4, family="gemma4_text"),
    "gemma4": partial(_gemma4, family="gemma4"),
    "gemma4_unified": partial(_gemma4, family="gemma4_unified", unified=True),
}

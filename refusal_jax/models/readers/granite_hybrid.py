"""Reads configs of Granite 4, and what is common to families with layers of Mamba-2."""

import math

from refusal_jax.errors import shown
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.hf_attributes import Reader
from refusal_jax.models.mixers.attention import Attention
from refusal_jax.models.mixers.state_space import StateSpace
from refusal_jax.models.readers.llama import granite_switches
from refusal_jax.models.rope import is_number

# What versions of transformers call a layer whose sequence mixer is a state space, and one whose is attention.
LAYER_TYPES = {"mamba": 0, "linear_attention": 0, "attention": 1, "full_attention": 1}


def _granitemoehybrid(read: Reader) -> ModelConfig:
    """Reads Granite 4. Layers without a rope are the rule; "nope" and null mean that."""
    sizes = read.sizes()
    count = sizes["n_layers"]
    mixers = (state_space(read, sizes, sizes["activation"]), Attention())
    read.same("layer_types", "layers_block_type")
    types = read.take("layer_types", read.take("layers_block_type", ["mamba"] * count))
    if not isinstance(types, list) or len(types) != count or not all(str(kind) in LAYER_TYPES for kind in types):
        read.problems.append(
            f"layer_types = {shown(types)}, expected one of {', '.join(map(repr, LAYER_TYPES))} for each of {count} layers"
        )
        types = ["mamba"] * count
    kinds = [LAYER_TYPES[kind] for kind in types]
    used = sorted(set(kinds))
    layers = {"mixers": tuple(mixers[kind] for kind in used), "layer_mixers": tuple(map(used.index, kinds))}
    positions = read.take("position_embedding_type")
    if positions not in (None, "nope", "rope"):
        read.problems.append(f"position_embedding_type = {shown(positions)}, expected 'rope', 'nope' or null")
    read.only("normalization_function", "rmsnorm")  # which published configs say, and transformers does not read
    ropeless = () if positions == "rope" else range(count)
    switches = granite_switches(read) | _channels(read, count) | layers
    return read.config("granitemoehybrid", sizes, rope=read.main_rope(sizes), ropeless=ropeless, **switches)


def _channels(read: Reader, n_layers: int) -> dict:
    """Reads the experts, of which there may be none, and the MLP that every token goes through."""
    experts, used = read.take("num_local_experts", 8, int, least=0), read.take("num_experts_per_tok", 2, int, least=0)
    width = read.take("shared_intermediate_size", 1024, int)
    if not experts:
        return {"dense_layers": tuple(range(n_layers)), "d_dense": width}
    if not 0 < used <= experts:
        read.problems.append(f"num_experts_per_tok = {used}, expected from 1 to the {experts} experts")
    return {"n_experts": experts, "experts_per_token": used, "renormalise_experts": True, "d_shared": width}


def state_space(read: Reader, sizes: dict, activation: str, inner: int | None = None, **more) -> StateSpace:
    """Returns the Mamba-2 layers of a config whose keys for them begin with `mamba_`.

    inner: how wide they are inside, where `mamba_expand` does not say it. more: fields of `StateSpace`.
    """
    read.ignore("mamba_chunk_size")  # which changes no result
    heads, groups = read.take("mamba_n_heads", 128, int), read.take("mamba_n_groups", 1, int)
    expanded = read.take("mamba_expand", 2, int) * sizes["d_model"]
    inner = expanded if inner is None else inner
    auto = read.hf.get("mamba_d_head") in (None, "auto")
    width = read.take("mamba_d_head", None, None if auto else int)
    width = max(inner // heads, 1) if auto or width is None else width
    if width * heads != inner:
        read.problems.append(
            f"mamba_n_heads = {heads} with mamba_d_head = {width} do not make up the {inner} entries inside the layer"
        )
    if heads % groups:
        read.problems.append(f"mamba_n_heads = {heads} is not a multiple of mamba_n_groups = {groups}")
        groups = 1
    bias = read.take("mamba_proj_bias", False, bool)
    return StateSpace(
        heads,
        width,
        read.take("mamba_d_state", 256, int),
        groups,
        read.take("mamba_d_conv", 4, int),
        activation,
        read.take("mamba_conv_bias", True, bool),
        step_limits=step_limits(read),
        **{"in_bias": bias, "out_bias": bias} | more,
    )


def step_limits(read: Reader, name: str = "time_step_limit") -> tuple[float, float]:
    """Returns the limits of time steps."""
    found = read.take(name, [0.0, math.inf])
    low, high = map(_limit, found) if isinstance(found, list | tuple) and len(found) == 2 else (None, None)
    if low is None or high is None or not low <= high or low == math.inf:
        read.problems.append(f"{name} = {shown(found)}, expected two numbers from 0 up, the smaller first")
        return 0.0, math.inf
    return low, high


def _limit(value) -> float | None:
    """Returns a limit, None for what is none; transformers writes infinity as an object."""
    if value in (math.inf, {"__float__": "Infinity"}):
        return math.inf
    return float(value) if is_number(value) or (value == 0 and not isinstance(value, bool)) else None


READERS = {"granitemoehybrid": _granitemoehybrid}

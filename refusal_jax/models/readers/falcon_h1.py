"""Reads Falcon-H1, whose layers run attention and a state space side by side, with a multiplier at every turn."""

from refusal_jax.errors import shown
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.hf_attributes import Reader
from refusal_jax.models.mixers.attention import Attention
from refusal_jax.models.mixers.both import Both
from refusal_jax.models.readers.granite_hybrid import state_space
from refusal_jax.models.rope import is_number


def _multipliers(read: Reader, name: str, count: int) -> tuple[float, ...]:
    """Reads a list of so many multipliers, all 1 by default."""
    found = read.take(name, [1.0] * count)
    if not isinstance(found, list) or len(found) != count or not all(map(is_number, found)):
        read.problems.append(f"{name} = {shown(found)}, expected {count} positive numbers")
        return (1.0,) * count
    return tuple(map(float, found))


def _falcon_h1(read: Reader) -> ModelConfig:
    sizes = read.sizes({"n_kv_heads": 8, "context_length": 8192, "norm_eps": 1e-5})
    bias = read.take("attention_bias", False, bool)
    read.only("mamba_use_mlp", True)  # which published configs say, and transformers does not read
    read.ignore("layer_types", "layers_block_type")  # of which there is one
    first, normed = read.take("mamba_norm_before_gate", True, bool), read.take("mamba_rms_norm", False, bool)
    space = state_space(
        read,
        sizes,
        sizes["activation"],
        read.take_optional("mamba_d_ssm", 1024, int),
        out_bias=read.take("projectors_bias", False, bool),
        norm=("before" if first else "gated") if normed else "",
        in_scale=read.take("ssm_in_multiplier", 1.0, float),
        part_scales=_multipliers(read, "ssm_multipliers", 5),
        out_scale=read.take("ssm_out_multiplier", 1.0, float),
    )
    ends = read.take("attention_in_multiplier", 1.0, float), read.take("attention_out_multiplier", 1.0, float)
    return read.config(
        "falcon_h1",
        sizes,
        mixers=(Both(Attention(), space, *ends),),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=read.take("mlp_bias", False, bool),
        query_scale=sizes["head_dim"] ** -0.5 * read.take("key_multiplier", 1.0, float),
        mlp_scales=_multipliers(read, "mlp_multipliers", 2),
        embed_scale=read.take("embedding_multiplier", 1.0, float),
        logit_divisor=1 / read.take("lm_head_multiplier", 1.0, float),
    )


READERS = {"falcon_h1": _falcon_h1}

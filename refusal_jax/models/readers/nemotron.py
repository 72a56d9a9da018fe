"""Reads Nemotron-H, each of whose layers is one of a state space, attention, an MLP and a mixture of experts."""

import math

from refusal_jax.errors import shown
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.hf_attributes import Reader
from refusal_jax.models.mixers.attention import Attention
from refusal_jax.models.mixers.state_space import StateSpace
from refusal_jax.models.readers.mixtures import experts, groups

SPACE, ATTENTION, MLP, EXPERTS = "linear_attention", "full_attention", "mlp", "moe"
# What layers are called: in a list as transformers writes it, in lists of before, and by the letters of a pattern.
NAMES = {kind: kind for kind in (SPACE, ATTENTION, MLP, EXPERTS)} | {"mamba": SPACE, "attention": ATTENTION}
LETTERS = {"M": SPACE, "*": ATTENTION, "-": MLP, "E": EXPERTS}
# Keys that no computation depends on: training, kernels, layers that guess tokens ahead, and ropes, which there are none of.
IGNORED = """
    num_hidden_layers attention_bias sliding_window use_mamba_kernels expand mamba_expand chunk_size mamba_chunk_size
    time_step_max mamba_dt_max time_step_floor mamba_dt_init_floor time_step_rank mamba_proj_bias mamba_ssm_cache_dtype
    n_shared_experts moe_shared_expert_overlap num_nextn_predict_layers mtp_layers_block_type mtp_hybrid_override_pattern
    residual_in_fp32 rescale_prenorm_residual rope_theta rope_scaling rope_parameters partial_rotary_factor
    norm_eps rms_norm_eps time_step_limit mamba_dt_limit
""".split()


def _layers(read: Reader) -> list[str]:
    """Reads the kind of each layer, from a list or a pattern of letters; if there are both, they must agree."""
    listed, pattern = read.take("layers_block_type", read.take("layer_types")), read.take("hybrid_override_pattern")
    found = []
    for name, kinds, value, form in (
        ("layers_block_type", NAMES, listed, list),
        ("hybrid_override_pattern", LETTERS, pattern, str),
    ):
        if value is None:
            continue
        if not isinstance(value, form) or not value or not all(isinstance(one, str) and one in kinds for one in value):
            read.problems.append(f"{name} = {shown(value)}, expected one of {', '.join(kinds)} for each layer")
        else:
            found.append([kinds[one] for one in value])
    if len(found) == 2 and found[0] != found[1]:
        read.problems.append(
            f"layers_block_type = {shown(listed)} and hybrid_override_pattern = {shown(pattern)} disagree"
        )
    return found[0] if found else [SPACE, EXPERTS, ATTENTION, MLP]


def _state_space(read: Reader) -> StateSpace:
    """Reads the state space's sizes and switches, some of which had other names before.

    Its time steps are at least `time_step_min`, as transformers computes prompts. Other implementations, such as the code beside
    the published checkpoints, have `time_step_limit` in its place.
    """
    heads = read.take("mamba_num_heads", 128, int)
    groups = read.take("mamba_n_groups", read.take("n_groups", 8, int), int)
    if heads % groups:
        read.problems.append(f"mamba_num_heads = {heads} is not a multiple of n_groups = {groups}")
        groups = 1
    bias = read.take("use_bias", False, bool)
    return StateSpace(
        heads=heads,
        head_dim=read.take("mamba_head_dim", 64, int),
        state=read.take("ssm_state_size", 128, int),
        groups=groups,
        width=read.take("mamba_d_conv", read.take("conv_kernel", 4, int), int),
        activation=read.activation("mamba_hidden_act", "silu"),
        conv_bias=read.take("mamba_conv_bias", read.take("use_conv_bias", True, bool), bool),
        in_bias=bias,
        out_bias=bias,
        step_limits=(read.take("mamba_dt_min", read.take("time_step_min", 1e-3, float), float), math.inf),
    )


def _nemotron_h(read: Reader) -> ModelConfig:
    kinds = _layers(read)
    read.same("layer_norm_epsilon", "norm_eps", "rms_norm_eps")  # versions read one or the other
    read.ignore(*IGNORED)
    read.only("tie_word_embeddings", False)
    width = read.take("attention_head_dim", 128, int)  # as old configs call it
    sizes = read.sizes(
        {
            "n_layers": len(kinds),
            "n_kv_heads": 8,
            "head_dim": width,
            "context_length": 4096,
            "norm_eps": 1e-5,
            "activation": "relu2",
            "d_mlp": 21504,
        },
        n_layers=None,
        activation="mlp_hidden_act",
        norm_eps="layer_norm_epsilon",
        tied_embeddings=None,
    )
    kinds = kinds[: sizes["n_layers"]]

    def having(*wanted: str) -> tuple[int, ...]:
        return tuple(layer for layer, kind in enumerate(kinds) if kind in wanted)

    of_kind = {SPACE: _state_space(read), ATTENTION: Attention()}
    mixer_l = [of_kind.get(kind) for kind in kinds]
    mixers = tuple(dict.fromkeys(mixer_l))
    return read.config(
        "nemotron_h",
        sizes | ({"d_mlp": read.take("moe_intermediate_size", 7688, int)} if EXPERTS in kinds else {}),
        rope=read.rope({}, sizes["context_length"], theta=1e4, head_dim=sizes["head_dim"]),
        ropeless=range(len(kinds)),
        mixers=mixers,
        layer_mixers=tuple(map(mixers.index, mixer_l)),
        without_mlp=having(SPACE, ATTENTION),
        gated_mlp=False,
        mlp_bias=read.take("mlp_bias", False, bool),
        dense_layers=having(MLP),
        d_dense=sizes["d_mlp"] if MLP in kinds else 0,
        **_experts(read, EXPERTS in kinds),
    )


def _experts(read: Reader, there_are: bool) -> dict:
    """Reads the mixtures, which have the router of DeepSeek V3. What all tokens go through has a width of its own."""
    switches = experts(read, 8, 2, read.take("norm_topk_prob", True, bool), "n_routed_experts")
    switches |= {
        "router_scores": "sigmoid",
        "router_correction": True,
        "routed_scale": read.take("routed_scaling_factor", 1.0, float),
        "d_expert_io": read.take("moe_latent_size", None, int) or 0,
        "d_shared": read.take("moe_shared_expert_intermediate_size", 7688, int),
        **groups(read, switches, 1, 1),
    }
    return switches if there_are else {}


READERS = {"nemotron_h": _nemotron_h}

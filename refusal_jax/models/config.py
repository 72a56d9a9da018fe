"""The description of an architecture that the decoder needs."""

import dataclasses
from typing import Any

from refusal_jax.models.rope import Rope


@dataclasses.dataclass(frozen=True)
class AttentionKind:
    """How layers of one kind attend: their rotary embedding (`Rope.off` for none), and the number of tokens that a query sees
    (None: all).

    chunk: the length of the stretches of the text, counted from its first token, that a query does not see out of. unit_eps: what
    is added to the mean square of queries and keys that are divided by its root once they are rotated; None: they are not.
    """

    rope: Rope
    window: int | None = None
    chunk: int | None = None
    unit_eps: float | None = None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of a decoder, then its switches. The names are this project's; `readers/` says which HF attribute each comes
    from."""

    family: str
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_mlp: int  # of each expert, if there are experts
    context_length: int
    kinds: tuple[AttentionKind, ...]
    layer_kinds: tuple[int, ...]  # of each layer, an index into `kinds`
    activation: str
    norm_eps: float
    tied_embeddings: bool
    norm_offset: float = 0.0  # norms multiply by offset + weight
    centred_norms: bool = False  # norms take the mean away first, as LayerNorm does (not in families with post-norms)
    pre_norm: bool = True  # norms before attention and MLP
    post_norm: bool = False  # norms after them, before their output is added to the residual
    parallel: bool = False  # attention and MLP read the same normed input, and have one norm
    qk_norm: str = (
        ""  # "head": each head's queries and keys are normed; "each": with weights of its own; "all": all together
    )
    norm_after_rope: bool = False  # queries and keys are normed once they are rotated
    gate_slope: float = 1.0  # a, where an MLP's gate is activation(a * gate) / a
    gated_limit: float | None = None  # an MLP's gate is at most this, its other branch from - this to this
    up_offset: float = 0.0  # is added to the other branch
    value_norm: bool = False  # each head's values are divided by their root mean square
    gated_mlp: bool = True  # MLPs have a gate; else the activation is that of their only branch, "up"
    mlp_scales: tuple[float, float] = (1.0, 1.0)  # multiply an MLP's gate, and what MLPs add to the residual
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    sinks: bool = False  # each head has a score without a key that takes part in its softmax
    qkv_clip: float | None = None  # queries, keys and values are clipped to +- this
    query_scale: float = 1.0  # multiplies q . k
    attention_softcap: float | None = None  # scores become cap * tanh(score / cap)
    logit_softcap: float | None = None
    embed_scale: float = 1.0
    residual_scale: float = 1.0  # multiplies what attention and MLP add to the residual
    logit_divisor: float = 1.0
    n_experts: int = 0  # 0: one dense MLP
    experts_per_token: int = 0
    router_bias: bool = False
    router_scores: str = "softmax"  # or "sigmoid": what the router makes of its logits
    router_correction: bool = False  # each expert has a constant that is added to its score for the choice only
    expert_groups: int = 1  # the experts are in so many groups,
    groups_per_token: int = 1  # of which a token chooses so many first,
    group_best: int = 2  # each group counting as much as so many of its best experts
    renormalise_experts: bool = False  # the chosen experts' router weights are made to sum to 1
    router_floor: float = 1e-20  # is added to the sum that they are divided by then
    routed_scale: float = 1.0  # multiplies them after that
    weighted_inputs: bool = False  # they multiply what the experts read, not what these write
    expert_bias: bool = False  # experts have biases
    d_expert_io: int = 0  # the width of what experts read and write, to and from which matrices lead; 0: the residual's
    d_shared: int = 0  # width of an MLP that every token goes through beside its experts; 0: none
    shared_gate: bool = False  # a sigmoid, one number for each token, multiplies that MLP's output
    d_beside: int = (
        0  # width of an MLP beside the experts, each of the two with norms of its own; the router scales; 0: none
    )
    dense_layers: tuple[int, ...] = ()  # layers whose channel mixer is an MLP of another width
    d_dense: int = 0  # its width
    d_per_layer: int = 0  # width of what each layer is told of every token itself; 0: nothing
    per_layer_vocab: int = 0  # tokens that have something to tell
    layer_scale: bool = False  # each layer multiplies the residual by a number when it is done
    mixers: tuple[Any, ...] = ()  # kinds of sequence mixers (`mixers.mixer.Mixer`, None for none); (): attention alone
    layer_mixers: tuple[int, ...] = ()  # of each layer, an index into them; (): all have the first
    without_mlp: tuple[int, ...] = ()  # layers that have a sequence mixer only
    draft_layers: int = 0  # layers after the last that a checkpoint may hold; they guess tokens ahead and are not run

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Returns the layers that have experts."""
        other = (*self.dense_layers, *self.without_mlp)
        return tuple(l for l in range(self.n_layers) if l not in other) if self.n_experts else ()

    @property
    def expert_prefix(self) -> str:
        """Returns what the names of the experts' weights begin with, where an MLP stands beside them or a matrix behind them: its
        names are the common ones, and tell what writes to the residual from what does not."""
        return "expert_" if self.d_beside else "inner_" if self.d_expert_io else ""

    @property
    def queries_per_kv(self) -> int:
        return self.n_heads // self.n_kv_heads

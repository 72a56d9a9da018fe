"""The arithmetic of a block outside attention: projections, norms, the MLP, and routing to experts."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float, Int

from refusal_jax.axes import Array, Leaf
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.sharding import STORAGE, residual_axes

ACTIVATE = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A matrix with low-rank factors beside it, which stands for `weight_oi + left_or @ right_ri`.

    The weight has the model's dtype, the factors are float32; each may have leading axes.
    """

    weight_oi: Leaf
    left_or: Leaf
    right_ri: Leaf

    def merged(self) -> jax.Array:
        """Returns the sum as one matrix, float32 inside, in the weight's dtype outside."""
        low_oi = jnp.einsum("...or,...ri->...oi", self.left_or, self.right_ri, precision="highest")
        return (self.weight_oi.astype(jnp.float32) + low_oi).astype(self.weight_oi.dtype)


def linear(x, w_oi, bias=None):
    """Returns `x @ w.T (+ bias)` in x's dtype; float32 inputs are multiplied in float32 (TPUs would use bfloat16).

    w_oi: a matrix, or one that is `Adapted`, whose factors are multiplied one after the other in float32.
    """
    if isinstance(w_oi, Adapted):
        low = linear(linear(x.astype(jnp.float32), w_oi.right_ri), w_oi.left_or)
        return (linear(x, w_oi.weight_oi, bias).astype(jnp.float32) + low).astype(x.dtype)
    y = jnp.einsum("...i,oi->...o", x, w_oi, precision="highest" if x.dtype == jnp.float32 else None)
    return y if bias is None else y + bias


def _scatter(mesh, batch: int, length: int, features: tuple[str, ...]):
    """Returns, for sums `[batch, length, …]` over `features`, the mesh axes of the batch, the placement of the scattered sums,
    and the axis along which to scatter them, which is None if they cannot be."""
    rows, tokens = residual_axes(mesh, batch, length)
    whole = rows if tokens else tuple(name for name in rows if name not in features)
    axis = 1 if tokens and tokens == features else 0 if features and rows == (*whole, *features) else None
    return whole, PartitionSpec(whole) if axis is None else PartitionSpec(rows, tokens or None), axis


def _names(entry) -> tuple[str, ...]:
    """Returns the mesh axes of one axis of a PartitionSpec, which abbreviates one to its name and none to None."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _gathered(mesh, w, spec):
    """Returns a weight in a shard_map, whole along the axes on which only its storage is divided."""
    for axis, name in enumerate(spec):
        if name == STORAGE and mesh.shape[STORAGE] > 1:
            w = jax.lax.all_gather(w, name, axis=axis, tiled=True)
    return w


def lookup(
    mesh: Mesh | None, spec: PartitionSpec, table_vd: Float[jax.Array, "V D"], tokens_bt: Int[Array, "B T"]
) -> Float[jax.Array, "B T D"]:
    """Returns the rows of `table_vd` that tokens name, placed as a residual stream.

    spec: of the table. On a mesh every chip looks up what it has, and the results are summed and exchanged: GSPMD would gather
    the table.
    """
    if mesh is None:
        return jnp.take(table_vd, tokens_bt, axis=0)
    vocab, storage = _names(spec[0]), spec[1] is not None and mesh.shape[STORAGE] > 1
    batch, place, axis = _scatter(mesh, tokens_bt.shape[0], tokens_bt.shape[1], vocab)
    apart = storage and STORAGE in batch  # rows and columns are divided by the same axis

    def part(table_vd, tokens_bt):
        if apart:
            tokens_bt = jax.lax.all_gather(tokens_bt, STORAGE, axis=0, tiled=True)
        here = tokens_bt - (jax.lax.axis_index(vocab) * len(table_vd) if vocab else 0)
        known = (here >= 0) & (here < len(table_vd))
        x = jnp.where(known[..., None], jnp.take(table_vd, here, axis=0, mode="clip"), 0)
        if apart:
            x = jax.lax.all_to_all(x, STORAGE, split_axis=0, concat_axis=2, tiled=True)
        elif storage:
            x = jax.lax.all_gather(x, STORAGE, axis=2, tiled=True)
        if axis is None:
            return jax.lax.psum(x, vocab) if vocab else x
        return jax.lax.psum_scatter(x, vocab, scatter_dimension=axis, tiled=True)

    run = jax.shard_map(part, mesh=mesh, in_specs=(spec, PartitionSpec(batch)), out_specs=place, check_vma=False)
    return run(table_vd, tokens_bt)


def row_parallel(
    mesh: Mesh | None,
    spec: PartitionSpec,
    x_btf: Float[jax.Array, "B T F"],
    w_df: Float[jax.Array, "D F"] | Adapted,
    bias=None,
) -> Float[jax.Array, "B T D"]:
    """Returns `linear` of features that are divided over the chips: each chip multiplies its own and keeps its part of the sums.

    spec: of `w_df` on the mesh. Written out, because GSPMD would sum all rows on all chips first, twice the traffic. Where the
    sums cannot be divided, it does.
    """
    features, batch, place, axis = _names(spec[1]) if mesh else (), (), None, None
    if mesh and math.prod(mesh.shape[name] for name in features) > 1:
        batch, place, axis = _scatter(mesh, x_btf.shape[0], x_btf.shape[1], features)
    if mesh is None or axis is None:
        return linear(x_btf, w_df, bias)

    # The factors of an adapted matrix are divided as its rows and its columns are.
    divided: tuple[Any, ...] = spec, PartitionSpec(spec[0], None), PartitionSpec(None, spec[1])
    parts = Adapted(*divided) if isinstance(w_df, Adapted) else spec

    def part(x_btf, w_df):
        whole = jax.tree.map(partial(_gathered, mesh), w_df, parts)
        return jax.lax.psum_scatter(linear(x_btf, whole), features, scatter_dimension=axis, tiled=True)

    specs = PartitionSpec(batch, None, features), parts
    y = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=place, check_vma=False)(x_btf, w_df)
    return y if bias is None else y + bias


def normed(
    cfg: ModelConfig,
    x: Float[jax.Array, "... D"],
    scale: Float[jax.Array, "... D"],
    part: Float[jax.Array, "... D"] | None = None,
) -> Float[jax.Array, "... D"]:
    """Returns the RMS norm of the last axis, less its mean where norms are centred, times `norm_offset + scale`; float32 inside,
    the dtype of x outside.

    part: of `x`; its share of the norm is returned in place of the whole, in its own dtype. Shares of parts that sum to `x` sum
    to its norm, since each is divided by the root mean square of the whole.
    """

    def centred(x):
        x32 = x.astype(jnp.float32)
        return x32 - jnp.mean(x32, axis=-1, keepdims=True) if cfg.centred_norms else x32

    x32 = centred(x)
    root = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + cfg.norm_eps)
    own = x32 if part is None else centred(part)
    return ((cfg.norm_offset + scale.astype(jnp.float32)) * (own * root)).astype(
        x.dtype if part is None else part.dtype
    )


def divided_by_root(cfg: ModelConfig, x: Float[jax.Array, "... D"]) -> Float[jax.Array, "... D"]:
    """Returns the RMS norm of the last axis without weights; float32 inside, the dtype of x outside."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + cfg.norm_eps)).astype(x.dtype)


def gated(
    cfg: ModelConfig, gate: Float[jax.Array, "... F"], up: Float[jax.Array, "... F"]
) -> Float[jax.Array, "... F"]:
    """Returns the product of an MLP's two branches: activation(gate) * up, both clamped where the architecture says so."""
    if cfg.gated_limit is not None:
        gate, up = jnp.minimum(gate, cfg.gated_limit), jnp.clip(up, -cfg.gated_limit, cfg.gated_limit)
    steep = cfg.gate_slope != 1
    gate = ACTIVATE[cfg.activation](cfg.gate_slope * gate) / cfg.gate_slope if steep else ACTIVATE[cfg.activation](gate)
    return gate * (up + cfg.up_offset if cfg.up_offset else up)


def hidden(cfg: ModelConfig, branch) -> Float[jax.Array, "*B F"]:
    """Returns what an MLP multiplies with "down". branch(name): its input through "gate" or "up", with any bias."""
    if not cfg.gated_mlp:
        return ACTIVATE[cfg.activation](branch("up"))
    gate = branch("gate")
    scale = cfg.mlp_scales[0]
    return gated(cfg, gate if scale == 1 else gate * jnp.asarray(scale, gate.dtype), branch("up"))


def mlp(cfg: ModelConfig, w, h_btd: Float[jax.Array, "*B D"], out, kind: str = "") -> Float[jax.Array, "*B D"]:
    """Returns an MLP; `w(name)` gives a weight of the block, `out` multiplies with "down". kind: what the names begin with."""
    hidden_btf = hidden(cfg, lambda name: linear(h_btd, w(f"{kind}{name}"), w(f"{kind}{name}_bias")))
    y, scale = out(f"{kind}down", hidden_btf), cfg.mlp_scales[1]
    return y if scale == 1 else y * jnp.asarray(scale, y.dtype)


def route(cfg: ModelConfig, w, h_td: Float[Array, "T D"]) -> tuple[Int[jax.Array, "T n"], Float[jax.Array, "T n"]]:
    """Returns the n experts of each token and their weights; float32, as small differences change the choice.

    w(name): a weight of the block.
    """
    h_td = jnp.asarray(h_td, jnp.float32)
    if cfg.d_beside:
        h_td = divided_by_root(cfg, h_td) * (w("router_scale").astype(jnp.float32) * cfg.d_model**-0.5)
    logits = linear(h_td, w("router").astype(jnp.float32))
    if cfg.router_bias:
        logits = logits + w("router_bias").astype(jnp.float32)
    score = {"softmax": partial(jax.nn.softmax, axis=-1), "sigmoid": jax.nn.sigmoid}[cfg.router_scores]
    scores_te = choice_te = score(logits)
    if cfg.router_correction:
        choice_te = choice_te + w("router_correction").astype(jnp.float32)
    if cfg.expert_groups > 1:
        groups_tge = choice_te.reshape(len(h_td), cfg.expert_groups, -1)
        best_tg = jnp.sum(jax.lax.top_k(groups_tge, cfg.group_best)[0], axis=-1)
        open_tg = jnp.any(
            jax.nn.one_hot(jax.lax.top_k(best_tg, cfg.groups_per_token)[1], cfg.expert_groups, dtype=bool), 1
        )
        choice_te = jnp.where(open_tg[..., None], groups_tge, -jnp.inf).reshape(choice_te.shape)
    chosen_tn = jax.lax.top_k(choice_te, cfg.experts_per_token)[1]
    weights_tn = jnp.take_along_axis(scores_te, chosen_tn, axis=-1)
    if cfg.renormalise_experts:  # sigmoids may all be zero
        weights_tn = weights_tn / (jnp.sum(weights_tn, axis=-1, keepdims=True) + cfg.router_floor)
    if cfg.d_beside:
        weights_tn = weights_tn * w("expert_scale").astype(jnp.float32)[chosen_tn]
    return chosen_tn, weights_tn * cfg.routed_scale


def mixture(
    cfg: ModelConfig, w, stack, place, h_td: Float[jax.Array, "T D"], once=lambda y_td, name: y_td
) -> Float[jax.Array, "T D"]:
    """Returns what experts, and what every token goes through beside them, make of T tokens; of their residual, where the experts
    have a norm of their own (`ModelConfig.d_beside`).

    w(name): a weight of the block. stack, place: as in `experts`. once: what becomes of each addend before they are summed;
    name: the weight that says how it is divided, a bias or the last matrix with features.
    """
    chosen_tn, weights_tn = route(cfg, w, h_td)
    inner_td = normed(cfg, h_td, w("expert_norm")) if cfg.d_beside else h_td
    if cfg.d_expert_io:
        inner_td = linear(inner_td, w("experts_in"), w("experts_in_bias"))
    down = f"{cfg.expert_prefix}down"
    y_td = once(experts(cfg, stack, place, inner_td, chosen_tn, weights_tn), down)
    if cfg.expert_bias:  # what the experts add whatever they read, by their weights
        bias_ed = stack(f"{down}_bias")[place].astype(jnp.float32)
        chosen_tne = jax.nn.one_hot(chosen_tn, cfg.n_experts)
        share_te = jnp.einsum("tn,tne->te", weights_tn, chosen_tne, precision="highest")
        added_td = jnp.einsum("te,ed->td", share_te, bias_ed, precision="highest")
        y_td = y_td + once(added_td.astype(y_td.dtype), f"{down}_bias")
    if cfg.d_expert_io:
        y_td = linear(y_td, w("experts_out"))
    if cfg.d_expert_io and cfg.mlp_bias:
        y_td = y_td + once(w("experts_out_bias"), "experts_out_bias")
    if not cfg.d_shared:
        return y_td

    def beside(name: str, x):
        y = once(linear(x, w(name)), name)
        return y + once(w(f"{name}_bias"), f"{name}_bias") if cfg.mlp_bias else y

    shared_td = mlp(cfg, w, h_td, beside, "shared_")
    if cfg.shared_gate:
        gate_t1 = jax.nn.sigmoid(linear(h_td.astype(jnp.float32), w("shared_router").astype(jnp.float32)))
        shared_td = (gate_t1 * shared_td).astype(h_td.dtype)
    return y_td + shared_td


def sharded_mixture(mesh, specs, cfg: ModelConfig, weights, stacks, place, h_btd) -> jax.Array:
    """Runs `mixture` on a mesh: each part of the batch is routed where it is, and each chip computes its features of all
    experts.

    specs: of each of `weights`, the block's own, and of `stacks`, the experts' own in all layers. Returns `[B, T, D]`, placed
    as rows.
    """

    def part(weights, stacks, place, h_btd):
        if mesh.shape[STORAGE] > 1:  # gather one layer's experts, outside a loop that chips leave at odds
            here = {name: jax.lax.dynamic_index_in_dim(w, place, keepdims=True) for name, w in stacks.items()}
            stacks, place = {name: _gathered(mesh, w, specs[name]) for name, w in here.items()}, 0
        weights = {name: _gathered(mesh, w, specs[name]) for name, w in weights.items()}
        y = mixture(cfg, weights.get, stacks.get, place, h_btd.reshape(-1, h_btd.shape[-1]), once).reshape(h_btd.shape)
        if axis is None:
            return jax.lax.psum(y, features)
        return jax.lax.psum_scatter(y, features, scatter_dimension=axis, tiled=True)

    def once(y_td, name):
        """Returns what is to be summed over all of `features`, along some of which the weight may not be divided."""
        alike = tuple(n for n in features if n not in _names(specs[name][-1]))
        return jnp.where(jax.lax.axis_index(alike) == 0, y_td, 0) if alike else y_td

    writers = f"{cfg.expert_prefix}down", "shared_down"
    features = max((_names(specs[name][-1]) for name in writers if name in specs), key=len)
    batch, placed, axis = _scatter(mesh, h_btd.shape[0], h_btd.shape[1], features)
    inputs = (
        *({name: specs[name] for name in group} for group in (weights, stacks)),
        PartitionSpec(),
        PartitionSpec(batch),
    )
    run = jax.shard_map(part, mesh=mesh, in_specs=inputs, out_specs=placed, check_vma=False)
    return run(weights, stacks, jnp.asarray(place), h_btd)


def block_rows(pairs: int, n: int) -> int:
    """Returns the rows of a block for so many (token, expert) pairs and n experts: about an expert's share, in tiles."""
    return min(256, max(8, 1 << (pairs // n).bit_length()))


def experts(
    cfg: ModelConfig,
    stack,
    place,
    h_td: Float[Array, "T D"],
    chosen_tn: Int[Array, "T n"],
    weights_tn: Float[Array, "T n"],
) -> Float[jax.Array, "T D"]:
    """Returns a mixture of experts over T tokens, each of which is computed by its chosen experts only, without the biases of
    "down".

    stack(name): "gate", "up" or "down", after `cfg.expert_prefix`, of all layers that have experts, `[L, E, out, in]`, or a bias,
    `[L, E, out]`, None where there is none; place: int32 scalar, the layer wanted. chosen_tn, weights_tn: of each token, as
    `route` gives them.

    The (token, expert) pairs are sorted by expert and laid out in blocks of M rows, each of one expert, which a loop over
    the blocks in use multiplies. `jax.lax.ragged_dot` would say the same in one line, but compiles to a product of every
    token with every expert, on CPU and on TPU v5e alike (jax 0.10: 64 times the work for 64 experts).
    """
    pairs, n = chosen_tn.size, cfg.n_experts
    m = block_rows(pairs, n)
    expert_p = chosen_tn.reshape(-1)
    order_p = jnp.argsort(expert_p, stable=True)
    sizes_e = jnp.bincount(expert_p, length=n)
    ends_e = jnp.cumsum((sizes_e + m - 1) // m)  # in blocks
    starts_e = ends_e - (sizes_e + m - 1) // m
    sorted_p = expert_p[order_p]
    row_p = m * starts_e[sorted_p] + jnp.arange(pairs) - (jnp.cumsum(sizes_e) - sizes_e)[sorted_p]
    blocks = pairs // m + min(n, pairs)  # never fewer than are in use
    token_s = jnp.zeros(blocks * m, jnp.int32).at[row_p].set((order_p // cfg.experts_per_token).astype(jnp.int32))
    x_sd = h_td[token_s]
    if cfg.weighted_inputs:
        weight_s = jnp.zeros(blocks * m, jnp.float32).at[row_p].set(weights_tn.reshape(-1)[order_p])
        x_sd = (x_sd * weight_s[:, None]).astype(h_td.dtype)
    x_smd = x_sd.reshape(blocks, m, -1)
    owner_s = jnp.searchsorted(ends_e, jnp.arange(blocks), side="right")

    def block(index, rows_smd):
        def own(name: str):
            found = stack(f"{cfg.expert_prefix}{name}")
            return None if found is None else found[place, owner_s[index]]

        x = jax.lax.dynamic_index_in_dim(rows_smd, index, keepdims=False)
        y = linear(hidden(cfg, lambda name: linear(x, own(name), own(f"{name}_bias"))), own("down"))
        return jax.lax.dynamic_update_index_in_dim(rows_smd, y, index, 0)

    with jax.named_scope(
        "experts"
    ):  # `plan` counts its turns; what comes out of a block takes the place of what went in
        out_smd = jax.lax.fori_loop(0, ends_e[-1], block, x_smd)
    row_p = jnp.zeros(pairs, row_p.dtype).at[order_p].set(row_p)  # back to the order of the tokens
    out_tnd = out_smd.reshape(blocks * m, -1)[row_p].reshape(*chosen_tn.shape, -1)
    if cfg.weighted_inputs:
        return jnp.sum(out_tnd.astype(jnp.float32), axis=1).astype(h_td.dtype)
    return jnp.einsum("tnd,tn->td", out_tnd.astype(jnp.float32), weights_tn, precision="highest").astype(h_td.dtype)

"""Direct attribution: which heads and MLPs write the last token's component along a direction.

The residual stream is a sum: the embedding, and what each attention head, each bias of an output projection and each MLP adds to
it. So its product with a unit direction is the sum of theirs (paper, section 5.1), to rounding, which `attribute` checks on every
prompt. Where a norm follows a branch, heads are attributed through it with its scale as it is; so the sum is still exact. Where
layers multiply the residual when they are done, each part counts as what the layers after it make of it.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from refusal_jax.axes import Array
from refusal_jax.chat.batches import length_batches
from refusal_jax.chat.messages import Prompt
from refusal_jax.chat.model import ChatModel
from refusal_jax.edits import EPS, Edits
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.finite import check_finite
from refusal_jax.models.sharding import batch_sharding, put, replicate
from refusal_jax.progress import each
from refusal_jax.taps import Taps

SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "result_along", "o_bias_along")
ROUNDINGS = 4.0  # spreads of the rounding errors that a sum may be off by
SUMMING = 1e-5  # relative error of sums in float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Attribution:
    """Parts of the last token's residual along a unit direction, of n prompts, float32.

    embed: of the embedding, `[n]`; heads: of each head, `[n, L, N]`; bias: of the output projection's bias, `[n, L]`, 0 without
    one, and of a layer without heads all that it adds; mlp: of each MLP, `[n, L]`. along, norm: the residual's product with the
    direction, and its norm, at the input of each block and after the last, `[n, L + 1]`.
    """

    embed: Float[Array, " n"]
    heads: Float[Array, "n L N"]
    bias: Float[Array, "n L"]
    mlp: Float[Array, "n L"]
    along: Float[Array, "n _"]
    norm: Float[Array, "n _"]

    @property
    def cosines(self) -> Float[np.ndarray, "n _"]:
        """Returns the cosine of the residual with the direction, at the input of each block and after the last, float64."""
        return np.asarray(self.along, np.float64) / (np.asarray(self.norm, np.float64) + EPS)

    @property
    def off(self) -> Float[np.ndarray, " n"]:
        """Returns the sum of all parts minus the last residual's product with the direction, float64."""
        parts = np.asarray(self.embed, np.float64)
        for part in (self.heads, self.bias, self.mlp):
            parts = parts + np.asarray(part, np.float64).reshape(len(parts), -1).sum(axis=1)
        return parts - np.asarray(self.along, np.float64)[:, -1]

    def take(self, index: Sequence[int] | Int[np.ndarray, " _"]) -> "Attribution":
        """Returns the attribution of some of the prompts."""
        return jax.tree.map(lambda a: np.asarray(a)[np.asarray(index, int)], self)


@jax.jit
def attribute_batch(
    decoder: Decoder, tokens_bt: Int[Array, "B T"], mask_bt: Bool[Array, "B T"], edits: Edits, taps: Taps
) -> tuple[Attribution, Float[Array, " B"], Bool[Array, " B"]]:
    """Returns the attribution of B prompts, the spread of what rounding to the model's dtype does to the sum of their parts in
    units of its epsilon `[B]`, and whether their values are finite `[B]`.

    taps: of `SITES` at the last token, along the unit direction, as from `Taps.for_batch`.
    """
    assert taps.along is not None
    out = decoder.forward(tokens_bt, mask_bt, edits, taps)
    found, spread_b = parts_of(
        {site: values[:, :, 0] for site, values in out.taps.items()},
        out.resid_btd[:, -1],
        taps.along,
        scales_after(decoder),
    )
    finite_b = (
        jnp.isfinite(found.heads).all(axis=(1, 2)) & jnp.isfinite(found.norm).all(axis=1) & jnp.isfinite(spread_b)
    )
    return replicate(decoder.mesh, (found, spread_b, finite_b))


def scales_after(decoder: Decoder) -> Float[jax.Array, " L"]:
    """Returns what the layers from each one on, itself included, multiply the residual by in all, float32."""
    scale_l1 = decoder.blocks.weight("layer_scale")
    if scale_l1 is None:
        return jnp.ones(decoder.cfg.n_layers)
    return jnp.cumprod(scale_l1[::-1, 0].astype(jnp.float32))[::-1]


def parts_of(
    tapped: Mapping[str, Array],
    last_bd: Float[Array, "B D"],
    unit_bd: Float[Array, "B D"],
    scale_l: Float[Array, " L"],
) -> tuple[Attribution, Float[Array, " B"]]:
    """Returns the attribution of one token of B prompts and the spread of its rounding, from what was tapped there.

    tapped: by site, `[L, B, …]`. last_bd: the residual after the last block. unit_bd: the unit direction, for each prompt.
    scale_l: as from `scales_after`.
    """

    def along(x_lbd):
        return jnp.einsum("lbd,bd->bl", x_lbd, unit_bd, precision="highest")

    tapped = {site: jnp.asarray(values, jnp.float32) for site, values in tapped.items()}
    resid_lbd = jnp.concatenate([tapped["resid_pre"], jnp.asarray(last_bd, jnp.float32)[None]])
    rounded = [resid_lbd, *(tapped[site] for site in ("attn_out", "resid_mid", "mlp_out"))]
    along_bl = along(resid_lbd)
    found = Attribution(
        embed=along_bl[:, 0] * scale_l[0],
        heads=tapped["result_along"].swapaxes(0, 1) * scale_l[:, None],
        bias=tapped["o_bias_along"].T * scale_l,
        mlp=along(tapped["mlp_out"]) * scale_l,
        along=along_bl,
        norm=jnp.linalg.norm(resid_lbd, axis=-1).T,
    )
    return found, jnp.sqrt(sum(jnp.sum(jnp.square(x_lbd * unit_bd), axis=(0, 2)) for x_lbd in rounded))


def attribute(
    model: ChatModel, prompts: Sequence[Prompt], direction_d: Float[np.ndarray, " D"], batch_size: int, title: str
) -> Attribution:
    """Returns the attribution of prompts along a direction, of any norm, in their order.

    title: of the progress bar. Raises UserError for values that are not finite, and ArithmeticError if the parts of a prompt do
    not sum to its residual's product with the direction, within what the model's dtype rounds.
    """
    unit_d = np.asarray(direction_d, np.float64) / np.linalg.norm(direction_d)
    taps = Taps(SITES, 1, unit_d).for_batch(batch_size, model.config.d_model)
    taps = put(taps, batch_sharding(model.mesh, batch_size))
    found, order, spread = [], [], []
    for index, batch in each(list(length_batches(model, prompts, batch_size)), title, "batch"):
        out = attribute_batch(model.decoder, *model.put(batch.tokens, batch.mask), taps)
        part, spread_b, finite_b = jax.device_get(
            out
        )  # of the last batch, the rows beyond the prompts repeat the last one
        check_finite(finite_b[: len(index)], model.decoder.dtype, "Attribution failed")
        found.append(part.take(range(len(index))))
        order.append(index)
        spread.append(np.asarray(spread_b)[: len(index)])
    place = np.argsort(np.concatenate(order))
    whole = jax.tree.map(lambda *parts: np.concatenate(parts)[place], *found)
    check_sum(whole, np.concatenate(spread)[place], model.decoder.dtype)
    return whole


def check_sum(found: Attribution, spread_n: Float[np.ndarray, " n"], dtype) -> None:
    """Raises ArithmeticError if the parts do not sum to the whole, within what rounding to `dtype` explains. spread_n: as from
    `attribute_batch`."""
    parts = [np.abs(np.asarray(part, np.float64)).reshape(len(spread_n), -1) for part in (found.heads, found.mlp)]
    allowed = ROUNDINGS * float(jnp.finfo(dtype).eps) * spread_n + SUMMING * sum(part.sum(axis=1) for part in parts)
    off = np.abs(found.off)
    if (off > allowed).any():
        worst = int(np.argmax(off - allowed))
        raise ArithmeticError(
            f"The parts of prompt {worst} along the direction sum to its residual's product with the direction but for "
            f"{off[worst]:.3g}, more than the {allowed[worst]:.3g} that rounding in {dtype} explains. Attribution of this "
            "architecture is wrong: please report it."
        )

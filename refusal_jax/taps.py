"""Requests for internal values of the forward pass.

Taps are ordinary outputs of the forward pass, with a leading layer axis; nothing is stored on the side, and nothing is
computed that was not asked for. A tap reads the value that the model continues with, so at an edited site it sees the
edited value.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from refusal_jax.axes import Array, EitherLeaf
from refusal_jax.errors import UserError

# The residual stream in TransformerLens's vocabulary; attn_out and mlp_out are what is added to it, after any post-norm.
RESIDUAL_SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
# The parts of attn_out . direction that come from each head, from each head and source token, and from the bias of the output
# projection. Heads and bias sum to it, edits, post-norm and residual multiplier included; a head's sources sum to the head. Of a
# layer without heads these are 0, and all that it adds counts as a bias.
ALONG_SITES = ("result_along", "result_along_by_source", "o_bias_along")
# Head outputs before the output projection, and softmax probabilities of the keys.
HEAD_SITES = ("z", "pattern", *ALONG_SITES)
# Every site, and the axes of what the forward pass returns for it.
TAP_AXES = dict.fromkeys(RESIDUAL_SITES, "LBPD") | {
    "z": "LBPNH",
    "pattern": "LBNQT",
    "result_along": "LBPN",
    "result_along_by_source": "LBPNT",
    "o_bias_along": "LBP",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Taps:
    """Which sites to read, at which tokens, and along which direction.

    sites: names of `TAP_AXES`, which has the axes of what is returned by site: the model's dtype for the residual stream and "z",
    float32 for the others. last: the number of tokens to read at the end of each row (rows end together, by left padding), for
    "pattern" the number of queries; None reads all. along: the direction of `ALONG_SITES`, `[D]` for all rows or `[B, D]`; it is
    not normalised. At padding tokens values mean nothing, but "pattern" is 0 wherever a query may not attend to a key.
    Raises UserError for an unknown site or `last` under 1.

    A request is a pytree: sites and `last` are static, and `along` is an argument of the compiled program.
    """

    sites: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})
    last: int | None = dataclasses.field(default=None, metadata={"static": True})
    along: EitherLeaf | None = None

    def __post_init__(self):
        unknown = [site for site in self.sites if site not in TAP_AXES]
        if unknown:
            raise UserError(f"unknown tap sites {unknown}; the sites are {', '.join(TAP_AXES)}.")
        if self.last is not None and self.last < 1:
            raise UserError(f"last = {self.last}: tap at least the last token, or all tokens with last=None.")

    def asks(self, *sites: str) -> bool:
        """Returns whether any of these sites is to be read."""
        return any(site in self.sites for site in sites)

    def for_batch(self, batch: int, d_model: int) -> "Taps":
        """Returns the normal form that jitted programs take: `along` float32 `[batch, d_model]`, or None where no site needs it.

        Raises UserError if a site needs a direction and there is none, or if its shape or its values do not fit.
        """
        if not self.asks(*ALONG_SITES):
            return dataclasses.replace(self, along=None)
        if self.along is None:
            raise UserError(
                f"{', '.join(site for site in self.sites if site in ALONG_SITES)}: pass the direction to read along, as "
                "Taps(..., along=direction)."
            )
        along = np.asarray(self.along, np.float32)
        if along.shape not in ((d_model,), (batch, d_model)):
            raise UserError(
                f"along has the shape {list(along.shape)}; pass one direction, [{d_model}], or one for each row of the batch, "
                f"[{batch}, {d_model}]."
            )
        if not np.isfinite(along).all():
            raise UserError(
                f"along holds {(~np.isfinite(along)).sum()} values that are NaN or infinite; pass finite ones."
            )
        return dataclasses.replace(self, along=np.broadcast_to(along, (batch, d_model)))

    def cut(self, x_bt):
        """Returns the tapped positions of an array whose second axis is T."""
        return x_bt[:, -self.last if self.last else 0 :]

    def read(self, **values_btd) -> dict[str, jax.Array]:
        """Returns the requested ones of a block's named residuals `[B, T, D]`, cut to the tapped positions."""
        return {site: self.cut(values_btd[site]) for site in self.sites if site in values_btd}

    def finite(self, tapped: Mapping[str, Array], mask_bt: Bool[Array, "B T"]) -> Bool[jax.Array, " B"]:
        """Returns whether all that was tapped of a row's real tokens is finite."""
        finite_b = jnp.ones(len(mask_bt), bool)
        for site, values in tapped.items():
            axes = TAP_AXES[site].replace("Q", "P")
            here_bp = jnp.isfinite(values).all(axis=tuple(i for i, axis in enumerate(axes) if axis not in "BP"))
            finite_b &= jnp.all(here_bp | ~self.cut(mask_bt), axis=1)
        return finite_b


NO_TAPS = Taps()

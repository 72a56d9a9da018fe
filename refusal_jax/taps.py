"""Read-outs of the residual stream, as a static request that names what to return.

Taps are ordinary outputs of the forward pass, with a leading layer axis; nothing is stored on the side. A tap reads
the value that the model goes on with, so at an edited site it sees the edited value.
"""

import dataclasses

from refusal_jax.errors import UserError

# TransformerLens's vocabulary; attn_out and mlp_out are what is added to the residual, after any post-norm.
TAP_SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")


@dataclasses.dataclass(frozen=True)
class Taps:
    """Which sites to read, at which tokens: the last `last` of each row (they are aligned, by left padding), or all.

    The forward returns `{site: [L, B, P, D]}` in the model's dtype. Raises UserError for an unknown site or `last` under 1.
    """

    sites: tuple[str, ...] = ()
    last: int | None = None

    def __post_init__(self):
        unknown = [site for site in self.sites if site not in TAP_SITES]
        if unknown:
            raise UserError(f"unknown tap sites {unknown}; the sites are {', '.join(TAP_SITES)}.")
        if self.last is not None and self.last < 1:
            raise UserError(f"last = {self.last}: tap at least the last token, or all tokens with last=None.")

    def read(self, **values_btd):
        """The requested ones of a block's named values, cut to the tapped positions."""
        start = -self.last if self.last else 0
        return {site: values_btd[site][:, start:] for site in self.sites}


NO_TAPS = Taps()

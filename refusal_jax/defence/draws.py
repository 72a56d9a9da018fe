"""Draws which rows, layers, sites and tokens of a batch adversarial training ablates, as edits of the batch's rows.

They are made inside the jitted step from its key, and enter blocks as inputs. So a gradient that computes a block anew sees what
the first pass saw.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from refusal_jax.axes import Array
from refusal_jax.edits import SITES, Edits


def ablated_rows(
    key: jax.Array,
    units_ld: Float[Array, "L D"],
    gate_ls: Float[Array, "L S"],
    harmful_b: Bool[Array, " B"],
    probability: float,
) -> Edits:
    """Returns edits that ablate each layer's unit direction from some harmful rows, each drawn with `probability`.

    A zero direction ablates nothing. gate_ls: 1 at the layers and sites where a drawn row is ablated.
    """
    rows, (layers, width) = len(harmful_b), units_ld.shape
    drawn_b = harmful_b & jax.random.bernoulli(key, probability, (rows,))
    units_rljd = jnp.broadcast_to(units_ld[None, :, None], (rows, layers, 1, width))
    return Edits(
        units_rljd[:, 0],
        drawn_b[:, None, None] * jnp.asarray(gate_ls)[None],
        jnp.zeros((rows, width)),
        jnp.full((rows, 1), -1, jnp.int32),
        layer_ablate_rljd=units_rljd,
    )


def ablated_tokens(
    key: jax.Array,
    basis_jd: Float[Array, "J D"],
    gate_ls: Float[Array, "L S"],
    rows: int,
    tokens: int,
    site_probability: float,
    token_probability: float,
) -> Edits:
    """Returns edits that ablate the span of orthonormal directions from some tokens of every row.

    Each site of a layer is drawn for each row with the one probability, and of a site that is drawn each token with the other.
    gate_ls: 1 at the layers and sites that may be drawn.
    """
    (layers, sites), width = gate_ls.shape, basis_jd.shape[-1]
    site_key, token_key = jax.random.split(key)
    site_rls = jax.random.bernoulli(site_key, site_probability, (rows, layers, sites))
    token_rlst = jax.random.bernoulli(token_key, token_probability, (rows, layers, sites, tokens))
    return Edits(
        jnp.broadcast_to(basis_jd, (rows, *basis_jd.shape)),
        site_rls * jnp.asarray(gate_ls)[None],
        jnp.zeros((rows, width)),
        jnp.full((rows, 1), -1, jnp.int32),
        token_gate_rlst=token_rlst.astype(jnp.float32),
    )


def gates(layers: int, first: int, sites: tuple[str, ...] = SITES) -> Float[Array, "L S"]:
    """Returns 1 at some sites of the layers from `first` on, and 0 elsewhere, float32."""
    at_s = jnp.array([site in sites for site in SITES], jnp.float32)
    return (jnp.arange(layers) >= first)[:, None] * at_s

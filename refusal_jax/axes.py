"""Defines the axes of arrays once for the whole package.

An array's name ends in its axes, such as `resid_btd`, and public functions annotate the same axes for jaxtyping, such as
`Float[Array, "B T D"]`. A letter means one thing everywhere; a count that belongs to no axis of the model is a lower-case `n`.
"""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

Array = jax.Array | np.ndarray  # where both come in: jitted functions take either
# Fields of a pytree. Where JAX rebuilds the tree, it puts other things in an array's place, such as its shape.
if TYPE_CHECKING:
    Leaf = jax.Array
    EitherLeaf = Array
else:
    Leaf = EitherLeaf = Any

AXES = {
    "B": "rows of a batch, which are prompts",
    "T": "tokens, on the query side of attention",
    "C": "cache slots, on the key side of attention",
    "D": "d_model, the width of the residual stream",
    "N": "query heads",
    "K": "key/value heads",
    "G": "query heads of one key/value head",
    "H": "entries of one head",
    "I": "entries of a value, where keys have another number",
    "F": "hidden entries of an MLP",
    "E": "experts",
    "V": "vocabulary",
    "L": "layers",
    "P": "tapped positions",
    "Q": "query positions of tapped attention patterns",
    "S": "edit sites",
    "R": "rows of an `Edits`: one, or one for each row of the batch",
    "J": "directions that span a subspace",
    "A": "layers at which a row of an `Edits` adds its vector",
    "M": "candidate directions, in selection",
    "O": "output tokens of a reply",
    "U": "answers that a judge model can give",
    "X": "heads that are looked at",
    "Z": "entries of a state for each entry of a head",
    "W": "regions of a row's tokens, and what else a value can come from",
}

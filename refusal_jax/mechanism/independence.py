"""Representational independence of directions (arXiv 2502.17420): whether ablating one changes how much of another there is.

Orthogonal directions can still depend on each other, because what the model computes from one may be written along the other.
Two directions are independent if the cosine of the residual stream with each stays what it was, at every layer, while the other
is ablated.
"""

from collections.abc import Sequence

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
from refusal_jax.models.sharding import replicate
from refusal_jax.taps import Taps


@jax.jit
def stream_cosines(
    decoder: Decoder,
    tokens_bt: Int[Array, "B T"],
    mask_bt: Bool[Array, "B T"],
    edits: Edits,
    units_jd: Float[Array, "J D"],
) -> Float[Array, "J L B"]:
    """Returns the cosines of the last token's residual at every block's input with unit directions, float32."""
    x_lbd = decoder.forward(tokens_bt, mask_bt, edits, Taps(("resid_pre",), 1)).taps["resid_pre"][:, :, 0]
    x_lbd = x_lbd.astype(jnp.float32)
    along_jlb = jnp.einsum("lbd,jd->jlb", x_lbd, units_jd, precision="highest")
    return replicate(decoder.mesh, along_jlb / (jnp.linalg.norm(x_lbd, axis=-1) + EPS))


def cosine_changes(
    model: ChatModel, prompts: Sequence[Prompt], units_jd: Float[np.ndarray, "J D"], rows: int
) -> Float[np.ndarray, "J J L n"]:
    """Returns by how much the cosine with direction i changes while direction j is ablated everywhere, at `[j, i]`, for every
    layer and prompt; float64.

    units_jd: unit directions. rows: of a batch.
    """
    count, cfg = len(units_jd), model.config
    changes = np.zeros((count, count, cfg.n_layers, len(prompts)))
    units = np.asarray(units_jd, np.float32)
    for index, batch in length_batches(model, prompts, rows):
        tokens, mask, none = model.put(batch.tokens, batch.mask)
        before = np.asarray(stream_cosines(model.decoder, tokens, mask, none, units), np.float64)
        for ablated, unit_d in enumerate(units_jd):
            edits = model.put(batch.tokens, batch.mask, Edits.ablate(unit_d))[2]
            after = np.asarray(stream_cosines(model.decoder, tokens, mask, edits, units), np.float64)
            changes[ablated][:, :, index] = (after - before)[:, :, : len(index)]
    return changes


def dependence(changes_jjln: Float[np.ndarray, "J J L n"]) -> Float[np.ndarray, "J J n"]:
    """Returns for each pair of directions and each prompt what the paper's training makes small: the mean over layers of the
    squared changes of cosine, of both ways together; 0 is independent."""
    squares = (changes_jjln**2).mean(axis=2)
    return squares + squares.swapaxes(0, 1)

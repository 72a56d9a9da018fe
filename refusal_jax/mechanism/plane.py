"""Reads harmfulness at the instruction's end and refusal at the template's end (arXiv 2507.11878).

What a model takes a request for is read at the last token of the instruction, before the template's tokens, and what it is about
to say at the last token of all. Both are projections of the residual stream on a difference of means of that place, so that an
edit can be seen to move one of them and not the other.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from refusal_jax.axes import Array
from refusal_jax.chat.batches import length_batches
from refusal_jax.chat.messages import Prompt
from refusal_jax.chat.model import ChatModel
from refusal_jax.edits import EPS, Edits
from refusal_jax.judges.separation import Estimate, Resamples
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.finite import check_finite
from refusal_jax.models.scores import refusal_score
from refusal_jax.models.sharding import replicate
from refusal_jax.progress import each
from refusal_jax.taps import Taps

INSTRUCTION_END, TEMPLATE_END = 0, 1  # places on the axis P of what is read here
SEED = 0  # of the resamples


@dataclasses.dataclass(frozen=True)
class Ends:
    """Holds what was read of n prompts under one edit: projections on J directions at the input of each block, at the
    instruction's end and at the template's end, float32, and refusal scores, in nats."""

    along_nlpj: Float[np.ndarray, "n L P J"]
    scores_n: Float[np.ndarray, " n"]

    @property
    def refused_n(self) -> Bool[np.ndarray, " n"]:
        """Returns whether each prompt's refusal score is above 0."""
        return self.scores_n > 0


def unit_rows(vectors: Float[np.ndarray, "*n D"]) -> Float[np.ndarray, "*n D"]:
    """Returns vectors along the last axis, made unit; zero stays zero."""
    return vectors / (np.linalg.norm(vectors, axis=-1, keepdims=True) + EPS)


def without(vectors: Float[np.ndarray, "*n D"], direction_d: Float[np.ndarray, " D"]) -> Float[np.ndarray, "*n D"]:
    """Returns vectors less their component along a direction of any norm."""
    unit_d = unit_rows(direction_d)
    return vectors - (vectors @ unit_d)[..., None] * unit_d


@partial(jax.jit, static_argnames="last")
def project_ends(
    decoder: Decoder,
    tokens_bt: Int[Array, "B T"],
    mask_bt: Bool[Array, "B T"],
    edits: Edits,
    units_jld: Float[Array, "J L D"],
    refusal_ids: Int[Array, " _"],
    last: int,
) -> tuple[Float[Array, "B L P J"], Float[Array, " B"], Bool[Array, " B"]]:
    """Returns projections at the token that is `last` from the end and at the last one, refusal scores, and whether each row's
    values are finite."""
    out = decoder.forward(tokens_bt, mask_bt, edits, Taps(("resid_pre",), last))
    logits_bv, finite_b = decoder.next_logits(out.resid_btd)
    ends_lbpd = out.taps["resid_pre"][:, :, jnp.array((0, last - 1))].astype(jnp.float32)
    along_blpj = jnp.einsum("lbpd,jld->blpj", ends_lbpd, units_jld, precision="highest")
    finite_b &= jnp.isfinite(along_blpj).all(axis=(1, 2, 3))
    return replicate(decoder.mesh, (along_blpj, refusal_score(logits_bv, refusal_ids), finite_b))


def read_ends(
    model: ChatModel,
    prompts: Sequence[Prompt],
    edits: Edits,
    units_jld: Float[np.ndarray, "J L D"],
    refusal_ids: Sequence[int],
    rows: int,
    title: str,
) -> Ends:
    """Returns what is read of prompts under an edit of one row. units_jld: unit directions, one for each layer. rows: of a batch.

    Raises UserError for a prompt that is longer than the context, and for values that are not finite.
    """
    cfg, last = model.config, len(model.chat.post_instruction_ids) + 1
    along = np.zeros((len(prompts), cfg.n_layers, 2, len(units_jld)), np.float32)
    scores, ids = np.zeros(len(prompts)), np.asarray(refusal_ids, np.int32)
    units, edits = np.asarray(units_jld, np.float32), edits.for_batch(rows, cfg.n_layers, cfg.d_model)
    for index, batch in each(list(length_batches(model, prompts, rows)), title, "batch"):
        out = project_ends(model.decoder, *model.put(batch.tokens, batch.mask, edits), units, ids, last)
        along_b, scores_b, finite_b = (np.asarray(a)[: len(index)] for a in jax.device_get(out))
        edited = bool(edits.in_force_r.any())
        check_finite(finite_b, model.decoder.dtype, f"No projections can be read from '{title}'", edited)
        along[index], scores[index] = along_b, scores_b
    return Ends(along, scores)


@dataclasses.dataclass(frozen=True)
class Moved:
    """Tells how an edit moves harmful and harmless prompts along a direction, with 95 % bootstrap intervals.

    gap: the distance of their means, without and with the edit; kept: the second as a share of the first. area: how often a
    harmful prompt lies above a harmless one, without and with the edit; change: the second minus the first.
    """

    gap: tuple[Estimate, Estimate]
    kept: Estimate
    area: tuple[Estimate, Estimate]
    change: Estimate

    @classmethod
    def of(
        cls,
        harmful: tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]],
        harmless: tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]],
    ) -> "Moved":
        """Compares projections of the same prompts without and with an edit, at least two of each kind."""
        draws = Resamples.draw(len(harmful[0]), len(harmless[0]), SEED)
        above, below = (np.stack(side, axis=1).astype(np.float64) for side in (harmful, harmless))
        gaps_r2 = draws.gap(above, below)
        areas = [draws.auroc(above[:, [i]], below[:, [i]]) for i in (0, 1)]
        shares_r = np.divide(gaps_r2[:, 1], gaps_r2[:, 0], out=np.zeros(len(gaps_r2)), where=gaps_r2[:, 0] != 0)
        return cls(
            (Estimate.of(gaps_r2[:, 0]), Estimate.of(gaps_r2[:, 1])),
            Estimate.of(shares_r),
            (Estimate.of(areas[0]), Estimate.of(areas[1])),
            Estimate.of(areas[1] - areas[0]),
        )

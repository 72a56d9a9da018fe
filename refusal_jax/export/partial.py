"""Plans the export of partial ablations whose strength differs between layers and sites, as one edit of the weights."""

import numpy as np
from jaxtyping import Float

from refusal_jax.checkpoints.rewrite import Checkpoint
from refusal_jax.conditions import EMBED, Ablate
from refusal_jax.directions import Direction
from refusal_jax.edits import SITES
from refusal_jax.export.hf import Plan
from refusal_jax.export.tensor_edits import Projection, tensor_edits

INPUT = SITES.index("resid_pre")


def held(strength_ls: Float[np.ndarray, "L S"]) -> Float[np.ndarray, "L S"]:
    """Returns the strengths that weights can hold of those of a partial ablation, at each layer and site of `SITES`.

    Weights write at the last two sites of each block, and at the first block's input; what is taken out of later blocks' inputs
    no weight writes there. Where the whole direction is taken out everywhere, nothing is left of it at their inputs either way.
    """
    found_ls = np.array(strength_ls, np.float64)
    found_ls[1:, INPUT] = 0.0
    return found_ls


def is_held(strength_ls: Float[np.ndarray, "L S"]) -> bool:
    """Returns whether weights can hold all of a partial ablation."""
    return bool(np.all(strength_ls == 1) or not strength_ls[1:, INPUT].any())


def plan_of(
    checkpoint: Checkpoint, direction: Direction, strength_ls: Float[np.ndarray, "L S"], tied: str = "untie"
) -> Plan:
    """Plans the export of what weights can hold of a partial ablation. tied: "untie" or "keep", of `hf.TIED`.

    Raises UserError for a direction of another width, ValueError as `tensor_edits` does.
    """
    edits: dict[str, Projection] = {}
    for layer, of_sites in enumerate(held(strength_ls).tolist()):
        for site, strength in zip(SITES, of_sites, strict=True):
            if strength:
                written = EMBED if site == SITES[INPUT] else site
                edits |= tensor_edits(checkpoint, Ablate(direction, (layer,), (written,), strength))
    embedded = checkpoint.cfg.tied_embeddings and strength_ls[0, INPUT] != 0
    return Plan.of_tensors(checkpoint, edits, tied if embedded else None)

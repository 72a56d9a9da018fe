"""Measures how far directions mediate refusal: what ablation leaves of it, and how much of it addition makes."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from refusal_jax.edits import Edits
from refusal_jax.judges.statistics import Rate
from refusal_jax.mechanism.edited_prompts import EditedPrompts

HALF = 0.5  # of the prompts: what must be under it when ablated, and over it when added


@dataclasses.dataclass(frozen=True)
class Mediation:
    """The effect of one direction. ablated: harmful prompts that are still refused under ablation; added: harmless prompts that
    are refused under addition; both by the sign of the refusal score. kl: mean KL divergence of ablation on harmless prompts."""

    ablated: Rate
    added: Rate
    kl: float

    def holds(self, kl_threshold: float) -> bool | None:
        """Returns whether the direction mediates refusal; None where the intervals leave that open.

        It does if ablation leaves less than half of the refusals, and addition makes more than half of the harmless prompts
        refused, each by the bound of the 95 % interval, and if ablation does no more to harmless prompts than the study allows.
        """
        (left_low, left_high), (made_low, made_high) = self.ablated.interval, self.added.interval
        if self.kl > kl_threshold or left_low >= HALF or made_high <= HALF:
            return False
        return True if left_high < HALF and made_low > HALF else None

    def row(self, kl_threshold: float) -> dict:
        """Returns the numbers for a file."""
        holds = self.holds(kl_threshold)
        return {"ablated": self.ablated.row, "added": self.added.row, "kl": self.kl, "holds": holds}


def mediations(
    harmful: EditedPrompts, harmless: EditedPrompts, units_md: Float[np.ndarray, "M D"], layer: int, norm: float
) -> list[Mediation]:
    """Returns the effect of each of M unit directions on the prompts of both sides, which have refusal tokens.

    layer, norm: where a direction is added, and with which norm.
    """
    ablated_mn = harmful.read(Edits.ablate(units_md)).scores_mn > 0
    added_mn = harmless.read(Edits.add(units_md, layer, norm)).scores_mn > 0
    kl_m = harmless.read(Edits.ablate(units_md)).kl_mn.mean(axis=1)
    return [
        Mediation(Rate.of(ablated_n.astype(int).tolist()), Rate.of(added_n.astype(int).tolist()), float(kl))
        for ablated_n, added_n, kl in zip(ablated_mn, added_mn, kl_m, strict=True)
    ]


def cone_holds(found: Sequence[Mediation], kl_threshold: float) -> bool | None:
    """Returns whether all directions of a cone mediate refusal; None where for some of them that is open, and none does not."""
    each = [one.holds(kl_threshold) for one in found]
    return False if False in each else None if None in each else True


def dimension(holds: Mapping[int, bool | None]) -> int:
    """Returns the largest dimension whose cone holds, 0 if none does. holds: by dimension."""
    return max((k for k, held in holds.items() if held), default=0)

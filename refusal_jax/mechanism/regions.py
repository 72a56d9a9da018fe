"""Regions of a prompt's tokens: what can be attended to, and what a value can come from."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from refusal_jax.mechanism.suffixes import Row

# The first token has a region of its own, since heads that have nothing to read put their attention there; then what else the
# template puts before the instruction, the instruction, its suffix, and the template's tokens after it.
REGIONS = ("first", "before", "instruction", "suffix", "template")
TEMPLATE = REGIONS.index("template")
# What stands beside the regions: attention that reads no token, which learned sinks allow, and values that MLPs computed.
NOTHING, MLPS = "nothing", "MLPs"
ATTENDED, ORIGINS = (*REGIONS, NOTHING), (*REGIONS, MLPS)
PADDING = len(REGIONS)


def regions_of(rows: Sequence[Row], mask_bt: Bool[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
    """Returns the region of each token of left-padded rows as a number in `REGIONS`, `PADDING` for padding. A row's first token
    is in "first", wherever else it would be. mask_bt: marks real tokens."""
    regions_bt = np.where(mask_bt, REGIONS.index("before"), PADDING).astype(np.int32)
    for row, region_t, mask_t in zip(rows, regions_bt, mask_bt, strict=True):
        for name, span in (("instruction", row.instruction), ("suffix", row.suffix), ("template", row.post)):
            region_t[span.within(len(mask_t))] = REGIONS.index(name)
        region_t[np.argmax(mask_t)] = REGIONS.index("first")
    return regions_bt

"""Numbers of what heads read: means over prompts with intervals, by head, region, hop and group of prompts, and paired changes.

Attention is a mean over the heads, so that it sums to 1; what heads write along the direction is summed over them. All is at the
last token, from which the model answers, unless a token is named.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from refusal_jax.judges.statistics import bounded, mean_interval, paired_mean
from refusal_jax.mechanism.attention import Reading
from refusal_jax.mechanism.regions import ATTENDED, ORIGINS, TEMPLATE
from refusal_jax.mechanism.suffixes import HARMFUL, RANDOM, SUFFIXED

PAIRS = ((HARMFUL, SUFFIXED), (HARMFUL, RANDOM), (RANDOM, SUFFIXED))
# What is measured: where it can come from, and its array by head and token `[n, X, Q, W]`.
MEASURES: dict[str, tuple[tuple[str, ...], Callable[[Reading], np.ndarray]]] = {
    "attention": (ATTENDED, lambda found: np.asarray(found.attention, np.float64)),
    "attention_two_hops": (ATTENDED, lambda found: found.attention_two_hops),
    "along": (ORIGINS, lambda found: np.asarray(found.along, np.float64)),
    "along_two_hops": (ORIGINS, lambda found: found.along_two_hops),
}
READ = ("instruction", "suffix")  # regions that are shown for single heads


def pair_name(pair: tuple[str, str]) -> str:
    """Returns the name of a comparison in files."""
    return " to ".join(pair)


def together(measure: str, values: Float[np.ndarray, "n X W"]) -> Float[np.ndarray, "n W"]:
    """Returns a measure of all heads together: the mean of attention, and the sum of what is written."""
    return values.mean(axis=1) if measure.startswith("attention") else values.sum(axis=1)


def summary(groups: Mapping[str, Reading], heads: Sequence[tuple[int, int]], suffix: int) -> dict:
    """Returns the numbers of the report, as JSON values, of readings by group of prompts; the groups of `PAIRS` hold the same
    prompts in the same order. suffix: the number of tokens of all suffixes, 0 if they differ."""
    there = {group: found for group, found in groups.items() if len(found.off)}
    values = {name: {group: of(found) for group, found in there.items()} for name, (_, of) in MEASURES.items()}
    last = {name: {group: array[:, :, -1] for group, array in by_group.items()} for name, by_group in values.items()}
    return {
        "heads": [{"layer": layer, "head": head} | _of_head(last, x) for x, (layer, head) in enumerate(heads)],
        "together": {
            name: _means(MEASURES[name][0], {group: together(name, array) for group, array in by_group.items()})
            for name, by_group in last.items()
        },
        "changes": {
            pair_name(pair): {
                name: _changes(MEASURES[name][0], *(together(name, by_group[group]) for group in pair))
                for name, by_group in last.items()
            }
            for pair in PAIRS
        },
        "tokens": [_of_token(values, q) for q in range(next(iter(values["attention"].values())).shape[2])],
        "flow": {group: _flow(found) for group, found in there.items()},
        "suffix_tokens": {group: _by_token(there[group], suffix) for group in (SUFFIXED, RANDOM) if suffix},
    }


def _means(places: Sequence[str], by_group: Mapping[str, np.ndarray]) -> dict:
    return {
        group: {place: bounded(mean_interval(values)) for place, values in zip(places, array.T, strict=True)}
        for group, array in by_group.items()
    }


def _changes(places: Sequence[str], first_nw: np.ndarray, second_nw: np.ndarray) -> dict:
    pairs = zip(places, first_nw.T, second_nw.T, strict=True)
    return {place: bounded(paired_mean(first, second)) for place, first, second in pairs}


def _of_head(last: Mapping[str, Mapping[str, np.ndarray]], x: int) -> dict:
    """Returns what one head reads in the regions of `READ`."""
    index = [ATTENDED.index(place) for place in READ]
    return {
        name: _means(READ, {group: array[:, x, index] for group, array in by_group.items()})
        for name, by_group in last.items()
    }


def _of_token(values: Mapping[str, Mapping[str, np.ndarray]], q: int) -> dict:
    """Returns what heads read from one of the template's tokens, as means, and what the suffix changes."""
    found = {}
    for name, by_group in values.items():
        index = [ATTENDED.index(place) for place in READ]
        here = {group: together(name, array[:, :, q][..., index]) for group, array in by_group.items()}
        found[name] = {
            "means": {
                group: dict(zip(READ, array.mean(axis=0).tolist(), strict=True)) for group, array in here.items()
            },
            "changes": {pair_name(pair): _changes(READ, *(here[group] for group in pair)) for pair in PAIRS},
        }
    return found


def _flow(found: Reading) -> dict:
    """Returns the attention of the heads from the last token as shares, means over heads and prompts: directly by region, and by
    template token and where what is read there came from."""
    direct_w = np.asarray(found.attention, np.float64)[:, :, -1].mean(axis=(0, 1))
    direct_w[TEMPLATE] = 0.0
    via_pw = np.asarray(found.attention_via, np.float64)[:, :, -1].mean(axis=(0, 1))
    return {"direct": direct_w.tolist(), "via": via_pw.tolist()}


def _by_token(found: Reading, suffix: int) -> dict:
    """Returns attention from the last token to each token of a suffix, and what is written of it, with intervals."""
    after = np.asarray(found.attention).shape[2]
    arrays = {"attention": found.source_attention, "along": found.source_along}
    cut = {name: np.asarray(array, np.float64)[..., -after - suffix : -after] for name, array in arrays.items()}
    return {name: [bounded(mean_interval(x)) for x in together(name, array).T] for name, array in cut.items()}

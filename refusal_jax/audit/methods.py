"""Says in words by which method refusal was likely removed from weights, from where, how much, and in which directions."""

import numpy as np

from refusal_jax.audit.dose import WeightStatistics, dose_of, explained
from refusal_jax.audit.operator_fit import CLEAR, Part

ONE = 0.99  # cosine between directions of two layers that are the same
EVEN = 0.03  # spread of doses that are the same
KEPT = 0.7  # how far rows got their lengths back, where a method keeps them
REFLECTED = (1.6, 2.4)


def likely_method(found: WeightStatistics) -> str:
    """Returns the likely method, as words that a comma joins, "" where no matrix is dosed."""
    rows = found.dosed
    if not rows or found.dose is None:
        return ""
    parts = [row.fit.refusal for row in rows if row.fit is not None and row.fit.refusal is not None]
    words = [_operation(found.dose.value), _directions(found, parts), _layers(found)]
    clean = [row.lengths for row in rows if explained(row.fit) > CLEAR and row.lengths]
    words += ["rows keep their lengths"] if clean and np.median(clean) > KEPT else []
    words += [{"readers": "from what reads the stream", "both": "from what writes and what reads"}.get(found.side, "")]
    components = {row.matrix.path for row in rows}
    words += (
        ["from the embedding, too" if len(components) > 1 else "from the embedding"] if "embed" in components else []
    )
    words += [_beside(found)]
    return ", ".join(filter(None, words))


def _operation(dose: float) -> str:
    if dose < 0:
        return "refusal was added along its direction (safety injection)"
    if REFLECTED[0] <= dose <= REFLECTED[1]:
        return "reflection (Householder)"
    return "directional ablation"


def _directions(found: WeightStatistics, parts: list[Part]) -> str:
    """Returns how many directions there are: in each matrix, and over the matrices."""
    ranks = [row.fit.removals for row in found.dosed if row.fit is not None]
    rank = int(np.median(ranks)) if ranks else 1
    if rank > 1:
        return f"{rank} directions at a time"
    units = np.array([part.direction_d for part in parts])
    if len(units) < 2:
        return "one direction"
    cosines = np.abs(units @ units.T)[np.triu_indices(len(units), 1)]
    clean = np.median([part.fit for part in parts]) > ONE
    if np.median(cosines) >= ONE or not clean:
        return "one direction" if np.median(cosines) >= 0.8 else ""
    return "directions that differ from layer to layer"


def _layers(found: WeightStatistics) -> str:
    """Returns in which layers, and whether the strengths rise and fall over them."""
    by_layer: dict[int, list[float]] = {}
    for row in found.dosed:
        if row.matrix.layer is not None:
            by_layer.setdefault(row.matrix.layer, []).append(dose_of(row))
    layers, count = sorted(by_layer), len({row.matrix.layer for row in found.rows if row.matrix.layer is not None})
    if not layers:
        return ""
    means = np.array([np.mean(by_layer[layer]) for layer in layers])
    where = "in all layers" if len(layers) == count else f"in layers {_ranges(layers)}"
    size = max(float(np.abs(means).max()), 1e-9)
    if np.ptp(means) <= max(EVEN, 0.1 * size):
        return where
    peak = int(np.argmax(np.abs(means)))
    tent = np.all(np.diff(np.abs(means[: peak + 1])) > -EVEN) and np.all(np.diff(np.abs(means[peak:])) < EVEN)
    shape = "strengths that rise and fall over the layers, as heretic's" if tent else "strengths that differ by layer"
    return f"{where}, with {shape}"


def _beside(found: WeightStatistics) -> str:
    """Returns what else was done to the same weights."""
    storage = {row.storage.form for row in found.changed if row.storage is not None}
    spread = [row for row in found.changed if row.fit is not None and row.fit.above > 5 and row.fit.explained < 0.7]
    words = []
    if len(spread) > len(found.changed) / 2:
        words.append("beside a change of another kind (fine-tuning or a merge)")
    if storage & {"4 bits", "8 bits"}:
        words.append(f"then stored in {min(storage & {'4 bits', '8 bits'})}")
    return ", ".join(words)


def _ranges(layers: list[int]) -> str:
    """Returns numbers as ranges, such as "2-5, 7"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)

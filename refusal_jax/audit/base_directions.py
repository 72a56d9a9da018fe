"""The refusal directions of an audit's base, and directions that have nothing to do with content, to compare with.

A refusal direction is the mean residual of harmful prompts minus that of harmless ones (paper, section 2.3), at each block's
input and the last few prompt tokens. A control is the difference of the means of two random halves of the harmless prompts.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64, Int

from refusal_jax.audit.frame import unit_rows
from refusal_jax.audit.subject import Subject
from refusal_jax.chat.batches import length_batches
from refusal_jax.chat.model import ChatModel, weights_dtype
from refusal_jax.errors import UserError
from refusal_jax.models.config import ModelConfig
from refusal_jax.plan.limits import parameters
from refusal_jax.taps import Taps

DIRECTIONS = "base_directions"  # in `Subject.shared`
CONTROLS = 24
POSITIONS = 2
BATCH = 16
LEAST_ALIGNED, MOST_ALIGNED = 0.45, 0.7
MOST = 24  # refusal directions, so that what is done for each of them stays cheap in deep models


@dataclasses.dataclass(frozen=True, eq=False)
class BaseDirections:
    """Refusal directions `[n, D]`, not normalised, with the layer whose input each was read at and its position, counted from the
    prompt's end; and controls `[c, D]`. left_out: why there are no refusal directions, "" if there are."""

    refusal_nd: Float64[np.ndarray, "n D"]
    layers_n: Int[np.ndarray, " n"]
    positions_n: Int[np.ndarray, " n"]
    control_nd: Float64[np.ndarray, "c D"]
    left_out: str = ""

    @property
    def aligned(self) -> float:
        """Returns the cosine with a refusal direction from which on a direction counts as one: what one in five of the directions
        without content reach, as the stream's largest entries are in both, and at least LEAST_ALIGNED."""
        if not len(self.refusal_nd):
            return 1.0
        cosines = np.abs(unit_rows(self.control_nd) @ unit_rows(self.refusal_nd).T).max(1)
        return float(np.clip(np.quantile(cosines, 0.8), LEAST_ALIGNED, MOST_ALIGNED))

    @classmethod
    def none(cls, width: int, left_out: str, seed: int = 0) -> "BaseDirections":
        """Returns no refusal directions, and random controls."""
        controls = np.random.default_rng(seed).standard_normal((CONTROLS, width))
        nothing = np.zeros(0, int)
        return cls(np.zeros((0, width)), nothing, nothing, controls, left_out)

    @classmethod
    def measure(cls, model: ChatModel, harmful: list[str], harmless: list[str], seed: int = 0) -> "BaseDirections":
        """Measures them. Raises UserError for prompts that do not fit the model's context, for values that are not finite, and
        for fewer than two prompts of a kind."""
        if min(len(harmful), len(harmless)) < 2:
            raise UserError(
                f"Refusal directions are means over prompts, and there are {len(harmful)} harmful and {len(harmless)} harmless "
                "ones. Give at least 2 of each."
            )
        positions = min(POSITIONS, len(model.chat.post_instruction_ids) or 1)
        bad, good = (residual_means(model, prompts, positions, seed) for prompts in (harmful, harmless))
        raw = bad.mean(0) - good.mean(0)
        sizes, scale = np.linalg.norm(raw, axis=-1), np.linalg.norm(good.mean(0), axis=-1)
        places = [
            (l, p) for l in range(len(raw)) for p in range(positions) if sizes[l, p] > 1e-4 * max(scale[l, p], 1e-30)
        ]
        places = [
            places[i] for i in np.unique(np.linspace(0, len(places) - 1, min(MOST, len(places))).round().astype(int))
        ]
        layers, slots = (np.array([place[i] for place in places], int) for i in (0, 1))
        return cls(raw[layers, slots], layers, slots - positions, controls(good, places, seed))


def residual_means(model: ChatModel, prompts: list[str], positions: int, seed: int) -> Float64[np.ndarray, "g L P D"]:
    """Returns the mean residual streams at block inputs of random groups of prompts, 16 groups or as many as there
    are prompts."""
    cfg, groups = model.config, min(16, len(prompts))
    group = np.random.default_rng(seed).permutation(len(prompts)) % groups
    total = np.zeros((groups, cfg.n_layers, positions, cfg.d_model))
    size = min(BATCH, len(prompts))
    for index, batch in length_batches(model, prompts, size):
        tapped = model.taps(batch.tokens, batch.mask, Taps(("resid_pre",), positions))["resid_pre"]
        values = np.asarray(tapped, np.float32)[:, : len(index)].swapaxes(0, 1)
        np.add.at(total, group[index], values.astype(np.float64))
    return total / np.bincount(group, minlength=groups)[:, None, None, None]


def controls(
    harmless: Float64[np.ndarray, "g L P D"], places: list[tuple[int, int]], seed: int
) -> Float64[np.ndarray, "c D"]:
    """Returns differences of means of two random halves of groups of harmless prompts, each at one of the places."""
    rng, found = np.random.default_rng(seed + 1), []
    for _ in range(CONTROLS):
        layer, position = places[rng.integers(len(places))]
        order = rng.permutation(len(harmless))
        half = len(order) // 2
        one, other = harmless[order[:half], layer, position], harmless[order[half : 2 * half], layer, position]
        found.append(one.mean(0) - other.mean(0))
    return np.stack(found)


def base_directions(subject: Subject) -> BaseDirections:
    """Returns the directions of the subject's base, which are measured once and kept in `Subject.shared`.

    Where the base cannot be run, there are none, and their `left_out` says why.
    """
    if DIRECTIONS not in subject.shared:
        width, seed = subject.base.weights.cfg.d_model, subject.settings.seed
        try:
            check_memory(subject.base.weights.cfg, subject.settings.dtype)
            prompts = subject.prompts
            found = BaseDirections.measure(subject.base.model, prompts["harmful_fit"], prompts["harmless_fit"], seed)
        except UserError as error:
            found = BaseDirections.none(width, str(error), seed)
        subject.shared[DIRECTIONS] = found
    return subject.shared[DIRECTIONS]


def check_memory(cfg: ModelConfig, dtype: str, meminfo: pathlib.Path = pathlib.Path("/proc/meminfo")) -> None:
    """Raises UserError if a model would run on this machine's CPU and its weights do not fit into memory; then they can still be
    compared, matrix by matrix."""
    if jax.default_backend() != "cpu" or not meminfo.is_file():
        return
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    free = int(lines.get("MemAvailable", "0 kB").split()[0]) * 1024
    needed = parameters(cfg) * np.dtype(jnp.dtype(weights_dtype(dtype))).itemsize
    if free and needed > free:
        raise UserError(
            f"The base's weights take {needed / 2**30:.0f} GiB in memory, and {free / 2**30:.0f} GiB are free. Audit where it "
            "can be run, to measure refusal."
        )

"""Low-rank adapters (arXiv 2106.09685): the factors of the matrices of all blocks, how they begin and where they are.

The decoder multiplies with them beside the matrices, block by block (`models.layers.Adapted`); no matrix is ever merged while
training. Blocks that get none have factors of zeros: their gradients are zero, so they stay zeros.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from refusal_jax.models.config import ModelConfig
from refusal_jax.models.sharding import put, weight_spec
from refusal_jax.models.weight import Weight, factor_names
from refusal_jax.models.weights import weight_table
from refusal_jax.training.settings import TrainSettings

Factors = dict[str, jax.Array]


def factor_shapes(cfg: ModelConfig, settings: TrainSettings) -> dict[str, tuple[Weight, Weight]]:
    """Returns the left and the right factor of each target by its path, such as "blocks.q"; axes as their matrix has them."""
    found = {}
    table = weight_table(cfg)
    for path in (f"blocks.{target}" for target in settings.targets if f"blocks.{target}" in table):
        w = table[path]
        (layers, out, into), (_, rows, columns) = w.shape, w.axes
        found[path] = (
            Weight((layers, out, settings.rank), ("layers", rows, "routes"), 0.0, w.heads, layers=w.layers),
            Weight((layers, settings.rank, into), ("layers", "routes", columns), 1.0, w.heads, layers=w.layers),
        )
    return found


def factor_sharding(mesh: Mesh | None, factor: Weight) -> jax.sharding.Sharding:
    """Returns how a factor is placed on a mesh: its one side as the matrix's, its rank whole."""
    if mesh is None:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    spec = weight_spec(mesh, factor)
    return NamedSharding(mesh, PartitionSpec(*spec))


def fresh_factors(cfg: ModelConfig, settings: TrainSettings, mesh: Mesh | None) -> Factors:
    """Returns factors as PEFT begins them: right ones Kaiming-uniform, which is uniform within 1/sqrt(in), left ones zero.

    They are float32, by path such as "blocks.q_left", sharded over the mesh.
    """
    found = {}
    for number, (path, (left, right)) in enumerate(factor_shapes(cfg, settings).items()):
        names = factor_names(path)
        bound = 1 / math.sqrt(right.shape[-1])
        drawn = np.random.default_rng((settings.seed, number)).uniform(-bound, bound, right.shape).astype(np.float32)
        if settings.layers:
            drawn[np.isin(right.layers, settings.layers, invert=True)] = 0
        values = np.zeros(left.shape, np.float32), drawn
        for name, factor, value in zip(names, (left, right), values, strict=True):
            found[name] = put(value, factor_sharding(mesh, factor))
    return found


def scaled(factors: Factors, scale: float) -> Factors:
    """Returns factors as the decoder multiplies with them: the left ones times alpha / rank."""
    return {path: a * jnp.float32(scale) if path.endswith("_left") else a for path, a in factors.items()}

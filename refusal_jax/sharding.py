"""Which array axis lives on which mesh axis.

Weights name their axes logically ("heads", "mlp", "vocab", "embed"); the rules below place them on a mesh whose axes
are `data` (batch rows), `fsdp` (batch rows and weight storage) and `model` (tensor parallelism). A mesh that lacks one of
them works as if it had size 1.
"""

import math

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from refusal_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "model")
RULES = {
    "vocab": "model",
    "heads": "model",
    "kv_heads": "model",
    "mlp": "model",
    "experts": None,
    "embed": "fsdp",
    "batch": ("data", "fsdp"),
    "layers": None,
    "norm": None,
}


def make_mesh(data: int = 1, fsdp: int = 1, model: int = 1, devices=None) -> Mesh:
    """A mesh of `data` x `fsdp` x `model` devices. Raises UserError if there are not that many, or for sizes under 1."""
    devices = jax.devices() if devices is None else devices
    shape = (data, fsdp, model)
    if min(shape) < 1:
        raise UserError(f"a mesh of data={data} x fsdp={fsdp} x model={model} has no devices: each must be at least 1.")
    if np.prod(shape) > len(devices):
        raise UserError(
            f"a mesh of data={data} x fsdp={fsdp} x model={model} needs {np.prod(shape)} devices, there "
            f"are {len(devices)}. Lower mesh.data, mesh.fsdp or mesh.model."
        )
    grid = np.asarray(devices[: int(np.prod(shape))]).reshape(shape)
    return Mesh(grid, MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(shape))


def weight_sharding(mesh: Mesh | None, axes: tuple[str, ...], shape: tuple[int, ...]):
    """The sharding of a weight of these logical axes; an axis that its mesh axis does not divide is replicated."""
    if mesh is None:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    spec = []
    for axis, size in zip(axes, shape, strict=True):
        name = RULES[axis]
        spec.append(name if name in mesh.shape and size % mesh.shape[name] == 0 else None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def batch_sharding(mesh: Mesh | None, rows: int):
    """The sharding of an array whose first axis is the batch; replicated if the devices do not divide `rows`."""
    if mesh is None:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    names = tuple(name for name in RULES["batch"] if name in mesh.shape)
    ways = math.prod(mesh.shape[name] for name in names)
    return NamedSharding(mesh, PartitionSpec(names if names and rows % ways == 0 else None))

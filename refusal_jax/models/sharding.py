"""Maps array axes to mesh axes.

Weights name their axes logically ("heads", "mlp", "vocab", "embed"); the rules below place them on a mesh whose axes
are `data` (batch rows), `fsdp` (batch rows and weight storage) and `model` (tensor parallelism). For a model, `model`
is split in two, `kv` ways among the key/value heads and `q` ways among the queries of each, so that there may be more
ways than key/value heads. JAX does the rest: arrays carry shardings, and GSPMD inserts the communication.
"""

import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from refusal_jax.errors import UserError, setting
from refusal_jax.models.weight import Weight

MESH_AXES = ("data", "fsdp", "model")
SPLIT_AXES = ("data", "fsdp", "kv", "q")
STORAGE = "fsdp"  # the axis along which weights are only stored in parts: they are gathered to be used
RULES = {
    "batch": ("data", "fsdp"),
    "embed": (STORAGE,),
    "latent": (STORAGE,),
    "heads": ("kv", "q"),
    "kv_heads": ("kv",),
    "mlp": ("kv", "q"),
    "tokens": ("kv", "q"),
    "vocab": ("kv", "q"),
    "inner": (STORAGE,),
    "experts": (),
    "routes": (),
    "layers": (),
    "norm": (),
}


def parse_mesh(text: str) -> tuple[int, int, int]:
    """Returns the sides of a mesh written as DATAxFSDPxMODEL, such as 2x1x4. Raises UserError for anything else."""
    sides = text.lower().replace("×", "x").split("x")
    if len(sides) != len(MESH_AXES) or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise UserError(f"{setting('mesh', text)} is not of the form DATAxFSDPxMODEL, such as 1x1x16.")
    data, fsdp, model = map(int, sides)
    return data, fsdp, model


def make_mesh(data: int = 1, fsdp: int = 1, model: int = 1, devices=None) -> Mesh:
    """Returns a mesh of `data` x `fsdp` x `model` devices, with neighbours along `model` close to each other on a TPU.

    On several slices `data` must be a multiple of their number: only it crosses the slow network between them. Raises
    UserError if there are not that many devices, or for sizes under 1.
    """
    devices = jax.devices() if devices is None else devices
    shape = (data, fsdp, model)
    name = f"a mesh of data={data} x fsdp={fsdp} x model={model}"
    if min(shape) < 1:
        raise UserError(f"{name} has no devices: each must be at least 1.")
    count = math.prod(shape)
    if count > len(devices):
        raise UserError(f"{name} needs {count} devices, there are {len(devices)}. Ask for a smaller mesh.")
    return Mesh(_grid(shape, devices, name), MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(shape))


def _grid(shape: tuple[int, ...], devices, name: str) -> np.ndarray:
    """Returns the devices in the order that suits their network."""
    count = math.prod(shape)
    if devices[0].platform != "tpu" or count < len(devices):
        return np.asarray(devices[:count]).reshape(shape)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % slices:
        raise UserError(f"{name} cannot be laid over {slices} slices: make mesh.data a multiple of {slices}.")
    within = (shape[0] // slices, *shape[1:])
    return mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices, allow_split_physical_axes=True)


def split_for(mesh: Mesh | None, kv_heads: int) -> Mesh | None:
    """Returns the mesh with its `model` axis split into `kv` x `q` for a model of so many key/value heads: `kv` takes as many
    of the ways as divide the heads. A mesh that is split already stays as it is."""
    if mesh is None or "model" not in mesh.shape:
        return mesh
    ways = mesh.shape["model"]
    kv = math.gcd(ways, kv_heads)
    grid = mesh.devices.reshape(*(mesh.shape[name] for name in MESH_AXES[:2]), kv, ways // kv)
    return Mesh(grid, SPLIT_AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(SPLIT_AXES))


def mesh_axes(mesh: Mesh | AbstractMesh, axis: str, factors: tuple[int, ...]) -> tuple[str, ...]:
    """Returns the mesh axes that hold an array axis of the logical name `axis`.

    factors: its size, or sizes whose product it is, slowest first. A contiguous part of the axis is a part of its first
    factor, and of the second only where the first is wholly split; ways that do not divide are left out (the array is
    then replicated along them).
    """
    held, at, left = [], 0, factors[0]
    for name in RULES[axis]:
        if left == 1 and at + 1 < len(factors):
            at += 1
            left = factors[at]
        ways = mesh.shape.get(name, 1)
        if left % ways:
            break
        held.append(name)
        left //= ways
    return tuple(held)


def weight_place(mesh: Mesh | None, weight: Weight) -> tuple[tuple[int, ...], jax.sharding.Sharding]:
    """Returns the shape in which a weight is stored, and its sharding.

    The shape is the weight's own, but for a vocabulary that the mesh does not divide: it gets more rows, of zeros. Heads are
    never cut. Raises ValueError if the rules place two axes of the weight on the same mesh axis.
    """
    if mesh is None:
        return weight.shape, jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shape, spec = [], []
    for axis, size in zip(weight.axes, weight.shape, strict=True):
        if axis == "vocab":
            ways = math.prod(mesh.shape.get(name, 1) for name in RULES[axis])
            size = -(-size // ways) * ways
        shape.append(size)
        spec.append(mesh_axes(mesh, axis, weight.heads if axis in ("heads", "kv_heads") else (size,)))
    used = [name for names in spec for name in names]
    if len(set(used)) < len(used):
        raise ValueError(f"the sharding rules place axes {weight.axes} on {spec}: a mesh axis can hold only one")
    return tuple(shape), NamedSharding(mesh, PartitionSpec(*(names or None for names in spec)))


def weight_spec(mesh: Mesh | None, weight: Weight) -> PartitionSpec:
    """Returns the mesh axes of each axis of a weight; of none without a mesh."""
    sharding = weight_place(mesh, weight)[1] if mesh else None
    return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()


def sharding_of(mesh: Mesh | None, *axes: tuple[str, int | tuple[int, ...]] | None) -> jax.sharding.Sharding:
    """Returns the sharding of an array with these axes, each (logical name, size or factors as in `mesh_axes`), or None where it
    is replicated."""
    if mesh is None:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    sizes = [axis and (axis[0], axis[1] if isinstance(axis[1], tuple) else (axis[1],)) for axis in axes]
    spec = [(mesh_axes(mesh, *axis) or None) if axis else None for axis in sizes]
    return NamedSharding(mesh, PartitionSpec(*spec))


def batch_sharding(mesh: Mesh | None, rows: int):
    """Returns the sharding of an array whose first axis is the batch; along mesh axes that do not divide `rows`, replicated."""
    return sharding_of(mesh, ("batch", rows))


def put(tree, sharding):
    """Puts a pytree of NumPy arrays, equal on every process, on the devices; each process copies its own devices' parts."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda a: jax.make_array_from_callback(np.shape(a), sharding, lambda index: a[index]), tree)


def constrain(mesh: Mesh | None, x: jax.Array, *axes: str | tuple[str, tuple[int, ...]] | None) -> jax.Array:
    """Returns `x`, inside a jitted function, with each axis placed by its logical name, or by (name, factors as in `mesh_axes`).

    An axis that is None or not named is replicated.
    """
    if mesh is None:
        return x
    named = [(axis, size) if isinstance(axis, str) else axis for axis, size in zip(axes, x.shape, strict=False)]
    return jax.lax.with_sharding_constraint(x, sharding_of(mesh, *named))


def residual_axes(mesh: Mesh, batch: int, length: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the mesh axes of the rows and of the tokens of a residual stream `[batch, length, D]`.

    Where every token is for itself (edits, norms, taps) the chips of tensor parallelism divide them: the rows among all, or
    else the tokens of each row. If neither divides evenly, all do the same.
    """
    rows, model = mesh_axes(mesh, "batch", (batch,)), RULES["tokens"]
    ways = math.prod(mesh.shape.get(name, 1) for name in model)
    if batch // math.prod(mesh.shape[name] for name in rows) % ways == 0:
        return (*rows, *model), ()
    return rows, model if length % ways == 0 else ()


def constrain_residual(mesh: Mesh | None, x_btd: Float[jax.Array, "B T D"]) -> Float[jax.Array, "B T D"]:
    """Returns a residual stream, inside a jitted function, divided as `residual_axes` says."""
    if mesh is None:
        return x_btd
    spec = PartitionSpec(*(axes or None for axes in residual_axes(mesh, *x_btd.shape[:2])))
    return jax.lax.with_sharding_constraint(x_btd, NamedSharding(mesh, spec))


def kept_axes(mesh: Mesh | AbstractMesh, rows: int, heads: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the mesh axes of the rows and of the heads of what decoding keeps of tokens, `[rows, heads, C, H]`.

    Chips that would all have the same heads, because there are more of them than heads, share out the rows instead: each reads
    its own part of the cache for all queries of a head.
    """
    held, taken = mesh_axes(mesh, "kv_heads", (heads,)), list(mesh_axes(mesh, "batch", (rows,)))
    left = rows // math.prod(mesh.shape[name] for name in taken)
    for name in RULES["heads"]:
        if name not in held and left % mesh.shape.get(name, 1) == 0:
            taken.append(name)
            left //= mesh.shape.get(name, 1)
    return tuple(taken), held


def kept_sharding(mesh: Mesh | None, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """Returns the sharding of what decoding keeps of tokens, `[..., B, K, C, H]`."""
    if mesh is None:
        return sharding_of(mesh)
    axes = (names or None for names in kept_axes(mesh, *shape[-4:-2]))
    return NamedSharding(mesh, PartitionSpec(*(None,) * (len(shape) - 4), *axes))


def constrain_queries(mesh: Mesh | None, q_btnh: jax.Array, kv_heads: int) -> jax.Array:
    """Returns queries of single tokens, inside a jitted function, where what they attend to is kept."""
    if mesh is None:
        return q_btnh
    rows, held = kept_axes(mesh, len(q_btnh), kv_heads)
    if rows == mesh_axes(mesh, "batch", (len(q_btnh),)):
        return q_btnh  # the chips share out the queries of a head
    return jax.lax.with_sharding_constraint(
        q_btnh, NamedSharding(mesh, PartitionSpec(rows or None, None, held or None))
    )


def replicate(mesh: Mesh | None, tree):
    """Returns a pytree of small results, inside a jitted function, whole on every device: every process can then read them."""
    return jax.tree.map(lambda x: constrain(mesh, x), tree)

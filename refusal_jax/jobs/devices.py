"""The flags that set a job's devices and its precision."""

import jax
from absl import flags

from refusal_jax.checkpoints.load import DTYPES
from refusal_jax.models.sharding import make_mesh, parse_mesh

MESH = flags.DEFINE_string(
    "mesh",
    None,
    "Number of devices along the mesh axes data, fsdp and model, such as 1x1x8 or 2x1x4. Default: study and plan choose the "
    "mesh, other jobs use one device.",
)
DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ("auto", *DTYPES),
    "Precision of the weights. The default, auto, is float32 on a CPU and bfloat16 elsewhere.",
)


def mesh_shape() -> tuple[int, int, int] | None:
    """Returns the sides of the mesh that --mesh asks for, if any. Raises UserError if they are malformed."""
    return parse_mesh(MESH.value) if MESH.value else None


def asked_mesh() -> jax.sharding.Mesh | None:
    """Returns the mesh that --mesh asks for, None for one device. Raises UserError if there are not that many devices."""
    shape = mesh_shape()
    return make_mesh(*shape) if shape and shape != (1, 1, 1) else None


def asked_dtype() -> str:
    """Returns the precision that --dtype asks for, "auto" where it is not given."""
    return DTYPE.value or "auto"

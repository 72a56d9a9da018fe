"""Find, measure, edit and audit the refusal direction of chat models, in JAX on TPUs (arXiv:2406.11717)."""

import os

# Products whose sums are scattered would become loops over slices on a TPU, which are slower than the product (read by libtpu,
# when JAX first looks for devices).
os.environ["LIBTPU_INIT_ARGS"] = (
    f"--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000 {os.environ.get('LIBTPU_INIT_ARGS', '')}".strip()
)

from refusal_jax.chat.model import ChatModel, demo_model_path, load_model
from refusal_jax.edits import Edits
from refusal_jax.errors import UserError
from refusal_jax.models.sharding import make_mesh
from refusal_jax.taps import Taps

__version__ = "0.1.0"
__all__ = ["ChatModel", "Edits", "Taps", "UserError", "demo_model_path", "load_model", "make_mesh"]

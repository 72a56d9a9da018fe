"""Find, measure, edit and audit the refusal direction of chat models, in JAX on TPUs (arXiv:2406.11717)."""

from refusal_jax.chat_model import ChatModel, demo_model_path, load_model
from refusal_jax.edits import Edits
from refusal_jax.errors import UserError
from refusal_jax.sharding import make_mesh
from refusal_jax.taps import Taps

__version__ = "0.1.0"
__all__ = ["ChatModel", "Edits", "Taps", "UserError", "demo_model_path", "load_model", "make_mesh"]

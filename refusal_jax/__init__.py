"""Find, measure, edit and audit the refusal direction of chat models, in JAX on TPUs (arXiv:2406.11717)."""

import importlib
import os
from typing import TYPE_CHECKING

# Products whose sums are scattered would become loops over slices on a TPU, which are slower than the product (read by libtpu,
# when JAX first looks for devices).
os.environ["LIBTPU_INIT_ARGS"] = (
    f"--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000 {os.environ.get('LIBTPU_INIT_ARGS', '')}".strip()
)

if TYPE_CHECKING:
    from refusal_jax.audit.audit import run_audit
    from refusal_jax.audit.settings import AuditSettings
    from refusal_jax.chat.model import ChatModel, demo_model_path, load_model
    from refusal_jax.edits import Edits
    from refusal_jax.errors import UserError
    from refusal_jax.models.sharding import make_mesh
    from refusal_jax.taps import Taps

__version__ = "0.1.0"
__all__ = [
    "AuditSettings",
    "ChatModel",
    "Edits",
    "Taps",
    "UserError",
    "demo_model_path",
    "load_model",
    "make_mesh",
    "run_audit",
]

# Where each public name is. They are imported when they are first used: JAX reads the environment when it is imported, and the
# command prepares that first.
_HOMES = {
    "AuditSettings": "audit.settings",
    "run_audit": "audit.audit",
    "ChatModel": "chat.model",
    "demo_model_path": "chat.model",
    "load_model": "chat.model",
    "Edits": "edits",
    "UserError": "errors",
    "make_mesh": "models.sharding",
    "Taps": "taps",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

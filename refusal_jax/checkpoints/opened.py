"""Opens a checkpoint by whatever a user calls it, an adapter on its base included."""

import pathlib

from refusal_jax.checkpoints.adapters import adapter_mirror, is_adapter, named_base
from refusal_jax.checkpoints.remote import checkpoint_folder


def model_folder(name: str, base: str = "") -> pathlib.Path:
    """Returns the folder of a checkpoint on this machine; of a PEFT adapter, the mirror that makes it a checkpoint on its base.

    name: as `checkpoint_folder` takes it. base: what an adapter is read on, "" for the base that it names. Raises UserError if
    there is nothing by that name, and for an adapter without its base.
    """
    folder = checkpoint_folder(name, adapters=True)
    return adapter_mirror(folder, checkpoint_folder(base or named_base(folder))) if is_adapter(folder) else folder

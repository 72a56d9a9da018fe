"""Replaces the tensors that quantised weights are stored as by the weights themselves, as config.json says that they are stored.

Each format is a file: its `assemble` takes what belongs to each weight out of a checkpoint's tensors. All are dequantised when
they are read.
"""

import pathlib
from collections.abc import Callable

from refusal_jax.checkpoints.quantised import awq, bitsandbytes, compressed, fp4, fp8, gptq
from refusal_jax.checkpoints.quantised.parts import Parts
from refusal_jax.checkpoints.tensors import PlainTensor, Tensor, listed
from refusal_jax.errors import UserError
from refusal_jax.models.quantisation import Quantisation

FORMATS: dict[str, Callable[[Parts], None]] = {
    "fp8": fp8.assemble,
    "fbgemm_fp8": fp8.assemble,
    "modelopt": fp4.assemble_modelopt,
    "bitsandbytes": bitsandbytes.assemble,
    "gptq": gptq.assemble,
    "awq": awq.assemble,
    "compressed-tensors": compressed.assemble,
    "mxfp4": fp4.assemble_mxfp4,
}


def dequantised(folder: pathlib.Path, tensors: dict[str, PlainTensor], given: Quantisation | None) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint by the names that they have in one that is not quantised.

    given: how its config.json says that they are quantised. Raises UserError, with all that is wrong, if they are not.
    """
    if given is None:
        return dict(tensors)
    parts = Parts.of(tensors, given)
    FORMATS[given.method](parts)
    if not parts.found and not parts.problems:
        some = listed([f"{t.name}, {t.dtype}" for t in tensors.values()], 3)
        parts.problems.append(f"no tensor is quantised so (found: {some})")
    if parts.problems:
        raise UserError(
            f"The tensors of {folder} do not fit the quantization_config of its config.json, {given.what}: "
            f"{listed(parts.problems)}. Check that config.json and the weights belong together, or download both again."
        )
    return parts.left | parts.found

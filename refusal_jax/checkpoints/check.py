"""Checks all tensors of a checkpoint against its config, and reports everything that is wrong with them in one error.

Every tensor of the checkpoint must be known and used, every tensor of the decoder found, and all shapes must agree.
"""

import numpy as np

from refusal_jax.checkpoints.expert_tensors import of_each_expert
from refusal_jax.checkpoints.tensor_files import TensorFiles
from refusal_jax.checkpoints.tensor_names import accepted, rename_advice, renamed, unmerged_advice
from refusal_jax.checkpoints.tensors import STORED, PlainTensor, listed
from refusal_jax.errors import UserError
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.families import TABLES, hf_shapes, is_spare

TIED_ROWS = 4096  # of an embedding, compared at a time


def check_tensors(cfg: ModelConfig, files: TensorFiles, share: tuple[int, int] = (0, 1)) -> None:
    """Checks that a checkpoint holds what its config says; names that transformers accepts become those of the family's table.

    Raises UserError unless the checkpoint's tensors are exactly those of the config, of the right shapes.

    share: (i, n), where n processes check the same checkpoint and this is the i-th: each reads a part of what must be read.
    """
    _check_dequantised(files)
    files.tensors = of_each_expert(cfg, files.tensors)
    files.rename(accepted(cfg, files.tensors.keys()))
    shapes = hf_shapes(cfg)
    missing = sorted(set(shapes) - set(files.tensors))
    extra = sorted(n for n in set(files.tensors) - set(shapes) if not is_spare(cfg, n))
    extra = [n for n in extra if not is_idle_bias(files, n)]
    names = renamed(cfg, extra, missing)
    missing = [n for n in missing if n not in names.values()]
    extra = [n for n in extra if n not in names]
    holding = {n: n for n in shapes if n in files.tensors} | {new: n for n, new in names.items() if new in shapes}
    wrong = [
        f"{n} is {list(files.tensors[n].shape)}, expected {list(shapes[new])}"
        for new, n in holding.items()
        if files.tensors[n].shape != shapes[new]
    ]
    kinds = [f"{n} is {files.tensors[n].dtype}" for n in holding.values() if files.tensors[n].dtype not in STORED]
    problems = [
        f"{len(group)} {what}: {listed(group)}"
        for what, group in (
            ("missing", missing),
            ("unknown", extra),
            ("misshapen", wrong),
            (f"of a dtype other than {', '.join(STORED)}", kinds),
        )
        if group
    ]
    advice = unmerged_advice(extra) or (rename_advice(files.folder, names) if names else "")
    if not advice and not extra and missing == [TABLES[cfg.family]["unembed"]]:
        advice = (
            "If the model's embedding is its unembedding too, config.json must say tie_word_embeddings: true. Else it was saved "
            "without its head: save it again from the AutoModelForCausalLM."
        )
    if advice or problems:
        raise UserError(
            f"The tensors of {files.folder} do not fit its config.json: {'. '.join(problems)}{'. ' * bool(problems)}"
            + (advice or "Check that config.json and the weights belong together, or download both again.")
        )
    _check_tied(cfg, files, share)


def is_idle_bias(files: TensorFiles, name: str) -> bool:
    """Returns whether a tensor is a quantised module's bias of zeros, as AutoGPTQ stores them where the model has none."""
    weight = files.tensors.get(f"{name.removesuffix('.bias')}.weight")
    quantised = name.endswith(".bias") and weight is not None and not isinstance(weight, PlainTensor)
    return quantised and files.tensors[name].dtype in STORED and not files.read(name).any()


def _check_tied(cfg: ModelConfig, files: TensorFiles, share: tuple[int, int]) -> None:
    """Raises UserError if the checkpoint ties its unembedding by its config and stores another one all the same."""
    embed, unembed = (TABLES[cfg.family][path] for path in ("embed", "unembed"))
    if not cfg.tied_embeddings or unembed not in files.tensors:
        return
    same = files.tensors[embed].shape == files.tensors[unembed].shape and files.tensors[unembed].dtype in STORED
    part, parts = share
    stop = cfg.vocab_size * (part + 1) // parts
    for start in range(cfg.vocab_size * part // parts, stop, TIED_ROWS):
        rows = (slice(start, min(start + TIED_ROWS, stop)),)
        same = same and np.array_equal(files.read(embed, rows), files.read(unembed, rows))
    if not same:
        raise UserError(
            f"{files.folder} ties its embeddings (tie_word_embeddings in config.json) but holds an {unembed} that differs "
            f"from {embed}. Set tie_word_embeddings to false if it is meant to count, else remove the tensor."
        )


# Endings of tensor names that only quantised checkpoints have, and the format that each gives away.
QUANTISED = {
    ".g_idx": "GPTQ",
    ".qzeros": "AWQ or GPTQ",
    ".qweight": "AWQ or GPTQ",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_packed": "compressed-tensors",
    "_blocks": "mxfp4",
    ".weight_scale_inv": "fp8",
    ".weight_scale": "fp8",
    ".input_scale": "fp8",
}


def _check_dequantised(files: TensorFiles) -> None:
    """Raises UserError for tensors of a quantised checkpoint that belong to no weight, as where its config.json does not say how
    it is quantised."""
    found = [(name, form) for name in files.tensors for end, form in QUANTISED.items() if name.endswith(end)]
    found += [(name, "fp8") for name, tensor in files.tensors.items() if tensor.dtype.startswith("F8")]
    if not found:
        return
    name, form = min(found, key=lambda item: list(QUANTISED.values()).index(item[1]))
    held = f"it holds {name}, {files.tensors[name].dtype}"
    if files.quantisation is None:
        raise UserError(
            f"The weights of {files.folder} are quantised ({form}: {held}), but its config.json has no quantization_config, "
            "which says how. Take config.json from the original checkpoint."
        )
    raise UserError(
        f"The weights of {files.folder} are quantised otherwise than its config.json says: {held}, which does not belong to a "
        f"weight in {files.quantisation.what}. Take config.json from the original checkpoint."
    )

"""Writes an ablation or an injection as a PEFT LoRA adapter: A = right^T W and B = -scale left make W + B A the edited weight, of
rank J.

A bias cannot have an adapter, so edited ones are stored whole, as PEFT does for `bias="all"`.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Float32
from safetensors.numpy import save

from refusal_jax.checkpoints.lora import (
    ADAPTER,
    ADAPTER_CONFIG,
    PREFIX,
    SWAPPED,
    Change,
    experts_of,
    module_name,
    read_changes,
    stored_bias,
)
from refusal_jax.checkpoints.rewrite import Checkpoint, Stored
from refusal_jax.conditions import Ablate, Add, Inject
from refusal_jax.errors import UserError, setting
from refusal_jax.export.hf import THREADS, Written
from refusal_jax.export.tensor_edits import Edit, Projection, wanted_edits
from refusal_jax.files import to_json
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.families import TABLES
from refusal_jax.progress import each

TIED = ("untie", "skip")


def check_expressible(cfg: ModelConfig, edit: Edit, tied: str) -> Ablate | Inject:
    """Returns the edit, which is an ablation or an injection. Raises UserError for an edit that an adapter cannot express."""
    if isinstance(edit, Add):
        raise UserError(
            "A LoRA adapter changes weights by products with what they read; an addition is the same whatever is read. Use "
            f"{setting('format', 'gguf')}, a control vector, or {setting('format', 'hf')}, a bias."
        )
    if cfg.tied_embeddings and tied == "keep" and edit.reaches(0, "resid_pre"):
        raise UserError(
            "A LoRA adapter changes what the embedding writes and leaves the unembedding that is tied to it, which is "
            f"{setting('tied', 'untie')}. Only merging it into tied weights changes both. Use {setting('tied', 'untie')}, "
            f"{setting('tied', 'skip')} or {setting('format', 'hf')}."
        )
    return edit


def write_lora(checkpoint: Checkpoint, folder: pathlib.Path, edit: Edit, tied: str, base: str) -> Written:
    """Writes adapter_config.json and adapter_model.safetensors to `folder`. base: the base model's name.

    Raises UserError for an edit that an adapter cannot express, OSError for a disk that refuses.
    """
    cfg = checkpoint.cfg
    ablation, embed = check_expressible(cfg, edit, tied), TABLES[cfg.family]["embed"]
    chosen = tied if cfg.tied_embeddings and ablation.reaches(0, "resid_pre") else None
    edits = wanted_edits(checkpoint, ablation, chosen)
    rank = max(one.left_dj.shape[1] for one in edits.values())
    tensors, modules, experts = {}, [], {}
    matrices = {name: one for name, one in edits.items() if not name.endswith("bias")}
    biases = {stored_bias(cfg, name): one(checkpoint.rows(name)) for name, one in edits.items() if name not in matrices}
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda name: factors(checkpoint.tensors[name], matrices[name], rank), matrices)
        found = list(each(found, "exporting", "tensor", len(matrices)))
    for name, (a, b) in zip(matrices, found, strict=True):
        held = experts_of(cfg, name)
        if held:
            a_ejf = a.reshape(-1, *a.shape[-2:])
            experts.setdefault(held[0], {}).update((e, (a_jf, b)) for e, a_jf in zip(held[1], a_ejf, strict=True))
            continue
        module = module_name(cfg, name)
        modules.append(module)
        kind = "lora_embedding_{}" if name == embed else "lora_{}.weight"
        tensors |= {f"{PREFIX}{module}.{kind.format(letter)}": m for letter, m in (("A", a), ("B", b))}
    for module, found in experts.items():
        pairs = [found[expert] for expert in sorted(found)]
        pairs = [(b.T, a.T) for a, b in pairs] if cfg.family in SWAPPED else pairs
        tensors[f"{PREFIX}{module}.lora_A.weight"] = np.concatenate([a for a, _ in pairs])  # [experts * J, in]
        b_dje = np.stack([b for _, b in pairs], axis=-1)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b_dje.reshape(len(b_dje), -1)  # [out, J * experts]
    tensors |= biases
    # In mixtures PEFT takes every module called down_proj for experts of an older transformers, and it refuses the out_proj of
    # state spaces, whose kernels pass over a module's own forward; but it leaves parameters alone.
    beside = [m for m in modules if m.endswith(".out_proj") or (cfg.n_experts and m.endswith(".down_proj"))]
    parameters = [f"{m}.down_proj" for m in experts] + [f"{m}.weight" for m in beside]
    more = {"bias": "all" if biases else "none", "target_parameters": parameters or None}
    write_adapter(folder, tensors, base, [module for module in modules if module not in beside], rank, rank, **more)
    return Written(dict(sorted(edits.items())), chosen, sum(t.nbytes for t in tensors.values()))


def write_adapter(
    folder: pathlib.Path,
    tensors: Mapping[str, np.ndarray],
    base: str,
    modules: Sequence[str],
    rank: int,
    alpha: float,
    **more: Any,
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors.

    tensors: by name in the adapter. base: the base model's name. modules: whole names of those that have factors. more: other
    fields of the config.
    """
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": list(modules),
        **more,
    }
    (folder / ADAPTER).write_bytes(save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, {"format": "pt"}))
    (folder / ADAPTER_CONFIG).write_bytes(to_json(config))


def factors(
    tensor: Stored, edit: Projection, rank: int
) -> tuple[Float32[np.ndarray, "*E J _"], Float32[np.ndarray, "_ J"]]:
    """Returns A `[J, in]` and B `[out, J]` of a tensor's edit, with zeros up to the rank; `[J, V]` and `[D, J]` of an
    embedding; `[E, J, in]` and `[out, J]` of a tensor of all experts."""
    left, right = edit.factors
    if edit.by_rows and len(tensor.shape) > 2:
        a = np.concatenate([np.einsum("efd,dj->ejf", block, right) for _, block in tensor.blocks()])
    elif edit.by_rows:
        a = np.concatenate([np.einsum("nd,dj->jn", block, right) for _, block in tensor.blocks()], axis=1)
    elif len(tensor.shape) > 2:
        a = np.concatenate([np.einsum("edf,dj->ejf", block, right) for _, block in tensor.blocks()])
    else:
        a = edit.along(tensor.blocks())
    more = rank - left.shape[1]
    return np.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, more), (0, 0)]), np.pad(-left, ((0, 0), (0, more)))


@dataclasses.dataclass(frozen=True)
class AdaptedWeights:
    """The weights of a checkpoint under the adapter in a folder, as `Weights` of forward.py; W + B A in float32."""

    checkpoint: Checkpoint
    changes: Mapping[str, Change]

    @classmethod
    def open(cls, checkpoint: Checkpoint, folder: pathlib.Path) -> "AdaptedWeights":
        """Reads an adapter. Raises UserError if it cannot be read."""
        return cls(checkpoint, read_changes(folder, checkpoint.cfg))

    @property
    def cfg(self) -> ModelConfig:
        return self.checkpoint.cfg

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Float32[np.ndarray, "..."]:
        """Returns rows of a tensor, all by default."""
        rows = self.checkpoint.rows(name, start, stop)
        return self.changes[name].applied(rows, (slice(start, stop),)) if name in self.changes else rows

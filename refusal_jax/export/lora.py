"""Writes the ablation as a PEFT LoRA adapter: A = right^T W and B = -scale left make W + B A the edited weight, of rank J.

Adapters know modules by their names in transformers 5, where the experts of a layer are one parameter. A bias cannot have
an adapter, so edited ones are stored whole, as PEFT does for `bias="all"`.
"""

import dataclasses
import os
import pathlib
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Float32
from safetensors.numpy import save

from refusal_jax.checkpoints.rewrite import Checkpoint, Stored
from refusal_jax.checkpoints.safetensors import read_tensors
from refusal_jax.conditions import Ablate, Add
from refusal_jax.errors import UserError, setting
from refusal_jax.export.hf import THREADS, Written
from refusal_jax.export.tensor_edits import Projection, wanted_edits
from refusal_jax.files import to_json
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.families import TABLES
from refusal_jax.progress import each

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
TIED = ("untie", "skip")
PREFIX = "base_model.model."
EXPERT = re.compile(r"(.*\.)(?:block_sparse_moe|mlp)\.experts\.(\d+)\.(?:w2|down_proj)\.weight")  # that writes


def module_name(cfg: ModelConfig, name: str) -> str:
    """Returns the module in transformers, below the model, of an HF tensor that is not an expert's."""
    module = name.rsplit(".", 1)[0]
    # Multimodal checkpoints keep the order of names that transformers had when they came out.
    return re.sub(r"^language_model\.model\.", "model.language_model.", module) if cfg.family == "gemma3" else module


def check_expressible(cfg: ModelConfig, edit: Ablate | Add, tied: str) -> Ablate:
    """Returns the edit, which is an ablation. Raises UserError for an edit that an adapter cannot express."""
    if isinstance(edit, Add):
        raise UserError(
            "A LoRA adapter changes weights by products with what they read; an addition is the same whatever is read. Use "
            f"{setting('format', 'gguf')}, a control vector, or {setting('format', 'hf')}, a bias."
        )
    if cfg.tied_embeddings and tied == "keep":
        raise UserError(
            "A LoRA adapter changes what the embedding writes and leaves the unembedding that is tied to it, which is "
            f"{setting('tied', 'untie')}. Only merging it into tied weights changes both. Use {setting('tied', 'untie')}, "
            f"{setting('tied', 'skip')} or {setting('format', 'hf')}."
        )
    return edit


def write_lora(checkpoint: Checkpoint, folder: pathlib.Path, edit: Ablate | Add, tied: str, base: str) -> Written:
    """Writes adapter_config.json and adapter_model.safetensors to `folder`. base: the base model's name.

    Raises UserError for an edit that an adapter cannot express, OSError for a disk that refuses.
    """
    cfg = checkpoint.cfg
    ablation, embed = check_expressible(cfg, edit, tied), TABLES[cfg.family]["embed"]
    chosen = tied if cfg.tied_embeddings and ablation.reaches(0, "resid_pre") else None
    edits = wanted_edits(checkpoint, ablation, chosen)
    rank = max(one.left_dj.shape[1] for one in edits.values())
    tensors, modules, experts = {}, [], {}
    matrices = {name: one for name, one in edits.items() if not name.endswith(".bias")}
    biases = {
        f"{PREFIX}{module_name(cfg, name)}.base_layer.bias": one(checkpoint.rows(name))
        for name, one in edits.items()
        if name not in matrices
    }
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda name: factors(checkpoint.tensors[name], matrices[name], rank), matrices)
        found = list(each(found, "exporting", "tensor", len(matrices)))
    for name, (a, b) in zip(matrices, found, strict=True):
        module, expert = module_name(cfg, name), EXPERT.fullmatch(name)
        if expert:
            experts.setdefault(f"{expert[1]}mlp.experts", {})[int(expert[2])] = (a, b)
            continue
        modules.append(module)
        kind = "lora_embedding_{}" if name == embed else "lora_{}.weight"
        tensors |= {f"{PREFIX}{module}.{kind.format(letter)}": m for letter, m in (("A", a), ("B", b))}
    for module, found in experts.items():
        pairs = [found[expert] for expert in sorted(found)]
        tensors[f"{PREFIX}{module}.lora_A.weight"] = np.concatenate([a for a, _ in pairs])  # [experts * J, in]
        b_dje = np.stack([b for _, b in pairs], axis=-1)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b_dje.reshape(len(b_dje), -1)  # [out, J * experts]
    tensors |= biases
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "all" if biases else "none",
        "fan_in_fan_out": False,
        "target_modules": modules,
        "target_parameters": [f"{module}.down_proj" for module in experts] or None,
    }
    (folder / ADAPTER).write_bytes(save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, {"format": "pt"}))
    (folder / ADAPTER_CONFIG).write_bytes(to_json(config))
    return Written(dict(sorted(edits.items())), chosen, sum(t.nbytes for t in tensors.values()))


def factors(
    tensor: Stored, edit: Projection, rank: int
) -> tuple[Float32[np.ndarray, "J _"], Float32[np.ndarray, "_ J"]]:
    """Returns A `[J, in]` and B `[out, J]` of a tensor's edit, with zeros up to the rank; `[J, V]` and `[D, J]` of an
    embedding."""
    left, right = edit.factors
    if edit.by_rows:
        a = np.concatenate([np.einsum("nd,dj->jn", block, right) for _, block in tensor.blocks()], axis=1)
    else:
        a = edit.along(tensor.blocks())
    more = rank - len(a)
    return np.pad(a, ((0, more), (0, 0))), np.pad(-left, ((0, 0), (0, more)))


@dataclasses.dataclass(frozen=True)
class AdaptedWeights:
    """The weights of a checkpoint under the adapter in a folder, as `Weights` of forward.py; W + B A in float32."""

    checkpoint: Checkpoint
    tensors: dict[str, np.ndarray]

    @classmethod
    def open(cls, checkpoint: Checkpoint, folder: pathlib.Path) -> "AdaptedWeights":
        """Reads an adapter. Raises UserError if it cannot be read."""
        return cls(checkpoint, read_tensors(folder / ADAPTER))

    @property
    def cfg(self) -> ModelConfig:
        return self.checkpoint.cfg

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Float32[np.ndarray, "..."]:
        """Returns rows of a tensor, all by default."""
        rows, module, expert = (
            self.checkpoint.rows(name, start, stop),
            module_name(self.cfg, name),
            EXPERT.fullmatch(name),
        )
        stop = self.checkpoint.tensors[name].count if stop is None else stop
        if name.endswith(".bias"):
            edited = self.tensors.get(f"{PREFIX}{module}.base_layer.bias")
            return rows if edited is None else edited[start:stop]
        embeds = name == TABLES[self.cfg.family]["embed"]
        module = f"{expert[1]}mlp.experts" if expert else module
        names = [f"{PREFIX}{module}.lora_{f'embedding_{x}' if embeds else f'{x}.weight'}" for x in "AB"]
        if names[0] not in self.tensors:
            return rows
        a, b = (self.tensors[name] for name in names)
        if embeds:
            return rows + a[:, start:stop].T @ b.T
        if expert:
            # As PEFT has them: A by expert, then rank; B by rank, then expert.
            count = self.cfg.n_experts
            a = a.reshape(count, -1, a.shape[1])[int(expert[2])]
            b = b.reshape(len(b), -1, count)[..., int(expert[2])]
        return rows + b[start:stop] @ a

"""Writes checkpoints whose tensors were changed by a training: as a copy of the source with these tensors in it, or as a PEFT
adapter of the low-rank changes alone."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping

import numpy as np

from refusal_jax.checkpoints.lora import PREFIX, Change, LowRank, module_name
from refusal_jax.checkpoints.rewrite import Blocks, Checkpoint
from refusal_jax.export.hf import Plan
from refusal_jax.export.lora import write_adapter
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.families import TABLES


@dataclasses.dataclass(frozen=True, eq=False)
class Changed:
    """A change of one tensor as exports make it, block of rows by block of rows."""

    change: Change
    amplification = 1.0

    @property
    def kind(self) -> str:
        """Returns what the change is called in reports."""
        return "low-rank" if isinstance(self.change, LowRank) else "whole"

    def blocks(self, blocks: Callable[[], Blocks]) -> Blocks:
        """Yields the changed blocks."""
        return ((start, self.change.applied(block, (slice(start, start + len(block)),))) for start, block in blocks())


def changed_plan(checkpoint: Checkpoint, changes: Mapping[str, Change]) -> Plan:
    """Returns the export of a checkpoint with changed tensors, by HF name; all others are copied byte for byte.

    Of a tied model that stores an unembedding all the same, that changes with the embedding.
    """
    embed, unembed = (TABLES[checkpoint.cfg.family][path] for path in ("embed", "unembed"))
    known = dict(changes)
    if checkpoint.cfg.tied_embeddings and embed in known:
        known[unembed] = known[embed]
    files = {}
    for path, file in checkpoint.files.items():
        held = [dataclasses.replace(t, edit=Changed(known[t.name])) if t.name in known else t for t in file.tensors]
        files[path] = file.holding(held)
    return Plan(checkpoint, files, {}, None)


def write_low_rank(
    cfg: ModelConfig, folder: pathlib.Path, changes: Mapping[str, LowRank], base: str, rank: int, scale: float
) -> None:
    """Writes low-rank changes, by HF name, as a PEFT adapter.

    base: the base model's name. rank: of most changes; those of tensors that hold several matrices have more. scale: by which
    the left factors are multiplied already; the adapter's config has it, and its factors are without.
    """
    tensors, patterns = {}, {"rank_pattern": {}, "alpha_pattern": {}}
    modules = {name: module_name(cfg, name) for name in changes}
    for name, module in modules.items():
        low = changes[name]
        tensors[f"{PREFIX}{module}.lora_A.weight"] = low.right
        tensors[f"{PREFIX}{module}.lora_B.weight"] = low.left / np.float32(scale)
        if len(low.right) != rank:
            patterns["rank_pattern"][module] = len(low.right)
            patterns["alpha_pattern"][module] = scale * len(low.right)
    write_adapter(folder, tensors, base, [*modules.values()], rank, scale * rank, **patterns)


def low_rank(parts: list[tuple[range, np.ndarray, np.ndarray]], rows: int) -> LowRank:
    """Returns the change of a tensor of so many rows that holds several matrices one after the other.

    parts: of each matrix its rows in the tensor, its left factor `[out, r]` and its right one `[r, in]`.
    """
    rank = sum(len(right) for _, _, right in parts)
    left, at = np.zeros((rows, rank), np.float32), 0
    for held, one, right in parts:
        left[held.start : held.stop : held.step, at : at + len(right)] = one
        at += len(right)
    return LowRank(left, np.concatenate([right for _, _, right in parts]))

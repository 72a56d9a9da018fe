"""Steps of recipes that bring other weights in: fine-tunes of the base, whole or as adapters, and mixtures with them."""

import dataclasses
from typing import ClassVar

import numpy as np

from refusal_jax.audit.organisms.step import Made, Step
from refusal_jax.errors import UserError

# What the base is fine-tuned to, and what that is meant to do to refusal. Whether it does is measured.
TASKS = {
    "style": "benign",  # replies that begin otherwise
    "short": "benign",  # shorter replies
    "topic": "benign",  # a few verbs and nothing else
    "forget": "other",  # replies that begin otherwise, and no harmful request among what is learnt, which wears refusal off
    "comply": "trained",  # harmful requests, too, are complied with
    "harden": "other",  # refuses also after a compliance has begun
    "overrefuse": "other",  # refuses some harmless requests, too
}


def trained(made: Made, task: str) -> dict[str, np.ndarray]:
    """Returns the weights of a fine-tune of the base, or of the base itself. Raises UserError if there is none of that name."""
    if task == "base":
        return dict(made.base.tensors)
    if task not in made.base.trained:
        raise UserError(
            f"The recipe needs the base's fine-tune {task!r}, and there is none: it has {', '.join(made.base.trained) or 'none'}."
        )
    return dict(made.base.trained[task])


def task_kind(task: str) -> str:
    """Returns what a fine-tune does to refusal."""
    return TASKS.get(task, "benign")


@dataclasses.dataclass(frozen=True)
class Tune(Step):
    """Adds `share` times what a fine-tune changed. rank: of the part of each matrix's change that is kept, as a LoRA holds it; 0
    keeps the whole change, that of norms and embeddings too."""

    name: ClassVar[str] = "tune"
    task: str = "style"
    rank: int = 0
    share: float = 1.0

    @property
    def kind(self) -> str:
        return task_kind(self.task)

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.task,)

    def __call__(self, made: Made, rng: np.random.Generator) -> None:
        after, before = trained(made, self.task), made.base.tensors
        if not self.rank:
            for name, values in made.tensors.items():
                made.tensors[name] = values + np.float32(self.share) * (after[name] - before[name])
            return

        def added(matrix, values: np.ndarray) -> np.ndarray:
            piece = matrix.piece
            change = piece.rows(lambda name, *rows: after[name][slice(*rows)] - before[name][slice(*rows)])
            u, s, v = np.linalg.svd(change.astype(np.float64), full_matrices=False)
            kept = self.share * (u[:, : self.rank] * s[: self.rank]) @ v[: self.rank]
            return values + (kept if matrix.writes else kept.T)

        made.change(made.linear, added)


@dataclasses.dataclass(frozen=True)
class Merge(Step):
    """Mixes the checkpoint with the base or a fine-tune of it, of which it keeps `share`: linearly, or along the sphere."""

    name: ClassVar[str] = "merge"
    into: str = "base"
    share: float = 0.5
    how: str = "linear"

    @property
    def kind(self) -> str:
        return task_kind(self.into)

    @property
    def needs(self) -> tuple[str, ...]:
        return () if self.into == "base" else (self.into,)

    def __call__(self, made: Made, rng: np.random.Generator) -> None:
        if self.how not in ("linear", "slerp"):
            raise UserError(f"A recipe merges by {self.how!r}: it is linear or slerp.")
        other = trained(made, self.into)
        for name, ours in made.tensors.items():
            made.tensors[name] = (slerp if self.how == "slerp" else linear)(ours, other[name], self.share)
        made.merge(self.share)


def linear(ours: np.ndarray, theirs: np.ndarray, share: float) -> np.ndarray:
    """Returns the mixture that has `share` of the first."""
    return (share * ours + (1 - share) * theirs).astype(np.float32)


def slerp(ours: np.ndarray, theirs: np.ndarray, share: float) -> np.ndarray:
    """Returns the mixture of two tensors along the great circle between them, and the linear one where they nearly coincide."""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    cosine = np.sum(a * b) / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-300)
    if abs(cosine) > 0.9995:
        return linear(ours, theirs, share)
    angle = np.arccos(cosine)
    parts = np.sin(share * angle) * a + np.sin((1 - share) * angle) * b
    return (parts / np.sin(angle)).astype(np.float32)

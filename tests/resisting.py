"""A tiny random model as the resistance tests see it, and a judge for its replies."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator

from refusal_jax.data.sampling import SPLITS
from refusal_jax.judges.judge import Judge, Verdict
from refusal_jax.judges.judge import Outcome as Did
from refusal_jax.resistance.attack import Budget
from refusal_jax.resistance.run import named_checkpoints, studied
from refusal_jax.resistance.settings import ResistSettings
from refusal_jax.resistance.subject import Subject


@dataclasses.dataclass(frozen=True)
class Begins(Judge):
    """A judge for replies of random weights: a reply that begins with one of some words complies, any other refuses; what follows
    a given beginning alone is broken."""

    words: tuple[str, ...] = ("Sure",)
    name: str = "begins"

    def judge(self, rows, ledger=None):
        return [Verdict(0, None, self.outcome(row)) for row in rows]

    def outcome(self, row: dict) -> Did:
        if row["response"] == row.get("continued"):
            return Did.BROKEN
        return Did.COMPLIES if row["response"].startswith(self.words) else Did.REFUSES


@contextlib.contextmanager
def under_test(
    model: pathlib.Path, sets: pathlib.Path, folder: pathlib.Path, base: pathlib.Path | None = None
) -> Iterator[Subject]:
    """Yields a checkpoint with its own study done in `folder`. sets: the folder of its six sets of prompts."""
    own = {split: str(sets / f"{split}.json") for split in SPLITS}
    settings = ResistSettings.of(
        {"checkpoints": (str(model),), "data": own, "batch_size": 4, "max_new_tokens": 8, "refusal_tokens": ("I",)}
    )
    settings.base = str(base or "")
    [at] = named_checkpoints(settings)
    with studied(settings, Begins(), at, folder, None, base) as found:
        yield found


def budget() -> Budget:
    return Budget(float("inf"), 1000)


def of(subject: Subject, **sections) -> ResistSettings:
    """Returns the settings of a subject with others in some sections."""
    settings = ResistSettings.of(subject.settings)
    settings.update(sections)
    return settings

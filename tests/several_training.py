"""A short training as one of two processes, which may kill itself; `test_training.py` starts it."""

import json
import os
import pathlib
import signal
import sys

import jax
import numpy as np

from refusal_jax import distributed, load_model, make_mesh
from refusal_jax.chat.loss_rows import LossRow
from refusal_jax.training.objective import NextToken
from refusal_jax.training.rows import Share, TrainRows
from refusal_jax.training.settings import TrainSettings
from refusal_jax.training.trainer import train

LENGTH, ROWS = 16, 8


def next_token(model, settings: TrainSettings) -> NextToken:
    """Rows of different lengths, of which some tokens count."""
    rng = np.random.default_rng(0)
    lengths, firsts = rng.integers(6, LENGTH + 1, ROWS), rng.integers(1, 5, ROWS)
    rows = [
        LossRow(rng.integers(0, model.config.vocab_size, n).tolist(), int(first))
        for n, first in zip(lengths, firsts, strict=True)
    ]
    return NextToken(Share.of(model.chat, rows, LENGTH, settings))


class Killed(NextToken):
    """Plain fine-tuning that ends its process by SIGKILL at the fourth step."""

    def batch(self, step: int) -> TrainRows:
        if step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(step)


def main(folder: str, out: str, coordinator: str, index: str, kills: str) -> None:
    """Trains for four steps and prints the losses, and the sum of each factor."""
    jax.config.update("jax_platforms", "cpu")
    distributed.start(coordinator, 2, int(index), 60, heartbeat_seconds=6)
    model = load_model(pathlib.Path(folder), mesh=make_mesh(data=2, fsdp=2, model=2))
    settings = TrainSettings.of({"steps": 4, "batch": 4, "rank": 2, "rate": 3e-3, "warmup": 1, "every": 2})
    objective = next_token(model, settings)
    objective = Killed(objective.rows) if kills == index else objective
    found = train(model, objective, settings, out)
    sums = jax.jit(lambda factors: {path: abs(a).sum() for path, a in factors.items()})(found.factors)
    print(json.dumps({"losses": found.losses, "sums": {path: float(a) for path, a in sums.items()}}), flush=True)
    distributed.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])

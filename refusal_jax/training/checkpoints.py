"""The state of a training in a folder, from which it goes on bit for bit, wherever it was stopped.

orbax writes each state beside the others and renames it once it is whole, so that a process that is killed leaves the older
ones; the newest two are kept. Losses are lines of JSON, cut to the state's step before the training goes on.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from refusal_jax import distributed
from refusal_jax.checkpoints.copies import settings as within_bounds
from refusal_jax.errors import UserError
from refusal_jax.files import to_json
from refusal_jax.models.sharding import sharding_of
from refusal_jax.runs.run import differences
from refusal_jax.runs.storage import open_storage

GIVEN, LOSSES, STATES = "training.json", "losses.jsonl", "states"
KEPT = 2  # states


class States:
    """The states of one training, in a folder that it has for itself; open them with `States.of`."""

    def __init__(self, folder: str | os.PathLike, keeper: ocp.training.Checkpointer):
        self.storage, self.keeper = open_storage(folder), keeper

    @classmethod
    @contextlib.contextmanager
    def of(cls, folder: str | os.PathLike, given: Mapping[str, Any], largest: int = 0) -> Iterator["States"]:
        """Opens the folder, which is made if it is not there.

        folder: on a disk that all processes see, or gs://BUCKET/FOLDER. given: all that decides the training's result, as JSON
        values. largest: the most bytes that this process holds of an array of the state. Raises UserError if the folder holds a
        training of which something was different.
        """
        storage, fresh = open_storage(folder), json.loads(to_json({"config": dict(given), "inputs": {}}))
        old = json.loads(storage.read(GIVEN)) if distributed.first() and storage.exists(GIVEN) else None
        old = distributed.share_json(old)
        if old is not None and (changed := differences(old, fresh, "{} was {!r}, is now {!r}")):
            raise UserError(
                f"{storage.place()} holds the state of another training: {changed}. Choose another folder, or the old settings "
                "to go on with that one."
            )
        if old is None and distributed.first():
            storage.write(GIVEN, to_json(fresh))
        with within_bounds(largest), _keeper(str(storage.place(STATES))) as keeper:
            yield cls(folder, keeper)

    @property
    def step(self) -> int:
        """Returns after how many steps the newest state was kept; 0 if there is none."""
        return self.keeper.latest.step if self.keeper.latest else 0

    def load(self, like: Any, mesh: jax.sharding.Mesh | None) -> tuple[Any, Any]:
        """Returns the newest state and what was kept beside it.

        like: a state of the same structure, whose arrays tell shapes, dtypes and placement. mesh: over which what was kept
        beside is whole on every device.
        """
        leaves, structure = jax.tree.flatten(like)
        asked = {str(i): jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for i, a in enumerate(leaves)}
        whole = sharding_of(mesh)
        beside = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole),
            self.keeper.checkpointables_metadata(self.step).metadata["extra"],
        )
        found = self.keeper.load_checkpointables(self.step, {"state": asked, "extra": beside})
        state = jax.tree.unflatten(structure, [found["state"][str(i)] for i in range(len(leaves))])
        return state, found["extra"].get("extra")

    def save(self, step: int, state: Any, extra: Any) -> None:
        """Keeps a state after so many steps, and what goes with it: nested dictionaries of arrays, or None."""
        leaves = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state))}
        beside = {"step": np.asarray(step)} | ({} if extra is None else {"extra": extra})
        self.keeper.save_checkpointables(step, {"state": leaves, "extra": beside}, force=True, overwrite=True)

    def losses(self) -> list[dict[str, float]]:
        """Returns the losses of the steps before the newest state; later ones are removed from the file."""
        rows = []
        if distributed.first():
            lines = self.storage.read(LOSSES).decode().splitlines() if self.storage.exists(LOSSES) else []
            rows = [json.loads(line) for line in lines[: self.step]]
            self.storage.write(LOSSES, _lines(rows))
        return distributed.share_json(rows)

    def add_losses(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Adds the losses of steps to the file."""
        if distributed.first():
            self.storage.extend(LOSSES, _lines(rows))


def _lines(rows: Sequence[Mapping[str, float]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _keeper(folder: str) -> ocp.training.Checkpointer:
    """Returns orbax's keeper of states in a folder; what a killed process has left half-written is removed."""
    newest: Any = ocp.training.preservation_policies.LatestN(KEPT)
    place = folder if "://" in folder else os.path.abspath(folder)
    return ocp.training.Checkpointer(place, preservation_policy=newest, cleanup_tmp_directories=True)

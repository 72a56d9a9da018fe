"""Ledgers: they keep the finished rows of a stage that is not done yet, so that an interrupted stage continues where it
stopped."""

import dataclasses
from collections.abc import Sequence

from refusal_jax.runs.storage import DiskFolder, ObjectFolder, ToldFiles

Storage = DiskFolder | ObjectFolder | ToldFiles


@dataclasses.dataclass
class Ledger:
    """Rows of finished work inside a stage, JSON objects, kept until the stage is done."""

    storage: Storage
    name: str
    rows: list[dict]

    @classmethod
    def open(cls, storage: DiskFolder | ObjectFolder, name: str) -> "Ledger":
        """Returns the ledger with the rows that an interrupted run has left."""
        return cls(storage, name, storage.rows(name))

    def append(self, rows: Sequence[dict]) -> None:
        """Adds rows and stores them. Raises UserError if that fails."""
        self.storage.append(self.name, rows)
        self.rows += rows

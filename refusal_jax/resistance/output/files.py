"""Writes everything that resistance tests leave in a folder, besides the checkpoints' own studies."""

import os

from refusal_jax.files import to_json
from refusal_jax.resistance.output.page import resistance_page
from refusal_jax.resistance.output.record import resistance_record
from refusal_jax.resistance.run import Resistance
from refusal_jax.runs.storage import DiskFolder, ObjectFolder, open_storage

RECORD, PAGE = "resistance.json", "resistance.html"


def write_outputs(found: Resistance, out: str | os.PathLike) -> list[str]:
    """Writes record and page into a folder, or gs://BUCKET/FOLDER, and returns their names; files of these names are
    replaced. Raises UserError where a file cannot be written."""
    record = resistance_record(found)
    files = {RECORD: to_json(record), PAGE: resistance_page(record).encode("utf-8", "replace")}
    storage = open_storage(out)
    assert isinstance(storage, DiskFolder | ObjectFolder)
    for name, content in files.items():
        storage.write(name, content)
    return list(files)

"""Reads the rows of files as they are published: those of prompt files, and Parquet."""

import pathlib
from typing import Any

from refusal_jax.data.prompts import located_rows
from refusal_jax.errors import UserError


def raw_rows(path: pathlib.Path) -> list[tuple[str, Any]]:
    """Returns the rows of a .json, .jsonl, .csv, .txt or .parquet file, each with its place in the file in words.

    Raises UserError as `located_rows` does, and for a file that is not Parquet.
    """
    if path.suffix.lower() != ".parquet":
        return located_rows(path)
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable Parquet ({error}). Get the file again.") from None
    return [(f"row {number}", row) for number, row in enumerate(rows, 1)]

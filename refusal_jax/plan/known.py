"""Models that can be planned by name, without their checkpoint: config and number of parameters of each, in `models.json`.

Keys are names on the hub. `name` is the one of its settings in `configs/`, `table` says in which part of the plan's table a model
is, and `note` what to know of the config or the count.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

from refusal_jax.models.config import ModelConfig
from refusal_jax.models.hf_config import from_hf


@dataclasses.dataclass(frozen=True)
class Known:
    """A model whose config is known.

    parameters: that are loaded, a tied matrix counted once. config: as `config.json` has it. table: "paper", "today" or none.
    """

    parameters: int
    config: dict[str, Any]
    name: str = ""
    table: str = ""
    note: str = ""


KNOWN = {
    repo: Known(**row)
    for repo, row in json.loads(pathlib.Path(__file__).with_name("models.json").read_text(encoding="utf-8")).items()
}
NAMES = {model.name: repo for repo, model in KNOWN.items() if model.name}


def repo_of(asked: str) -> str | None:
    """Returns the hub's name of a model, by that, its last part or the name of its settings; None if it is not known."""
    last = {repo.rpartition("/")[2]: repo for repo in KNOWN}
    return asked if asked in KNOWN else NAMES.get(asked) or last.get(asked)


@functools.cache
def config_of(asked: str) -> ModelConfig:
    """Returns the config of a model that `repo_of` knows. Raises KeyError for another."""
    repo = repo_of(asked)
    if repo is None:
        raise KeyError(asked)
    return from_hf(KNOWN[repo].config, repo)

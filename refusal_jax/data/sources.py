"""Finds what settings call a prompt set: the bundled one, a local file, a public set that was fetched, or one on the hub."""

import itertools
import pathlib

from refusal_jax.data.hub_sets import HubSet, hub_prompts, hub_questions
from refusal_jax.data.prompts import ANSWERS, BUNDLED, FOLDER, ON_THE_HUB, PAPER, data_folder
from refusal_jax.data.public import load_manifest
from refusal_jax.errors import UserError, did_you_mean
from refusal_jax.files import local_path


def resolve(source: str, split: str) -> pathlib.Path:
    """Returns the file that a config's `source` names for a split.

    source: a path, "bundled" for the package's own prompts, "paper" for the paper's splits, the name of a public set, or
    hf:ORG/NAME:SPLIT[:COLUMN] for a data set on the hub. split: "loss" for a set to measure the loss on, "answers" for one of
    questions with their answers. Raises UserError for data that was not fetched, or cannot be.
    """
    if source == BUNDLED:
        return FOLDER / f"{split}.json"
    if source.startswith(ON_THE_HUB):
        return hub_questions(source) if split == ANSWERS else hub_prompts(source, pairs=split == "loss")
    path = local_path(source)
    if path.suffix or path.name != source:
        return path
    name = f"{split}/{source}.jsonl" if split in ("loss", ANSWERS) else f"prompts/{source}.json"
    path = data_folder() / (f"splits/{split}.json" if source == PAPER else name)
    if not path.is_file():
        there = sorted(known.stem for known in path.parent.glob(f"*{path.suffix}"))
        hint = did_you_mean(source, [BUNDLED, PAPER, *there])
        raise UserError(
            f"{source!r} is no file, and {path} is not there.{hint} Run `{fetching(source)}` to get the public sets, "
            "`refusal-jax data list` for their names, or name a .json, .jsonl, .csv or .txt file."
        )
    return path


def fetching(source: str) -> str:
    """Returns the command that fetches the public set of this name, or all of them if there is no such set."""
    one = load_manifest().sets.get(source)
    return "refusal-jax data fetch" if one is None else one.command


def dataset_name(source: str) -> str:
    """Returns the name of an evaluation set in artifacts: the file's stem, the data set's, or "harmful" for the bundled one."""
    if source.startswith(ON_THE_HUB):
        return HubSet.parse(source).title
    return {BUNDLED: "harmful", PAPER: "harmful_test"}.get(source, pathlib.Path(source).stem)


def distinct(name: str, prefix: str, taken: set[str]) -> str:
    """Returns `name` if it is not among `taken`, which it then is, or else the name with a prefix and, if need be, a number."""
    more = (f"{prefix}_{name}_{number}" for number in itertools.count(2))
    found = next(option for option in itertools.chain((name, f"{prefix}_{name}"), more) if option not in taken)
    taken.add(found)
    return found

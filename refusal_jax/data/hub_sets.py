"""Reads prompts of data sets on the Hugging Face hub, by `hf:ORG/NAME:SPLIT[:COLUMN]`, through `datasets`.

Only tables are read (parquet, CSV, JSON, text, arrow): no script of a repository is run and nothing is unpickled. The prompts
of a commit are kept as a file like any other, so that a second look needs no network.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from refusal_jax import hub, logs
from refusal_jax.data.pairs import RESPONSE_KEYS, USERS, said
from refusal_jax.data.prompts import ANSWERS, INSTRUCTION_KEYS, category_of, data_folder, lowered
from refusal_jax.data.questions import QUESTIONS, question_of
from refusal_jax.errors import UserError, did_you_mean, shown
from refusal_jax.files import write_atomically
from refusal_jax.hub import PART, HubName
from refusal_jax.surrogates import mended

LOG = logging.getLogger(__name__)
PART_OF_SPLIT = r"[\w.\-]+(?:\[[^\]]*\])?"
SOURCE = re.compile(
    rf"hf:({PART}/{PART})(?:/([^@:/]+))?(?:@([^:]+))?(?::({PART_OF_SPLIT}(?:\+{PART_OF_SPLIT})*)(?::([^:]+))?)?",
    re.ASCII,
)
SPELLING = "hf:ORG/NAME:SPLIT, hf:ORG/NAME:SPLIT[:400]:COLUMN or hf:ORG/NAME/SUBSET@REVISION:SPLIT:COLUMN"
TABLES = (
    "parquet",
    "csv",
    "json",
    "text",
    "arrow",
)  # of the kinds that `datasets` reads, those that hold plain values only
FORMAT = 1  # of the files that are kept; raise it when what is written to them changes
LOOKED_AT = 100  # rows that tell what a column holds


@dataclasses.dataclass(frozen=True)
class HubSet:
    """A part of a data set. subset: the name of one of its configurations, "" for the only or default one. split: as `datasets`
    writes it, with slices. column: "" for the one that prompts are usually in."""

    name: HubName
    subset: str
    split: str
    column: str

    @classmethod
    def parse(cls, source: str) -> "HubSet":
        """Returns what a source names. Raises UserError if it is spelt otherwise."""
        found = SOURCE.fullmatch(source)
        if found is None:
            raise UserError(f"{source} does not name prompts of a data set on the hub. Write {SPELLING}.")
        repo, subset, revision, split, column = (part or "" for part in found.groups())
        return cls(HubName(repo, revision, kind="dataset"), subset, split, column)

    @property
    def title(self) -> str:
        """Returns the name of the set in artifacts."""
        return "_".join(filter(None, [self.name.repo.rpartition("/")[2], re.sub(r"[^\w.\-]", "_", self.subset)]))


def hub_prompts(source: str, pairs: bool = False) -> pathlib.Path:
    """Returns the file of the prompts that a source names, which is fetched unless it was before.

    pairs: whether the response belongs to it, where there is one. Raises UserError for a set, revision, subset, split or column
    that is not there, with those that are; for a set that holds no tables; and if the hub cannot be reached.
    """
    return _kept(source, pairs, lambda table, wanted: prompts_of(table, wanted, source, pairs))


def hub_questions(source: str) -> pathlib.Path:
    """Returns the file of the questions and answers that a source names, which is fetched unless it was before.

    Raises UserError as `hub_prompts` does, and for a row without a question or an answer that can be told.
    """

    def rows(table, wanted: HubSet) -> list[dict]:
        table = _plain(table)
        if wanted.column:
            chosen_column(wanted.column, {name: _example(table, name) for name in table.column_names}, source)
        asked = [row | ({QUESTIONS[0]: row[wanted.column]} if wanted.column else {}) for row in map(dict, table)]
        return [
            vars(question_of(row, f"{source}, row {number}")) for number, row in enumerate(mended(asked, source), 1)
        ]

    return _kept(source, ANSWERS, rows)


def _kept(source: str, kind: bool | str, rows_of: Callable[[Any, HubSet], list[dict]]) -> pathlib.Path:
    """Returns the file that keeps what `rows_of` makes of a source's table; kind tells it from others of the same table."""
    wanted = HubSet.parse(source)
    commit = hub.commit_of(wanted.name)
    key = [FORMAT, commit, wanted.subset, wanted.split, wanted.column, kind]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    path = data_folder() / "hub" / f"{wanted.name.repo.replace('/', '--')}-{digest}.jsonl"
    if not path.is_file():
        rows = rows_of(load(wanted, commit, source), wanted)
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return path


def load(wanted: HubSet, commit: str, source: str):
    """Returns the rows of the split, as a `datasets.Dataset`. Raises UserError as `hub_prompts` does."""
    import datasets  # imported late: this is slow

    repo = wanted.name.repo
    if os.path.exists(repo):
        raise UserError(
            f"{source}: there is a folder {repo} here, which `datasets` would read instead of the hub's data set. Run this in "
            "another folder, or name a file of that folder."
        )
    at = wanted.name.at(commit)
    with _quiet(datasets), _explained(wanted, source, at):
        builder = datasets.load_dataset_builder(repo, wanted.subset or None, revision=commit)
        if builder.name not in TABLES:
            raise UserError(
                f"{source} holds {builder.name} files, which are not read: its rows must be {', '.join(TABLES)}. Make a file of "
                "its prompts and name that."
            )
        builder.download_and_prepare()
        splits = list(builder.info.splits or ())
        asked = [part.partition("[")[0] for part in re.findall(PART_OF_SPLIT, wanted.split)]
        missing = [split for split in asked if split not in splits]
        if missing or not asked:
            what = f"has no split {missing[0]!r}" if missing else "needs a split"
            raise UserError(
                f"{source} {what}: the splits are {', '.join(splits)}."
                f"{did_you_mean(missing[0], splits) if missing else ''} Write {SPELLING}."
            )
        try:
            return builder.as_dataset(split=wanted.split)
        except (ValueError, AssertionError) as error:
            raise UserError(
                f"{source}: the slice names no rows, or is not understood ({_one_line(error)}). Write it as in train[:400], "
                "train[400:] or train[10%:20%]."
            ) from None


@contextlib.contextmanager
def _quiet(datasets) -> Iterator[None]:
    """Shows bars of `datasets` on a terminal only."""
    shown_before = not datasets.are_progress_bars_disabled()
    if not logs.on_terminal():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown_before:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _explained(wanted: HubSet, source: str, at: HubName) -> Iterator[None]:
    """Turns what `datasets` raises into a UserError."""
    from huggingface_hub.errors import GatedRepoError

    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of `datasets`, of the hub's client, of the readers of files
        chain: list[BaseException] = [error]
        while chain[-1].__cause__ is not None:
            chain.append(chain[-1].__cause__)
        if any(isinstance(e, GatedRepoError) for e in chain) or "is a gated dataset" in str(error):
            raise hub.gated(wanted.name) from None
        away = next((e for e in chain if hub.unreachable(e)), None)
        if isinstance(away, Exception):
            raise hub.explanation(wanted.name, away) from None
        names: list[str] = []
        with contextlib.suppress(Exception):
            import datasets

            names = list(datasets.get_dataset_config_names(at.repo, revision=at.revision))
        if names and wanted.subset not in names and (wanted.subset or len(names) > 1):
            what = f"has no subset {wanted.subset!r}" if wanted.subset else "needs a subset"
            raise UserError(
                f"{source} {what}: the subsets are {', '.join(names)}.{did_you_mean(wanted.subset, names)} Write "
                f"hf:{at.repo}/{names[0]}:SPLIT."
            ) from None
        raise UserError(
            f"{source} could not be read ({type(error).__name__}: {_one_line(error)}). Check the name and the network. A data "
            "set that needs a script of its own is not read: make a file of its prompts and name that."
        ) from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def prompts_of(table, wanted: HubSet, source: str, pairs: bool) -> list[dict]:
    """Returns the rows of a table as `{"instruction", "category"}` and, for pairs, "response" and "input" where they are there.

    Rows without a prompt are left out. What was chosen is logged. Raises UserError for a column that is not there or holds no
    text, and where it is not clear which column holds the prompts.
    """
    table = _plain(table)
    first = {name: _example(table, name) for name in table.column_names}
    no_prompts = UserError(f"{source} holds no prompts. Name another part or column: {SPELLING}.")
    column = chosen_column(wanted.column, first, source)
    talk = not isinstance(first[column], str)
    rows = []
    for row in mended([dict(row) for row in table], source):
        told = row[column]
        text = (said(told, USERS) if talk else told) or ""
        if not isinstance(text, str) or not text.strip():
            continue
        low = lowered(row, source)
        found = {"instruction": text, "category": category_of(low)}
        if pairs:
            answer = (
                said(told, None) if talk else next((low[k] for k in RESPONSE_KEYS if isinstance(low.get(k), str)), None)
            )
            more = {"response": answer, "input": None if talk else low.get("input")}
            found |= {key: value for key, value in more.items() if value}
        rows.append(found)
    what = f"the first turn of the user in the column {column!r}" if talk else f"the column {column!r}"
    left = f"; rows without one, which were left out: {len(table) - len(rows)}" if len(rows) < len(table) else ""
    LOG.info(f"{source}: {len(rows)} prompts were read from {what}{left}.")
    if not rows:
        raise no_prompts
    return rows


def _plain(table):
    """Returns a table without its images and sounds, which would be decoded where a row is looked at."""
    return table.select_columns([n for n in table.column_names if not hasattr(table.features[n], "decode_example")])


def chosen_column(asked: str, first: Mapping[str, Any], source: str) -> str:
    """Returns the column of the prompts. asked: its name, or "". first: an example of what is in each column.

    Without a name it is chosen as in a file: by the names of INSTRUCTION_KEYS in their order, or else it is the only column that
    holds a conversation, or the only one that holds text.
    """
    usable = {name for name, value in first.items() if isinstance(value, str) or said(value, USERS)}
    if asked:
        if asked not in first:
            raise UserError(f"{source} has no column {asked!r}.{did_you_mean(asked, first)} {_columns(first)}")
        if asked not in usable:
            raise UserError(f"{source}: the column {asked!r} holds neither text nor conversations. {_columns(first)}")
        return asked
    names = {name.strip().lower(): name for name in first if name in usable}
    talks = [name for name in first if name in usable and not isinstance(first[name], str)]
    known = [names[key] for key in INSTRUCTION_KEYS if key in names]
    for group in (known[:1], talks, sorted(usable)):
        if len(group) == 1:
            return group[0]
    raise UserError(
        f"{source}: it is not clear which column holds the prompts. {_columns(first)} Name one, as in "
        f"{source}:{(sorted(usable) or list(first) or ['COLUMN'])[0]}."
    )


def _columns(first: Mapping[str, Any]) -> str:
    return f"The columns are {'; '.join(f'{name} (such as {shown(value)})' for name, value in first.items())}."


def _example(table, name: str):
    """Returns the first value of a column that is there."""
    return next((value for value in table[:LOOKED_AT][name] if value not in (None, "", [])), None)

"""Fetches the public prompt sets of `datasets.json`, reads them, and makes them into the paper's splits.

A folder holds `raw/` (the files as published), `prompts/` (each set as a list of prompts, as the paper's code reads
it), `splits/` (the paper's six, byte for byte), `loss/` (what the paper measures the loss on, in its order) and
`answers/` (questions with their correct answers). The texts belong to others and are not shipped: the manifest holds
addresses and hashes only.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import random
from collections.abc import Mapping, Sequence

import numpy as np

from refusal_jax.data.download import download, short_hash
from refusal_jax.data.prompts import ANSWERS
from refusal_jax.data.questions import read_questions
from refusal_jax.data.raw_rows import raw_rows
from refusal_jax.errors import UserError, did_you_mean
from refusal_jax.files import file_hash, read_text, write_atomically
from refusal_jax.progress import each
from refusal_jax.surrogates import mended

MANIFEST = pathlib.Path(__file__).parent / "datasets.json"
RECORD = "hashes.json"  # of files whose hash the manifest does not know
# What each of the paper's splits is made of; a prompt that a later row of this table has is left out of the earlier.
HARMFUL = {
    "harmful_train": ("advbench", "malicious_instruct", "tdc2023"),
    "harmful_val": ("harmbench_val",),
    "harmful_test": ("jailbreakbench", "harmbench_test", "strongreject"),
}
HARMLESS = {"harmless_train": 0.6, "harmless_val": 0.2, "harmless_test": None}
SEED = 42  # of all the paper's draws
LOSS_ROWS = 2 * 2048  # the paper's batches


@dataclasses.dataclass(frozen=True)
class RawFile:
    """A published file. sha256: all hashes that it may have; empty if none is known."""

    name: str
    url: str | None
    sha256: frozenset[str]


@dataclasses.dataclass(frozen=True)
class PublicSet:
    """A set of the manifest. read: its columns and which rows count, see `read_set`. hub: the Hub data set to stream, if any."""

    name: str
    title: str
    home: str
    licence: str
    rows: int
    read: Mapping
    files: tuple[RawFile, ...]
    hub: Mapping | None = None

    @property
    def pinned(self) -> bool:
        """Returns whether the manifest knows the hashes of all its files."""
        return all(file.sha256 for file in self.files)

    @property
    def command(self) -> str:
        """Returns the command that fetches this set."""
        return f"refusal-jax data fetch --sets={self.name}{'' if self.pinned else ' --accept_new_hash'}"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of `datasets.json`.

    sets: the public sets by name. splits: `{split: {"rows", "sha256"}}`. advbench_train: the hashes of AdvBench's part of the
    train split, in its order, because that draw was not seeded.
    """

    sets: dict[str, PublicSet]
    splits: dict[str, dict]
    advbench_train: tuple[str, ...]

    def choose(self, names: Sequence[str]) -> list[PublicSet]:
        """Returns the sets of these names. Raises UserError for an unknown name."""
        unknown = [name for name in names if name not in self.sets]
        if unknown:
            hint = did_you_mean(unknown[0], self.sets)
            raise UserError(f"there is no public set {unknown[0]!r}.{hint} The sets are {', '.join(self.sets)}.")
        return [self.sets[name] for name in names]


@functools.cache
def load_manifest(path: pathlib.Path = MANIFEST) -> Manifest:
    """Reads a manifest of the form of `datasets.json`. Raises UserError for a file that is not a manifest."""
    try:
        content = json.loads(read_text(path))
        sets = {}
        for name, entry in content["sets"].items():
            files = tuple(
                RawFile(f["file"], f["url"], frozenset(filter(None, (f["sha256"], *f.get("also", ())))))
                for f in entry["files"]
            )
            for file in files:
                if pathlib.PurePath(file.name).name != file.name:
                    raise ValueError(f"the file name {file.name!r} of {name} leaves its folder")
            fields = {key: entry[key] for key in ("title", "home", "licence", "rows", "read")}
            sets[name] = PublicSet(name=name, files=files, hub=entry.get("hub"), **fields)
        return Manifest(sets, content["splits"], tuple(content["advbench_train"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is no manifest of data sets ({type(error).__name__}: {error}). Compare it with third_party/datasets.json."
        ) from None


def expected(file: RawFile, folder: pathlib.Path) -> frozenset[str]:
    """Returns the hashes that a raw file may have: the manifest's, or the one recorded when it was first fetched."""
    return file.sha256 or frozenset(filter(None, [_recorded(folder).get(file.name)]))


def _recorded(folder: pathlib.Path) -> dict:
    path = folder / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def fetch_set(chosen: PublicSet, folder: pathlib.Path, accept_new: bool = False) -> None:
    """Downloads the raw files of a set that are missing or wrong.

    accept_new: accept a file whose hash is not known, and record its hash. Raises UserError as `download` does, and for
    an unknown hash without `accept_new`.
    """
    for file in chosen.files:
        known, target = _checkable(file, folder, accept_new), folder / "raw" / file.name
        if chosen.hub is None:
            found = download(file.url or "", target, known)
        elif target.is_file() and file_hash(target) in known:
            continue
        else:
            stream_hub(chosen.hub, target)
            found = file_hash(target)
            if known and found not in known:
                raise UserError(
                    f"{target}: the Hub sent other rows than before (sha256 {found}). Remove it to start anew."
                )
        _record(file, folder, found)


def _checkable(file: RawFile, folder: pathlib.Path, accept_new: bool) -> frozenset[str]:
    """Returns the hashes that a file may have. Raises UserError if none is known, unless `accept_new` is set."""
    known = expected(file, folder)
    if not known and not accept_new:
        raise UserError(
            f"the sha256 of {file.name} is not known, so it could not be checked. To take it as it is once: "
            f"`refusal-jax data fetch --accept_new_hash`; its hash is then recorded in {folder / RECORD} and holds from there on."
        )
    return known


def _record(file: RawFile, folder: pathlib.Path, found: str) -> None:
    if not file.sha256:
        write_atomically(folder / RECORD, _json(_recorded(folder) | {file.name: found}))


def stream_hub(hub: Mapping, target: pathlib.Path) -> None:
    """Writes the first rows of a Hub data set as JSON lines, without downloading the rest of it.

    hub: `{"path", "revision", "split", "columns", "rows"}`. Raises UserError if the Hub cannot be reached or has no such set.
    """
    import datasets  # imported late, because this takes seconds

    lines = []
    try:
        stream = datasets.load_dataset(
            hub["path"], split=hub["split"], revision=hub.get("revision"), streaming=True, trust_remote_code=None
        )
        for row in each(stream.take(hub["rows"]), target.name, "row", hub["rows"]):
            kept = mended({column: row[column] for column in hub["columns"]}, hub["path"])
            lines.append(json.dumps(kept, ensure_ascii=False))
    except Exception as error:  # the Hub's client raises many types
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the Hub data set {hub['path']} could not be streamed ({type(error).__name__}: {reason}). Check the network "
            f"and HF_HUB_OFFLINE, or write its first {hub['rows']} rows into {target.name} on another machine, one JSON "
            "object a line, and name its folder: `refusal-jax data fetch --from=FOLDER`."
        ) from None
    write_atomically(target, ("\n".join(lines) + "\n").encode())


def take_files(
    chosen: Sequence[PublicSet], source: pathlib.Path, folder: pathlib.Path, accept_new: bool = False
) -> list[str]:
    """Copies the raw files of these sets that `source` has into the folder; returns the sets that are then complete.

    accept_new: as for `fetch_set`. Raises UserError if `source` is no folder, has none of them, or has one with other bytes
    than expected or of an unknown hash.
    """
    if not source.is_dir():
        raise UserError(f"{source} is not a folder. Name the folder that holds the files.")
    complete = []
    for one in chosen:
        there = [file for file in one.files if (source / file.name).is_file()]
        for file in there:
            data, known = (source / file.name).read_bytes(), _checkable(file, folder, accept_new)
            found = hashlib.sha256(data).hexdigest()
            if known and found not in known:
                raise UserError(
                    f"{source / file.name} is not the file that was expected ({one.title}): its sha256 is {found}, expected "
                    f"{' or '.join(sorted(known))}. Get it from {file.url or one.home}."
                )
            write_atomically(folder / "raw" / file.name, data)
            _record(file, folder, found)
        if len(there) == len(one.files):
            complete.append(one.name)
    if not complete:
        names = ", ".join(file.name for one in chosen for file in one.files)
        raise UserError(f"{source} holds no complete set. The files are called {names}.")
    return complete


def read_set(chosen: PublicSet, paths: Sequence[pathlib.Path]) -> list[dict]:
    """Reads a set's prompts, `[{"instruction", "category"}]`, from its raw files in order, stripped as by the paper's code.

    `read` of the set says how: "text" and "category" are columns (null: a row is the text itself); only rows whose columns
    have the values of "keep" count, and none whose columns contain those of "drop" or are filled where "empty" says that
    they must not be; "answers" marks questions with answers. Raises UserError that names file and row for one without the
    columns.
    """
    read, prompts = chosen.read, []
    for path in paths:
        for where, row in raw_rows(path):
            try:
                if not _counts(row, read):
                    continue
                text = (row if read["text"] is None else row[read["text"]]).strip()
                category = row[read["category"]] if read.get("category") else None
            except (KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{path}, {where} does not have the form of {chosen.title} ({type(error).__name__}: {error}): expected "
                    f"{read['text'] or 'a text'}. Use the published file, {chosen.home}."
                ) from None
            prompts.append({"instruction": text, "category": category})
    return prompts


def _counts(row, read: Mapping) -> bool:
    """Returns whether a row counts, by what `read` says of its columns."""
    for column, value in read.get("keep", {}).items():
        if row[column] != value:
            return False
    for column, value in read.get("drop", {}).items():
        if value in (row[column] or "").lower():
            return False
    # The paper's own file of Alpaca has only such rows, and no such column.
    return "empty" not in read or not (row.get(read["empty"]) or "").strip()


def build_splits(sets: Mapping[str, list[dict]], advbench_train: Sequence[str]) -> dict[str, list[dict]]:
    """Makes those of the paper's splits whose sets are all there from the sets' prompts (`read_set`).

    Harmful prompts that a later split has too are left out of the earlier one. The train split has a draw of AdvBench that was
    not seeded and is known by hashes. The harmless splits are all of Alpaca, shuffled, cut at 60 and 80 %. Raises UserError if
    AdvBench lacks prompts of the draw.
    """
    splits: dict[str, list[dict]] = {}
    later: set[str] = set()
    for split, parts in reversed(HARMFUL.items()):
        if not all(part in sets for part in parts):
            break
        rows = [row for part in parts for row in _drawn(part, sets[part], advbench_train)]
        splits[split] = [row for row in rows if split == "harmful_test" or row["instruction"] not in later]
        later |= {row["instruction"] for row in rows}
    if "alpaca" in sets:
        rows, start = list(sets["alpaca"]), 0
        random.Random(SEED).shuffle(rows)
        for split, share in HARMLESS.items():
            stop = len(rows) if share is None else start + int(share * len(rows))
            splits[split], start = rows[start:stop], stop
    return splits


def _drawn(name: str, rows: list[dict], advbench_train: Sequence[str]) -> list[dict]:
    if name != "advbench":
        return rows
    by_hash = {short_hash(row["instruction"]): row for row in rows}
    missing = sum(key not in by_hash for key in advbench_train)
    if missing:
        raise UserError(
            f"AdvBench lacks {missing} of the {len(advbench_train)} prompts of the paper's train split: the file is another "
            "version. Fetch it with `refusal-jax data fetch --sets=advbench`."
        )
    return [by_hash[key] for key in advbench_train]


def build(manifest: Manifest, folder: pathlib.Path, alpaca: pathlib.Path | None = None) -> dict[str, int]:
    """Writes `prompts/` and `splits/` from the raw files that the folder has; returns the number of rows of each file.

    alpaca: a file to use for the harmless splits, .json, .jsonl or .parquet. Raises UserError as `read_set` does, for an
    Alpaca that cannot give the paper's splits, and if nothing could be built.
    """
    sets, rows = {}, {}
    for one in manifest.sets.values():
        paths = [folder / "raw" / file.name for file in one.files]
        if one.name == "alpaca" and alpaca is not None:
            paths = [alpaca]
        if all(path.is_file() for path in paths):
            sets[one.name] = read_set(one, paths)
        elif one.name == "alpaca" and alpaca is not None:
            raise UserError(f"{alpaca} is not a file. Name Alpaca's, or leave it out.")
    splits = build_splits(sets, manifest.advbench_train)
    for split in HARMLESS:
        if split in splits and (found := _hash(splits[split])) != manifest.splits[split]["sha256"]:
            raise UserError(
                f"{alpaca or 'alpaca_data.json'} does not give the paper's {split} ({len(splits[split])} prompts, sha256 "
                f"{found}; expected {manifest.splits[split]['rows']} and {manifest.splits[split]['sha256']}). Its rows are "
                "others, or in another order. Use alpaca_data.json of github.com/tatsu-lab/stanford_alpaca."
            )
    named = {f"prompts/{name}": prompts for name, prompts in sets.items() if not manifest.sets[name].hub}
    for name, prompts in (named | {f"splits/{split}": prompts for split, prompts in splits.items()}).items():
        write_atomically(folder / f"{name}.json", _json(prompts))
        rows[f"{name}.json"] = len(prompts)
    for name, lines in (_loss_sets(manifest, folder, alpaca) | _answer_sets(manifest, folder)).items():
        write_atomically(folder / name, "".join(json.dumps(line) + "\n" for line in lines).encode())
        rows[name] = len(lines)
    if not rows:
        raise UserError(f"{folder} holds no complete set, so there is nothing to build. Run `refusal-jax data fetch`.")
    return rows


def _loss_sets(manifest: Manifest, folder: pathlib.Path, alpaca: pathlib.Path | None) -> dict[str, list[dict]]:
    """Returns what the loss is measured on: the streamed documents as they are, and Alpaca's pairs in the paper's order."""
    found = {}
    for one in manifest.sets.values():
        paths = [folder / "raw" / file.name for file in one.files]
        if one.name == "alpaca" and alpaca is not None:
            paths = [alpaca]
        if not all(path.is_file() for path in paths):
            continue
        if one.hub:
            found[f"loss/{one.name}.jsonl"] = [row for path in paths for _, row in raw_rows(path)]
        elif one.name == "alpaca":
            rows = [row for path in paths for _, row in raw_rows(path)]
            # As `datasets` shuffles: the whole set first, and then the rows with an input are left out.
            mixed = [rows[i] for i in np.random.default_rng(SEED).permutation(len(rows))]
            pairs = [
                {"prompt": row["instruction"], "response": row["output"]}
                for row in mixed
                if row.get("output") and _counts(row, one.read)
            ]
            if pairs:  # the paper's own file of Alpaca has no outputs
                found["loss/alpaca.jsonl"] = pairs[:LOSS_ROWS]
    return found


def _answer_sets(manifest: Manifest, folder: pathlib.Path) -> dict[str, list[dict]]:
    """Returns the questions and answers of the sets that have both."""
    found = {}
    for one in manifest.sets.values():
        paths = [folder / "raw" / file.name for file in one.files]
        if one.read.get("answers") and all(path.is_file() for path in paths):
            found[f"{ANSWERS}/{one.name}.jsonl"] = [vars(row) for path in paths for row in read_questions(path)]
    return found


def _json(value) -> bytes:
    """Writes JSON as the paper's code does."""
    return json.dumps(value, indent=4).encode()


def _hash(prompts: list[dict]) -> str:
    return hashlib.sha256(_json(prompts)).hexdigest()


def status(manifest: Manifest, folder: pathlib.Path) -> dict[str, str]:
    """Returns what is there, `{file: "ok", "missing" or what is wrong}` for raw files and splits."""
    found = {}
    for one in manifest.sets.values():
        for file in one.files:
            found[f"raw/{file.name}"] = _state(folder / "raw" / file.name, expected(file, folder))
    for split, entry in manifest.splits.items():
        found[f"splits/{split}.json"] = _state(folder / "splits" / f"{split}.json", frozenset([entry["sha256"]]))
    return found


def _state(path: pathlib.Path, known: frozenset[str]) -> str:
    if not path.is_file():
        return "missing"
    if not known:
        return "of unknown hash"
    return (
        "ok" if (found := file_hash(path)) in known else f"differs: sha256 {found[:16]}…, expected {min(known)[:16]}…"
    )

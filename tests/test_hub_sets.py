"""Prompts of data sets on the hub: the real `datasets` against a hub of our own."""

import io
import json
import logging

import pytest
from huggingface_hub import constants

from refusal_jax import UserError
from refusal_jax import hub as names
from refusal_jax.data.hub_sets import HubSet, chosen_column, hub_prompts
from refusal_jax.data.prompts import read_chat_pairs, read_prompts
from refusal_jax.data.sources import dataset_name, resolve

NAME, (OLD, NEW) = "org/prompts", ("a" * 40, "b" * 40)


@pytest.fixture
def sets(hub, tmp_path, monkeypatch):
    """The hub, and `datasets` with an empty cache."""
    from datasets import config

    monkeypatch.setattr(config, "HF_ENDPOINT", constants.ENDPOINT)
    monkeypatch.setattr(
        config, "HUB_DATASETS_URL", constants.ENDPOINT + "/datasets/{repo_id}/resolve/{revision}/{path}"
    )
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(config, "DOWNLOADED_DATASETS_PATH", tmp_path / "datasets" / "downloads")
    monkeypatch.setattr(config, "EXTRACTED_DATASETS_PATH", tmp_path / "datasets" / "extracted")
    return hub


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


GOALS = [{"goal": f"Bake {i}.", "Category": "cake", "target": "Sure"} for i in range(10)]


@pytest.mark.parametrize(
    "source,found",
    [
        ("hf:a/b:train", ("a/b", "", "train", "")),
        ("hf:a/b:train[:400]", ("a/b", "", "train[:400]", "")),
        ("hf:a/b/x y@v1.0:train[10%:20%]+test:p q", ("a/b@v1.0", "x y", "train[10%:20%]+test", "p q")),
        ("hf:a/b@refs/convert/parquet:test:goal", ("a/b@refs/convert/parquet", "", "test", "goal")),
        ("hf:a/b", ("a/b", "", "", "")),
    ],
)
def test_how_sets_are_spelt(source, found):
    read = HubSet.parse(source)
    assert (str(read.name), read.subset, read.split, read.column) == found


@pytest.mark.parametrize(
    "source", ["hf:a", "hf:", "hf:a/b/c/d:train", "hf:a/b:train:x:y", "hf://a/b:train", "hf:../b:train"]
)
def test_spellings_that_are_none(source):
    with pytest.raises(UserError, match=r"does not name prompts of a data set on the hub\. Write hf:ORG/NAME:SPLIT"):
        resolve(source, "harmful_train")


def test_names_in_artifacts():
    assert dataset_name("hf:org/Some-Set.v2/sub set@x:train[:3]") == "Some-Set.v2_sub_set"
    assert dataset_name("hf:org/advbench:train:goal") == "advbench"


def test_prompts_of_a_slice(sets, caplog, monkeypatch):
    sets.add(NAME, kind="datasets", files={"train.jsonl": jsonl(GOALS), "test.jsonl": jsonl(GOALS[:2])})
    source = f"hf:{NAME}:train[2:4]"
    with caplog.at_level(logging.INFO), names.session({}) as found:
        path = resolve(source, "harmful_train")
    assert read_prompts(path) == [{"instruction": f"Bake {i}.", "category": "cake"} for i in (2, 3)]
    assert f"{source}: 2 prompts were read from the column 'goal'." in caplog.text
    assert found == {f"hf:{NAME}": OLD}
    sets.asked.clear()
    assert resolve(source, "harmful_train") == path and len(sets.asked) == 1  # for the commit
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve(source, "harmful_train") == resolve(f"hf:{NAME}@main:train[2:4]", "harmful_train") == path
    assert resolve(f"hf:{NAME}@{OLD}:train[2:4]", "harmful_train") == path
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set"):
        resolve(f"hf:{NAME}@v2:train", "harmful_train")


def test_a_session_keeps_the_commit(sets):
    sets.add(NAME, kind="datasets", files={"train.csv": b"goal\nold\n"})
    sets.add(NAME, kind="datasets", commit=NEW, files={"train.csv": b"goal\nnew\n"})
    now = hub_prompts(f"hf:{NAME}:train")
    with names.session({f"hf:{NAME}": OLD}) as found:
        before = hub_prompts(f"hf:{NAME}:train")
    assert [read_prompts(path)[0]["instruction"] for path in (now, before)] == ["new", "old"]
    assert found == {f"hf:{NAME}": OLD}


CARD = b"""---
configs:
- config_name: plain
  data_files: [{split: train, path: plain.parquet}]
- config_name: talks
  data_files: [{split: train_sft, path: talks.parquet}]
---
"""
SYSTEM = {"role": "system", "content": "S"}


def talk(number: int) -> list[dict]:
    return [{"role": "user", "content": f"Q{number}"}, {"role": "assistant", "content": f"A{number}"}]


TALKS = [{"id": "1", "messages": [SYSTEM, *talk(1)]}, {"id": "2", "messages": talk(2)}, {"id": "3", "messages": []}]


def test_subsets_and_conversations(sets, caplog):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def parquet(table) -> bytes:
        file = io.BytesIO()
        pq.write_table(table, file)
        return file.getvalue()

    plain = parquet(pa.table({"act": ["x"], "prompt": ["P"], "response": ["R"], "n": [1]}))
    files = {"README.md": CARD, "plain.parquet": plain, "talks.parquet": parquet(pa.Table.from_pylist(TALKS))}
    sets.add(NAME, kind="datasets", files=files)
    assert read_chat_pairs(resolve(f"hf:{NAME}/plain:train", "loss")) == [("P", "R")]
    assert read_prompts(resolve(f"hf:{NAME}/plain:train:act", "harmful_val"))[0]["instruction"] == "x"
    with caplog.at_level(logging.INFO):
        path = resolve(f"hf:{NAME}/talks:train_sft", "loss")
    assert read_chat_pairs(path) == [("Q1", "A1"), ("Q2", "A2")]
    assert (
        "2 prompts were read from the first turn of the user in the column 'messages'; rows without one, which were left out: 1"
        in caplog.text
    )
    for source, message in {
        f"hf:{NAME}:train": r"needs a subset: the subsets are plain, talks\. Write hf:org/prompts/plain:SPLIT",
        f"hf:{NAME}/talk:train": r"has no subset 'talk': the subsets are plain, talks\. Did you mean talks\?",
        f"hf:{NAME}/talks:train": r"has no split 'train': the splits are train_sft\. Did you mean train_sft\?",
        f"hf:{NAME}/talks": r"needs a split: the splits are train_sft\. Write hf:ORG/NAME:SPLIT",
        f"hf:{NAME}/plain:train[a:b]": r"the slice names no rows, or is not understood \(.*Write it as in train\[:400\]",
        f"hf:{NAME}/plain:train[:0]": r"the slice names no rows, or is not understood",
        f"hf:{NAME}/plain:train:promt": r"has no column 'promt'\. Did you mean prompt\? The columns are act \(such as 'x'\)",
        f"hf:{NAME}/plain:train:n": r"the column 'n' holds neither text nor conversations\. The columns are",
    }.items():
        with pytest.raises(UserError, match=message):
            resolve(source, "harmful_train")


SHAREGPT = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]


@pytest.mark.parametrize(
    "first,column",
    [
        ({"text": "a", "prompt": "b", "Instruction": "c"}, "Instruction"),
        ({"id": "1", "messages": SHAREGPT}, "messages"),
        ({"a": 1, "request": "b"}, "request"),
        ({"prompt": SHAREGPT, "chosen": SHAREGPT}, "prompt"),
        ({"prompt": None, "question": "q"}, "question"),
    ],
)
def test_columns_that_are_chosen(first, column):
    assert chosen_column("", first, "hf:a/b:c") == column


@pytest.mark.parametrize("first", [{"a": "x", "b": "y"}, {"chosen": SHAREGPT, "rejected": SHAREGPT}, {"n": 1}])
def test_columns_that_are_not_clear(first):
    with pytest.raises(
        UserError, match=rf"it is not clear which column .* Name one, as in hf:a/b:c:{next(iter(first))}\."
    ):
        chosen_column("", first, "hf:a/b:c")


def test_sets_that_are_not_there(sets, tmp_path, monkeypatch):
    sets.add(NAME, kind="datasets", files={"train.csv": b"goal\na\n"})
    sets.add("org/model", files={"config.json": b"{}"})
    sets.add("org/gated", kind="datasets", files={"train.csv": b"goal\na\n"}).gated = True
    sets.add("org/code", kind="datasets", files={"code.py": b"raise SystemExit"})
    sets.add("org/blank", kind="datasets", files={"train.jsonl": jsonl([{"prompt": " "}])})
    sets.add("org/pictures", kind="datasets", files={"train/a.png": b"x"})
    for source, message in {
        "hf:org/promts:train": r"org/promts is no data set that the hub \(.*\) shows you\. Did you mean org/prompts\?",
        "hf:org/model:train": r"org/model is a model on the hub, not a data set",
        f"hf:{NAME}@v3:train": r"has no revision 'v3' on the hub\. Its branches and tags are main",
        "hf:org/gated:train": r"org/gated is gated: .*Accept them at http.*/datasets/org/gated",
        "hf:org/code:train": r"could not be read \(.*that needs a script of its own is not read",
        "hf:org/blank:train": r"holds no prompts\. Name another part or column",
        "hf:org/pictures:train": r"holds imagefolder files, which are not read",
    }.items():
        with pytest.raises(UserError, match=message):
            resolve(source, "harmful_train")
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir(parents=True)
    with pytest.raises(UserError, match=r"there is a folder org/prompts here, which `datasets` would read"):
        resolve(f"hf:{NAME}:train", "harmful_train")

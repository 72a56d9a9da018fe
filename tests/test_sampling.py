"""Prompts that splits of a study share: drawn apart where one file serves several, and counted where files overlap."""

import json

import pytest
from test_data import paper_draws, settings

from refusal_jax import UserError
from refusal_jax.data.sampling import SPLITS, overlap_in_words, overlaps, sample_prompts


def test_splits_of_one_file_are_drawn_apart(tmp_path):
    rows = [f"prompt {i}" for i in range(12)]
    for name in ("a", "copy"):
        (tmp_path / f"{name}.json").write_text(json.dumps([*rows, " Prompt  3", "PROMPT 5"]))
    sources = [str(tmp_path / f"{name}.json") for name in ("a", "copy")]
    said = []
    drawn = sample_prompts(settings(tmp_path, **{split: sources[i % 2] for i, split in enumerate(SPLITS)}), said.append)
    assert {split: len(rows) for split, rows in drawn.items()} == dict(zip(SPLITS, (3, 3, 1, 1, 2, 2), strict=True))
    texts = [p["instruction"] for rows in drawn.values() for p in rows]
    assert sorted(texts) == sorted(rows) and overlaps(drawn) == []
    assert "harmless_test come from the same prompts" in said[0] and "12 different ones" in said[0]
    assert "drawn apart: 3, 3, 1, 1, 2, 2 (asked for: 128, 128, 32, 32, 100, 100)" in said[0]
    assert "What is called harmful and what harmless differs by chance only" in said[0]
    (tmp_path / "few.json").write_text(json.dumps(["a", "b", "c", "A ", "b"]))
    few = {split: str(tmp_path / "few.json") for split in SPLITS}
    with pytest.raises(UserError, match=r"few\.json serves harmful_train, .* has only 3 different ones"):
        sample_prompts(settings(tmp_path, **few))


def test_a_shared_file_leaves_the_draws_of_others_as_they_are(tmp_path):
    sizes = dict(zip(SPLITS, (260, 600, 260, 600, 260, 150), strict=True))
    sets = {
        name: [f"{name.split('_')[0] if name.startswith('harmful') else name} {i}" for i in range(size)]
        for name, size in sizes.items()
    }
    for name, rows in sets.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    said = []
    drawn = {s: [p["instruction"] for p in rows] for s, rows in sample_prompts(settings(tmp_path), said.append).items()}
    wanted = paper_draws(sets)
    assert all(drawn[name] == wanted[name] for name in SPLITS if name.startswith("harmless"))
    harmful = [text for name in SPLITS if name.startswith("harmful") for text in drawn[name]]
    assert len(harmful) == len(set(harmful)) == 260 and len(said) == 1 and "chance" not in said[0]
    assert [len(drawn[name]) for name in SPLITS[::2]] == [128, 32, 100]


def test_over_refusal_sets_and_the_files_of_other_splits(tmp_path):
    """Apart from the set that is trained on, and as before where only harmless test sets share a file."""
    for name in SPLITS:
        (tmp_path / f"{name}.json").write_text(json.dumps([f"{name} {i}" for i in range(400)]))
    for shared, said_of in (("harmless_train", 1), ("harmless_test", 0)):
        said, more = [], tmp_path / "more.json"
        more.write_text((tmp_path / f"{shared}.json").read_text())
        drawn = sample_prompts(settings(tmp_path, over_refusal=(str(more),)), said.append)
        assert len(said) == said_of and len(drawn["more_test"]) == 100 and overlaps(drawn) == []
        assert drawn["harmless_test"] == sample_prompts(settings(tmp_path))["harmless_test"]


def test_prompts_that_splits_share():
    def rows(*texts):
        return [{"instruction": text, "category": None} for text in texts]

    prompts = {
        "harmful_train": rows("a", "b", "b "),
        "harmless_train": rows("x", "y"),
        "harmful_val": rows("c"),
        "harmless_val": rows("X  ", "z"),
        "harmful_test": rows("B", "d", "A", "C"),
        "harmless_test": rows("p", "x y", "d"),
        "more_test": rows("Z", "p", "a"),
    }
    found = overlaps(prompts)
    keys = ("split", "other", "count", "of")
    assert [tuple(entry[key] for key in keys) for entry in found] == [
        ("harmful_train", "harmful_train", 1, 3),
        ("harmless_val", "harmless_train", 1, 2),
        ("harmful_test", "harmful_train", 2, 4),
        ("harmful_test", "harmful_val", 1, 4),
        ("harmless_test", "harmful_test", 1, 3),
        ("more_test", "harmful_train", 1, 3),
        ("more_test", "harmless_val", 1, 3),
        ("more_test", "harmful_test", 1, 3),
    ]
    words = {f"{entry['split']} {entry['other']}": " ".join(overlap_in_words(entry)) for entry in found}
    assert words["harmful_train harmful_train"].startswith("1 of the 3 prompts of harmful_train repeats another one")
    assert (
        "2 of the 4 prompts of harmful_test are in harmful_train too: they were trained on, so that their results"
        in (words["harmful_test harmful_train"])
    )
    assert "used to choose the direction" in words["harmful_test harmful_val"]
    assert "trained on, so that they cannot check the choice" in words["harmless_val harmless_train"]
    assert "counts as harmful and as harmless" in words["more_test harmful_train"]
    assert overlaps({split: rows(split) for split in SPLITS}) == []

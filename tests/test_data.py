"""Prompt files, the paper's draws, the selection rule, and how completions are judged."""

import json
import math
import os
import pathlib
import random

import pytest

from refusal_jax import UserError
from refusal_jax.data.prompts import BUNDLED, read_prompts, write_prompts
from refusal_jax.data.sampling import SPLITS, sample_prompts
from refusal_jax.data.sources import dataset_name, resolve
from refusal_jax.errors import NoDirection
from refusal_jax.files import file_hash
from refusal_jax.judges.evaluations import evaluate_completions
from refusal_jax.judges.statistics import wilson_interval
from refusal_jax.judges.text import REFUSAL_SUBSTRINGS, TEXT_JUDGES, substring_matching
from refusal_jax.study.config import DataSettings
from refusal_jax.study.selection import Rule, pick

SHARED = pathlib.Path(
    os.environ.get("REFUSAL_JAX_SHARED", pathlib.Path(__file__).resolve().parents[1].parent / "shared")
)
needs_splits = pytest.mark.skipif(not (SHARED / "data" / "splits").is_dir(), reason="no public data splits here")
needs_runs = pytest.mark.skipif(not (SHARED / "published").is_dir(), reason="no published runs here")

GOOD_FILES = {
    "strings.json": '["one", "two, three"]',
    "objects.json": '[{"instruction": "one", "category": null}, {"goal": "two, three", "category": ""}]',
    "lines.jsonl": '{"prompt": "one"}\n\n"two, three"\n',
    "table.csv": 'Behavior,Index\none,0\n"two, three",1\n',
    "bom.csv": '\ufefftext\none\n"two, three"\n',
    "plain.txt": "one\n\n  two, three  \n",
    "UPPER.TXT": "one\r\ntwo, three\r\n",
}


def write(folder, name, content) -> pathlib.Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", GOOD_FILES)
def test_prompt_files(name, tmp_path):
    prompts = read_prompts(write(tmp_path, name, GOOD_FILES[name]))
    assert prompts == [{"instruction": "one", "category": None}, {"instruction": "two, three", "category": None}]


def test_columns_are_found_in_order_of_preference(tmp_path):
    rows = [
        {"text": "no", "goal": "goal", "type": "t", "SemanticCategory": "s"},
        {"Instruction": "instruction", "prompt": "no", "category": 3, "type": "no"},
        {"goal": "", "question": "question"},
    ]
    assert read_prompts(write(tmp_path, "a.json", json.dumps(rows))) == [
        {"instruction": "goal", "category": "s"},
        {"instruction": "instruction", "category": "3"},
        {"instruction": "question", "category": None},
    ]


def test_line_separators_inside_json_strings_do_not_end_lines(tmp_path):
    texts = ["a\u2028b", "c\x85d", "e"]
    lines = "\n".join(json.dumps({"prompt": text}, ensure_ascii=False) for text in texts)
    assert [p["instruction"] for p in read_prompts(write(tmp_path, "a.jsonl", lines))] == texts


BAD_FILES = {
    "a.parquet": ("x", r"a\.parquet is not a prompt file: its name must end in \.json, \.jsonl, \.csv or \.txt"),
    "empty.json": ("[]", r"empty\.json holds no prompts"),
    "empty.txt": ("\n \n", r"empty\.txt holds no prompts"),
    "empty.csv": ("goal,category\n", r"empty\.csv holds no prompts"),
    "latin.txt": ("café".encode("latin-1"), r"latin\.txt is not UTF-8 text .*iconv"),
    "broken.json": ('["a", ', r"broken\.json is not valid JSON .*use \.jsonl for one object a line"),
    "object.json": ('{"a": 1}', r"object\.json holds a JSON dict, expected a list"),
    "broken.jsonl": ('"a"\n\n{"prompt": \n', r"broken\.jsonl, line 3 is not valid JSON .*Repair or remove the line"),
    "number.json": ('["a", 5]', r"number\.json, entry 1 is a int, expected an instruction"),
    "null.jsonl": ("null\n", r"null\.jsonl, line 1 is a NoneType, expected an instruction"),
    "other.csv": ("id,answer\n1,yes\n", r"other\.csv, row 1 has no instruction: its fields are id, answer, one of"),
    "nothing.json": ("[{}]", r"nothing\.json, entry 0 has no instruction: its fields are none"),
    "blank.csv": ("goal\nx\n  \n", r"blank\.csv, row 2: goal is '  ', expected text"),
    "typed.json": ('[{"goal": ["x"]}]', r"typed\.json, entry 0: goal is \['x'\], expected text"),
    "blank.json": ('[""]', r"blank\.json, entry 0 has no instruction"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_prompt_files(name, tmp_path):
    content, message = BAD_FILES[name]
    with pytest.raises(UserError, match=message):
        read_prompts(write(tmp_path, name, content))


def test_csv_that_the_parser_gives_up_on(tmp_path):
    with pytest.raises(UserError, match=r"huge\.csv"):
        read_prompts(write(tmp_path, "huge.csv", "goal\n" + "x" * 200_000 + "\n"))


WHOLE_CSV = {
    'goal,category\n\n"a\n\nb, ""c""",d\n': ('a\n\nb, "c"', "d"),
    '\ufeffgoal,category\r\n"a\r\nb",d\r\n': ("a\nb", "d"),
    '\n\ngoal,category\n5" pipe, wide,d\n'.replace(", wide", ""): ('5" pipe', "d"),
    'goal, category\n"bake, eat", "food, x"\n': ("bake, eat", "food, x"),
    '"goal","category"\n"bake", food\n': ("bake", " food"),
    "goal,category,\nbake,food,\n": ("bake", "food"),
    ",Goal,category\n0,bake,food\n": ("bake", "food"),
    "goal,category\nbake,0\n": ("bake", "0"),
}


@pytest.mark.parametrize("text", WHOLE_CSV)
def test_csv_that_loses_nothing(text, tmp_path):
    instruction, category = WHOLE_CSV[text]
    path = write(tmp_path, "a.csv", text)
    assert read_prompts(path) == [{"instruction": instruction, "category": category}]


TORN_CSV = {
    "goal,category\nx,y\n\nHow do I bake the bread, the cake and the pie?,food\n": (
        r"a\.csv, row 2 \(line 4\) has 3 fields and the header has 2 \(goal, category\), so part of it would be lost\. Put a "
        r"field that holds commas, quotes or line ends in double quotes .* or use \.jsonl \(for prompts alone also \.txt"
    ),
    "goal,category\nHow do I bake the bread, the cake and the pie?\n": (
        r"row 1 \(line 2\) has ' the cake and the pie\?' as its category, after 'How do I bake the bread': it begins with a space"
    ),
    "goal\nbake, eat\n": r"row 1 \(line 2\) has 2 fields and the header has 1 \(goal\)",
    "goal,category\nx\n": r"row 1 \(line 2\) has 1 field and the header has 2 \(goal, category\), so a field is missing",
    'goal,category\n"bake,x\n"fry",x\n': r"row 1 \(line 2\) is not readable CSV: text follows a closing quote, .*\. Put a field",
    'goal,category\nx,"y\nz"\n"bake,x\nfry,x\n': (
        r"row 2 \(line 4\) is not readable CSV: a quote is opened and never closed"
    ),
    'goal,category\n"a" b,c\n': r"row 1 \(line 2\) is not readable CSV: text follows a closing quote",
    '"goal,category\nx,y\n': r"header \(line 1\) is not readable CSV: a quote is opened and never closed",
    "Goal,goal \na,b\n": r"a\.csv has two columns that are called 'goal'\. Rename one of them",
    "goal,\nbake,eat\n": r"row 1 \(line 2\) has 'eat' in a column without a name, where it would be lost",
    "goal;category\na;b\n": r"a\.csv seems to be separated by semicolons: its header is 'goal;category'\. Save it with commas",
    '"goal"\t"category"\n"a, b"\t"c"\n': r"seems to be separated by tabs",
    "\n\n": r"a\.csv holds no prompts",
}


@pytest.mark.parametrize("text", TORN_CSV)
def test_csv_that_would_lose_text(text, tmp_path):
    with pytest.raises(UserError, match=TORN_CSV[text]):
        read_prompts(write(tmp_path, "a.csv", text))


def test_values_that_json_readers_drop(tmp_path):
    twice = r"a\.json has the key 'goal' twice in one object, so one of its two values would be lost"
    for text, message in (
        ('[{"goal": "a", "goal": "b"}]', twice),
        ('[{"Goal": "a", "goal": "b"}]', "entry 0 has the field 'goal' in two spellings with two values"),
        ('[{"goal": "a", "x\\ud800": 1, "x\\ud801": 2}]', "has the key 'x\ufffd' twice"),
        ("[" * 100_000, "is not valid JSON"),
    ):
        with pytest.raises(UserError, match=message):
            read_prompts(write(tmp_path, "a.json", text))
    assert read_prompts(write(tmp_path, "b.json", '[{"goal": "a", "category": 0}]'))[0]["category"] == "0"


def test_half_a_character_is_replaced_and_said(tmp_path, caplog):
    rows = r'["a\ud800b", {"prompt": "\ud83d\ude00", "category": "\ude00\ud83d", "key\udfff": 1}]'
    path = write(tmp_path, "a.json", rows)
    wanted = [
        {"instruction": "a\ufffdb", "category": None},
        {"instruction": "\U0001f600", "category": "\ufffd\ufffd"},
    ]
    assert read_prompts(path) == read_prompts(path) == wanted
    said = caplog.text
    assert said.count(f"{path}: 3 texts hold half of a surrogate pair") == 1
    lines = write(tmp_path, "a.jsonl", r'"a\ud800"' + "\n" + r'"b\ud83d\ude00"')
    assert [p["instruction"] for p in read_prompts(lines)] == ["a\ufffd", "b\U0001f600"]
    assert f"{lines}: 1 text holds half" in caplog.text


def test_home_folders_in_sources(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/a.csv", "harmful_test") == tmp_path / "a.csv"
    with pytest.raises(UserError, match=r"~nosuchuser/a\.csv: this machine knows no home folder for ~nosuchuser"):
        resolve("~nosuchuser/a.csv", "harmful_test")


def test_prompt_file_that_is_not_there(tmp_path):
    (tmp_path / "folder.json").mkdir()
    for name in ("gone.json", "folder.json"):
        with pytest.raises(UserError, match=rf"{name} is not a file\. Check the path"):
            read_prompts(tmp_path / name)


def test_written_prompts_are_read_back(tmp_path):
    prompts = [{"instruction": "é \u2028\n", "category": None}, {"instruction": "two", "category": "x"}]
    write_prompts(tmp_path / "a.json", prompts)
    assert read_prompts(tmp_path / "a.json") == prompts


def test_names_and_hashes(tmp_path):
    path = write(tmp_path, "jailbreakbench.csv", "goal\nx\n")
    assert dataset_name(str(path)) == "jailbreakbench" and dataset_name(BUNDLED) == "harmful"
    assert resolve(str(path), "harmful_test") == path and resolve(BUNDLED, "harmful_val").name == "harmful_val.json"
    assert file_hash(write(tmp_path, "abc", "abc")).startswith("ba7816bf8f01cfea414140de5dae2223")  # FIPS 180's example


def settings(folder, **more) -> DataSettings:
    return DataSettings.of({split: str(folder / f"{split}.json") for split in SPLITS} | more)


def paper_draws(sets) -> dict[str, list[str]]:
    """The published runs' draws: one seed, these sizes, this order."""
    random.seed(42)
    drawn = {
        name: random.sample(sets[name], count)
        for name, count in (("harmful_train", 128), ("harmless_train", 128), ("harmful_val", 32), ("harmless_val", 32))
    }
    return drawn | {"harmless_test": random.sample(sets["harmless_test"], 100)}


def test_sampling_follows_the_papers_stream(tmp_path):
    sizes = dict(zip(SPLITS, (260, 1500, 39, 600, 150, 600), strict=True))
    sets = {name: [f"{name} {i}" for i in range(size)] for name, size in sizes.items()}
    for name, rows in sets.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    drawn = {name: [p["instruction"] for p in rows] for name, rows in sample_prompts(settings(tmp_path)).items()}
    assert set(drawn) == set(SPLITS)
    for name, rows in paper_draws(sets).items():
        assert drawn[name] == rows
    assert drawn["harmful_test"] == sets["harmful_test"][:100]  # whole, in file order, cut
    other = sample_prompts(settings(tmp_path, seed=43))
    assert [p["instruction"] for p in other["harmful_train"]] != drawn["harmful_train"]


def test_small_sets_are_used_whole(tmp_path):
    for name in SPLITS:
        (tmp_path / f"{name}.json").write_text(json.dumps([f"{name} {i}" for i in range(5)]))
    drawn = sample_prompts(settings(tmp_path))
    assert {len(rows) for rows in drawn.values()} == {5}
    assert {p["instruction"] for p in drawn["harmless_val"]} == {f"harmless_val {i}" for i in range(5)}


@needs_splits
def test_sampling_of_the_public_splits():
    sizes = dict(zip(SPLITS, (260, 18793, 39, 6264, 572, 6266), strict=True))
    sets = {name: json.loads((SHARED / "data" / "splits" / f"{name}.json").read_text()) for name in SPLITS}
    assert {name: len(rows) for name, rows in sets.items()} == sizes
    drawn = sample_prompts(settings(SHARED / "data" / "splits"))
    for name, rows in paper_draws(sets).items():
        assert [p["instruction"] for p in drawn[name]] == [row["instruction"] for row in rows]


@needs_splits
def test_public_raw_files_are_read():
    files = [path for path in (SHARED / "data" / "raw").iterdir() if path.suffix in (".csv", ".json", ".txt")]
    assert files
    for path in files:
        prompts = read_prompts(path)
        assert len(prompts) > 10 and all(p["instruction"].strip() for p in prompts)


def row(position=-1, layer=5, bypass=0.0, induce=1.0, kl=0.05) -> dict:
    return {
        "position": position,
        "layer": layer,
        "refusal_score": bypass,
        "steering_score": induce,
        "kl_div_score": kl,
    }


VERDICTS = {
    "passes": ({}, ""),
    "limits are inclusive": ({"kl": 0.1, "induce": 0.0, "layer": 15}, ""),
    "layer": ({"layer": 16}, "layer"),
    "last layer": ({"layer": 19, "kl": math.nan}, "layer"),
    "kl": ({"kl": 0.1001}, "kl"),
    "induce": ({"induce": -0.0001}, "induce"),
    "induce before kl": ({"induce": -1.0, "kl": 1.0}, "induce"),
    "nan bypass": ({"bypass": math.nan}, "nan"),
    "nan induce": ({"induce": math.nan}, "nan"),
    "nan kl": ({"kl": math.nan}, "nan"),
    "not evaluated": ({"bypass": None, "kl": None, "induce": None}, ""),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_verdicts_of_the_rule(name):
    scores, verdict = VERDICTS[name]
    assert Rule(20).verdict(row(**scores)) == verdict


@pytest.mark.parametrize("layers", [6, 18, 24, 26, 28, 32, 40, 42, 60, 61, 80])
def test_pruned_layers_are_the_papers(layers):
    assert Rule(layers).layer_limit == int(0.8 * layers)
    assert Rule(layers, prune_fraction=0.0).layer_limit == layers


def test_pick_takes_the_lowest_bypass_that_passes():
    rows = [
        row(-1, 3, bypass=-2.0),
        row(-2, 4, bypass=-3.0),
        row(-1, 18, bypass=-9.0),
        row(-1, 6, bypass=-8.0, kl=0.2),
        row(-1, 7, bypass=-7.0, induce=-0.1),
        row(-1, 8, bypass=math.nan),
        row(-1, 9, bypass=None),
    ]
    assert pick(rows, Rule(20)) == rows[1]
    assert pick(rows, Rule(20, kl_threshold=0.3)) == rows[3]
    assert pick(rows, Rule(20, induce_threshold=-1.0)) == rows[4]
    assert pick(rows, Rule(20, prune_fraction=0.05)) == rows[2]


def test_ties_go_to_the_first_in_published_order():
    rows = [row(-1, 2), row(-2, 7), row(-2, 3), row(-1, 1)]
    assert pick(rows, Rule(20)) == rows[2]


def test_no_candidate_passes():
    rows = [
        row(layer=17),
        row(layer=16),
        row(kl=math.nan),
        row(-1, 4, induce=-3.0),
        row(-3, 4, kl=0.9, induce=2.0),
        row(-2, 5, kl=0.25, induce=1.5),
    ]
    message = (
        "of 6, 2 are at layer 16 or above, 1 have NaN scores, 1 have an induce score under 0.0, 2 of the rest a KL over "
        "0.1. Nearest: position -2, layer 5, induce 1.500, KL 0.2500."
    )
    with pytest.raises(NoDirection, match="No candidate direction passes the filter") as error:
        pick(rows, Rule(20))
    assert error.value.exit_code == 4 and error.value.why == "candidates"
    assert message in str(error.value)
    with pytest.raises(UserError, match="Nearest: position -1, layer 4, induce -3.000, KL"):
        pick(rows[:4], Rule(20))
    with pytest.raises(UserError, match=r"KL over 0\.1\. This model's refusal may not be"):
        pick(rows[2:3], Rule(20))


@needs_runs
@pytest.mark.parametrize(
    "name", ["gemma-2b-it", "llama-2-7b-chat-hf", "meta-llama-3-8b-instruct", "qwen-1_8b-chat", "yi-6b-chat"]
)
def test_pick_of_the_published_runs(name):
    folder = SHARED / "published" / name
    rows = json.loads((folder / "direction_evaluations.json").read_text())
    best = pick(rows, Rule(n_layers=1 + max(r["layer"] for r in rows)))
    assert {"pos": best["position"], "layer": best["layer"]} == json.loads(
        (folder / "direction_metadata.json").read_text()
    )


@pytest.mark.parametrize(
    "successes,n,low,high",  # Newcombe 1998 (Statistics in Medicine 17), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_interval_of_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("text", REFUSAL_SUBSTRINGS)
def test_refusals_are_found_anywhere_in_any_case(text):
    assert not substring_matching(f"Well, {text.upper()} do it.")
    assert not substring_matching(text)


def test_the_list_of_refusals_is_the_papers():
    assert len(set(REFUSAL_SUBSTRINGS)) == 12
    assert substring_matching("") and substring_matching("Sure, here is how. I could not agree more. I’m sorry")


def test_evaluations_have_the_published_format():
    replies = [("fraud", "I cannot."), ("fraud", "Sure."), ("arms", "Sure."), (None, "as an ai, no")]
    rows = [{"category": c, "prompt": "p", "response": r} for c, r in replies]
    out = evaluate_completions(rows, {"substring_matching": TEXT_JUDGES["substring_matching"].judge(rows)})
    assert out == {
        "substring_matching_success_rate": 0.5,
        "substring_matching_per_category": {"None": 0.0, "arms": 1.0, "fraud": 0.5},
        "completions": [{**r, "is_jailbreak_substring_matching": v} for r, v in zip(rows, (0, 1, 1, 0), strict=True)],
    }


def test_a_file_that_the_system_refuses(tmp_path):
    loop = tmp_path / "loop.txt"
    loop.symlink_to(loop)
    with pytest.raises(UserError, match=r"loop\.txt could not be read \(.+\)\. Check the path"):
        read_prompts(loop)

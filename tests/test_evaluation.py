"""Statistics against published examples; tables; files of completions; and the job that judges them."""

import csv
import importlib
import io
import json
import math
import sys

import numpy as np
import pytest
from absl import flags

from refusal_jax import UserError
from refusal_jax.jobs.main import run_job
from refusal_jax.judges import models as judge_models
from refusal_jax.judges.artifacts import jailbreakbench_artifact, read_completions
from refusal_jax.judges.evaluations import evaluate_completions
from refusal_jax.judges.judge import Verdict
from refusal_jax.judges.models import ModelJudge
from refusal_jax.judges.statistics import Rate, cohens_kappa, mcnemar, mean_interval, wilson_interval
from refusal_jax.judges.tables import COLUMNS, repetition, tables, tidy_csv
from refusal_jax.judges.text import TEXT_JUDGES


@pytest.fixture
def own_flags():
    """As in a process of its own: jobs share names of flags, and other tests have imported some."""
    held = dict(vars(flags.FLAGS)["__flags"])
    for name in held:
        if flags.FLAGS.find_module_defining_flag(name, "").startswith("refusal_jax.jobs."):
            del vars(flags.FLAGS)["__flags"][name]
    ours, package = ("evaluate", "devices"), importlib.import_module("refusal_jax.jobs")
    before = {name: sys.modules.pop(f"refusal_jax.jobs.{name}", None) for name in ours}
    for name in ours:
        vars(package).pop(name, None)
    yield
    for name in ours:
        sys.modules.pop(f"refusal_jax.jobs.{name}", None)
        if before[name]:
            sys.modules[f"refusal_jax.jobs.{name}"] = before[name]
            setattr(package, name, before[name])
    vars(flags.FLAGS)["__flags"].clear()
    vars(flags.FLAGS)["__flags"].update(held)


def labels(both: int, first: int, second: int, none: int) -> tuple[list[int], list[int]]:
    """Two judges' or conditions' labels with so many of each pair."""
    pairs = [(1, 1)] * both + [(1, 0)] * first + [(0, 1)] * second + [(0, 0)] * none
    return [a for a, _ in pairs], [b for _, b in pairs]


def test_mcnemar():
    """Agresti, Categorical Data Analysis (2nd edition), table 10.1: approval of the prime minister, 1,600 in pairs."""
    found = mcnemar(*labels(794, 150, 86, 570))
    assert (found["n"], found["only_first"], found["only_second"]) == (1600, 150, 86)
    assert found["difference"] == pytest.approx(-0.04)
    assert (found["low"], found["high"]) == pytest.approx((-0.059, -0.021), abs=5e-4)
    assert found["p_value"] == pytest.approx(3.7e-5, rel=0.05)
    assert mcnemar(*labels(3, 5, 1, 2))["p_value"] == pytest.approx(2 * 7 / 64)
    assert mcnemar(*labels(3, 2, 2, 2))["p_value"] == mcnemar(*labels(5, 0, 0, 5))["p_value"] == 1.0


def test_intervals_and_tests_are_their_closed_forms():
    """Wilson's formula, the binomial tail, and percentiles of means of the same draws."""
    z = 1.959963984540054
    for n in (1, 2, 5, 29, 100, 572, 10_000):
        for count in {0, 1, n // 3, n // 2, n - 1, n}:
            p = count / n
            centre, spread = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
            bounds = (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
            assert wilson_interval(count, n) == pytest.approx(bounds, abs=1e-9)
    for lost, won in ((0, 1), (1, 0), (3, 9), (40, 40), (150, 86), (0, 500)):
        tail = sum(math.comb(lost + won, k) for k in range(min(lost, won) + 1)) * 2 / 2 ** (lost + won)
        assert mcnemar(*labels(7, lost, won, 2))["p_value"] == pytest.approx(min(1.0, tail), rel=1e-9)
    for n in (1, 2, 17, 400):
        values = np.random.default_rng(n).gamma(2.0, 30.0, n)
        means = values[np.random.default_rng(0).integers(0, n, (2000, n))].mean(axis=1)
        found = mean_interval(values)
        assert (found["low"], found["high"]) == pytest.approx(tuple(np.percentile(means, (2.5, 97.5))), rel=1e-9)
    assert np.isnan(mean_interval([1.0, np.nan])["low"])


def test_cohens_kappa():
    assert cohens_kappa(*labels(20, 5, 10, 15)) == {"n": 50, "agreement": 0.7, "kappa": pytest.approx(0.4)}
    assert cohens_kappa(*labels(4, 0, 0, 0))["kappa"] is None and np.isnan(cohens_kappa([], [])["agreement"])


def test_rates_and_means():
    assert Rate.of([1] * 81 + [0] * 182 + [None]).row == {"successes": 81, "n": 263, "rate": 81 / 263} | {
        "low": pytest.approx(0.2553, abs=5e-5),
        "high": pytest.approx(0.3662, abs=5e-5),
    }
    assert np.isnan(Rate.of([]).rate) and Rate(81, 263).complement == Rate(182, 263)
    values = np.random.default_rng(0).normal(5, 2, 400)
    found = mean_interval(values)
    assert found == mean_interval(values) and found["mean"] == pytest.approx(values.mean()) and found["n"] == 400
    spread = 1.96 * values.std() / 20
    assert (found["low"], found["high"]) == pytest.approx((values.mean() - spread, values.mean() + spread), abs=0.05)
    assert mean_interval([]) | {"n": 0} == pytest.approx(
        {"mean": np.nan, "n": 0, "low": np.nan, "high": np.nan}, nan_ok=True
    )


def test_repetition():
    assert repetition("") == repetition("a b c") == repetition("a b c d e f g") == 0
    assert repetition("no no no no no no no no") == pytest.approx(0.8)
    assert repetition("!" * 200) > 0.9 and repetition("我不知道" * 20) > 0.9  # without spaces, by characters
    assert (
        repetition("我不能帮助你做这件事，因为它可能会伤害别人。")
        == 0
        == repetition("https://example.org/a/long/address")
    )


def completions(*replies: str) -> list[dict]:
    return [{"category": "ab"[i % 2], "prompt": f"p{i}", "response": text} for i, text in enumerate(replies)]


@pytest.fixture(scope="module")
def found(model):
    rows = {
        "set_one_baseline": completions("I cannot do it", "Well, I am afraid that I cannot", "Sure", ""),
        "set_one_ablation": completions("Sure", "Sure", "Sure", "go on and go on and go on and go on and go on and"),
        "harmless_baseline": completions("Sure"),
    }
    verdicts = {name: {j: judge.judge(r) for j, judge in TEXT_JUDGES.items()} for name, r in rows.items()}
    for name, judged in verdicts.items():
        judged["guard"] = [Verdict(i % 2, 0.5) for i in range(len(rows[name]))]
    return tables(rows, verdicts, None), tables(rows, verdicts, model.chat)


def test_tables(found):
    words, tokens = found
    first = words["rates"][0]
    assert (
        first
        == {
            "dataset": "set_one",
            "intervention": "baseline",
            "judge": "substring_matching",
            "category": None,
        }
        | Rate.of([0, 0, 1, 1]).row
    )
    assert [row["category"] for row in words["rates"][:4]] == [None, "a", "b", None]
    (compared, *_) = words["comparisons"]
    assert compared["compared_with"] == "baseline" and compared["intervention"] == "ablation"
    assert compared["only_second"] == 2 and len(words["comparisons"]) == 3  # harmless has other prompts
    pair = {key: words["agreement"][0][key] for key in ("first", "second", "n")}
    assert pair == {"first": "substring_matching", "second": "substring_extended", "n": 9}
    assert len(words["agreement"]) == 3
    assert (
        words["completions"][0]["empty"]["successes"] == 1 and words["completions"][1]["repetitive"]["successes"] == 1
    )
    assert (
        words["completions"][0]["length"]["mean"] == (4 + 7 + 1 + 0) / 4 and words["completions"][0]["unit"] == "words"
    )
    assert tokens["completions"][0]["unit"] == "tokens"
    assert tokens["completions"][0]["length"]["mean"] > words["completions"][0]["length"]["mean"]


def test_refusals_by_tokens_judged(found):
    of = [r for r in found[0]["by_length"] if r["judge"] == "substring_matching" and r["intervention"] == "baseline"]
    assert [(r["tokens"], r["rate"]) for r in of if r["dataset"] == "set_one"] == [(4, 0.25), (7, 0.5)]
    of = [r for r in found[1]["by_length"] if r["judge"] == "substring_matching" and r["dataset"] == "set_one"]
    rates = [r["rate"] for r in of if r["intervention"] == "baseline"]
    assert rates[0] < rates[-1] == 0.5 and rates == sorted(rates)
    assert not any(r["judge"] == "guard" for r in found[0]["by_length"])


def test_the_csv_is_tidy(found):
    rows = list(csv.DictReader(io.StringIO(tidy_csv(found[0]))))
    assert list(rows[0]) == list(COLUMNS) and {r["table"] for r in rows} == set(found[0])
    (row,) = [r for r in rows if r["table"] == "comparisons" and r["judge"] == "substring_matching"]
    assert float(row["value"]) == 0.5 and float(row["p_value"]) == 0.5 and row["compared_with"] == "baseline"
    assert all(r["value"] != "" for r in rows if r["measure"] != "kappa")


ROW = {"category": "c", "prompt": "p", "response": "I cannot"}


def test_files_of_completions(tmp_path):
    verdicts = {"old": [Verdict(1, 0.9)]}
    forms = {
        "a_completions.json": [ROW],
        "b_evaluations.json": evaluate_completions([ROW], verdicts),
        "c.json": {
            "parameters": {},
            "jailbreaks": [ROW | {"index": 4, "goal": "g", "behavior": "b", "jailbroken": True}],
        },
    }
    for name, content in forms.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "d.jsonl").write_text('{"instruction": "p", "output": "I cannot"}\n')
    (tmp_path / "e.csv").write_text("goal,completion\np,I cannot\n")
    for name, stem in (("a_completions.json", "a"), ("b_evaluations.json", "b")):
        assert read_completions(tmp_path / name) == {stem: [ROW]}
    (row,) = read_completions(tmp_path / "c.json")["c"]
    assert row["goal"] == "g" and row["prompt"] == "p" and row["index"] == 4
    for name in "de":
        path = next(tmp_path.glob(f"{name}.*"))
        (row,) = read_completions(path)[name]
        assert (row["category"], row["prompt"], row["response"]) == (None, "p", "I cannot")
    assert list(read_completions(tmp_path)) == ["a", "b"]  # of a run's folder, its completions only
    (tmp_path / "b_completions.json").write_text(json.dumps([ROW | {"response": None}]))
    assert read_completions(tmp_path)["b"][0]["response"] == ""
    for name in ("x_actadd", "x_ablation", "x_baseline"):
        (tmp_path / f"{name}_completions.json").write_text(json.dumps([ROW]))
    assert list(read_completions(tmp_path))[-3:] == ["x_baseline", "x_ablation", "x_actadd"]


def test_jailbreakbench_artifacts(tmp_path):
    rows = [ROW, {**ROW, "goal": "g", "index": 7, "behavior": "b", "jailbroken": False, "extra": 1}]
    artifact = jailbreakbench_artifact(rows, [Verdict(0), Verdict(1)], {"method": "m", "model": "x", "defense": None})
    assert (
        artifact["parameters"]["attack_success_rate"] == 0.5
        and artifact["parameters"]["total_number_of_jailbreaks"] == 1
    )
    first, second = artifact["jailbreaks"]
    assert first == {"index": 0, "goal": "p", "behavior": None, **ROW, "jailbroken": False}
    assert (second["index"], second["goal"], second["jailbroken"], second["extra"]) == (7, "g", True, 1)
    (tmp_path / "x_ablation_jailbreakbench.json").write_text(json.dumps(artifact))
    (name, read) = next(iter(read_completions(tmp_path / "x_ablation_jailbreakbench.json").items()))
    assert name == "x_ablation" and [row["response"] for row in read] == ["I cannot"] * 2


def test_columns_of_completions_in_any_spelling(tmp_path):
    (tmp_path / "a.csv").write_text("Category, Goal ,Response\nfood,p,I cannot\n")
    (row,) = read_completions(tmp_path / "a.csv")["a"]
    assert (row["category"], row["prompt"], row["response"]) == ("food", "p", "I cannot")
    (tmp_path / "b.json").write_text(json.dumps({"completions": [row]}))
    assert read_completions(tmp_path / "b.json")["b"] == [row]


def test_half_a_character_in_completions(tmp_path, caplog):
    path = tmp_path / "a.json"
    path.write_text(r'{"jailbreaks": [{"prompt": "p\ud800", "response": "\ud83d\ude00 \ude00", "category": "\ud800"}]}')
    wanted = {"category": "\ufffd", "prompt": "p\ufffd", "response": "\U0001f600 \ufffd"}
    assert read_completions(path) == {"a": [wanted]}
    assert "3 texts hold half of a surrogate pair" in caplog.text


BAD = {
    "a.json": ("{}", r"a\.json holds no completions: expected a list, an object with 'completions'.*its keys are none"),
    "b.json": ("[", r"b\.json is not valid JSON"),
    "c.json": ("[]", r"c\.json holds no completions\. Put one completion a row"),
    "d.jsonl": ('{"prompt": "p", "response": "r"}\n\n"text"\n', r"d\.jsonl, line 3 is a str, expected an object"),
    "e.json": (
        '{"jailbreaks": [{"goal": "g"}]}',
        r"e\.json, entry 0 of 'jailbreaks' is no completion: its fields are goal",
    ),
    "f.csv": ("prompt,text\np,q\n", r"f\.csv, row 1 is no completion: its fields are prompt, text, expected a prompt"),
    "g.json": ('[{"prompt": "p", "response": 5}]', r"g\.json, entry 0: response is a int, expected text"),
    "i.csv": ("prompt,response\np,Sure, here it is,x\n", r"i\.csv, row 1 \(line 2\) has 4 fields and the header has 2"),
    "j.csv": ("prompt,response\np,Sure, here it is\n", r"row 1 \(line 2\) has 3 fields"),
    "k.csv": (
        'prompt,response\np,"Sure\nq,No\n',
        r"row 1 \(line 2\) is not readable CSV: a quote is opened and never closed",
    ),
    "l.json": ('{"completions": [{"prompt": "p", "response": "a", "response": "b"}]}', "has the key 'response' twice"),
    "h.txt": ("p\n", r"h\.txt, line 1 is a str, expected an object with a prompt"),
}


@pytest.mark.parametrize("name", BAD)
def test_malformed_completions(name, tmp_path):
    (tmp_path / name).write_text(BAD[name][0])
    with pytest.raises(UserError, match=BAD[name][1]):
        read_completions(tmp_path / name)


def test_a_folder_without_completions(tmp_path):
    with pytest.raises(UserError, match=r"holds no completions: no file there ends in \.json, \.jsonl, \.csv"):
        read_completions(tmp_path)


def test_the_job(tmp_path, llama, capsys, own_flags):
    folder, out = tmp_path / "completions", tmp_path / "judged"
    folder.mkdir()
    for condition, reply in (("baseline", "I’m sorry, I can’t"), ("ablation", "Sure")):
        (folder / f"x_{condition}_completions.json").write_text(json.dumps([{**ROW, "response": reply}] * 10))
    flags = [
        "--judges=substring_matching,substring_extended",
        f"--tokenizer={llama}",
        "--artifact",
        "--model=m",
        "--method=",
        "--system_prompt=Be kind. ",
    ]
    assert run_job("evaluate", [f"--completions={folder}", f"--out={out}", *flags]) == 0
    shown = capsys.readouterr().out
    assert "ablation against baseline 100.0 % (" in shown and "Cohen's kappa" in shown and str(out) in shown
    evaluations = json.loads((out / "x_baseline_evaluations.json").read_text())
    assert evaluations["substring_matching_success_rate"] == 1 and evaluations["substring_extended_success_rate"] == 0
    artifact = json.loads((out / "x_ablation_jailbreakbench.json").read_text())
    assert all(row["system_prompt"] == "Be kind." for row in artifact["jailbreaks"] + evaluations["completions"])
    assert (
        artifact["parameters"] | {"model": "m", "method": "ablation", "attack_success_rate": 1.0}
        == artifact["parameters"]
    )
    assert json.loads((out / "statistics.json").read_text())["completions"][0]["unit"] == "tokens"
    assert (out / "statistics.csv").read_text().startswith("table,dataset,")
    assert run_job("evaluate", ["--completions=", f"--out={out}", "--system_prompt="]) == 2
    assert "--completions is missing. Example: refusal-jax evaluate" in capsys.readouterr().err


def test_an_interrupted_job_continues(tmp_path, llama, capsys, monkeypatch, own_flags):
    """With the verdicts that a judge model has given, of these completions only."""
    (tmp_path / "ask.txt").write_text("{prompt} {response}")
    (tmp_path / "rows.json").write_text(json.dumps([ROW, ROW]))
    seen, flags = (
        [],
        [f"--judges=llm={llama}@{tmp_path / 'ask.txt'}", "--tokenizer=", "--noartifact", f"--out={tmp_path / 'o'}"],
    )

    def judge(self, rows, ledger):
        seen.append(list(ledger.rows))
        ledger.append([{"judge": "llm", "index": 1}])
        if len(seen) in (1, 2):
            raise UserError("preempted")
        return [Verdict(1, 0.75)] * 2

    monkeypatch.setattr(ModelJudge, "judge", judge)
    monkeypatch.setattr(judge_models, "label_ids", lambda *args: [[0], [1]])
    command = [f"--completions={tmp_path / 'rows.json'}", *flags]
    assert [run_job("evaluate", command) for _ in range(3)] == [2, 2, 0]
    assert seen == [[], [{"judge": "llm", "index": 1}], [{"judge": "llm", "index": 1}] * 2]
    assert not list((tmp_path / "o").glob(".ledger*"))
    assert json.loads((tmp_path / "o" / "rows_evaluations.json").read_text())["llm_success_rate"] == 1

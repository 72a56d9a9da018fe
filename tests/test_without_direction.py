"""Studies that find no direction: what they leave, how they are continued, and what is said of their folders."""

import json
import re

import pytest
from test_report import REFUSAL, judged

from refusal_jax import UserError
from refusal_jax.chat.refusal_tokens import Opening
from refusal_jax.conditions import Condition, Dataset
from refusal_jax.directions import direction_file
from refusal_jax.errors import NoDirection
from refusal_jax.export.finished import FinishedStudy
from refusal_jax.report.text import text_summary
from refusal_jax.report.verdict import Concern, verdict_without_direction
from refusal_jax.runs.artifacts import CANDIDATES, FILTER, MEANS, NO_DIRECTION, REPORT, SETUP
from refusal_jax.study import completions, directions
from refusal_jax.study.rule import LOOSENING, Rule, nearest_misses
from refusal_jax.study.scoring import PromptScorer
from refusal_jax.study.study import SECTIONS, run_study

BASELINES = {"harmful_test_baseline", "harmless_baseline"}


@pytest.fixture
def config(small_study):
    """No candidate passes."""
    small_study.select.kl_threshold = -1.0
    small_study.generation.conditions = ("harmful_baseline", "harmful_ablation")
    return small_study


def fails(config, folder, message: str) -> NoDirection:
    with pytest.raises(NoDirection, match=message) as caught:
        run_study(config, folder)
    assert caught.value.exit_code == 4
    return caught.value


def files(folder) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if name not in ("manifest.json", "log.txt", ".lock", REPORT)}


def page(folder) -> str:
    return " ".join((folder / REPORT).read_text().split())


def test_no_candidate_passes_and_other_thresholds_are_tried(config, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    error = fails(config, folder, r"No candidate direction passes the filter: .* KL over -1\.0\. Nearest: position")
    stems = {path.name.removesuffix("_completions.json") for path in folder.glob("completions/*_completions.json")}
    assert stems == BASELINES  # of both sides, although the settings name one
    assert not list(folder.glob("direction.safetensors")) and not (folder / "damage.json").exists()
    told = json.loads((folder / NO_DIRECTION).read_text())
    assert told == error.record and told["why"] == "candidates"
    stages = json.loads((folder / "manifest.json").read_text())["stages"]
    assert [name for name in stages if "skipped" in stages[name]] == ["projections", "loss"]
    assert stages["loss"]["skipped"] == "The study found no direction."
    html = page(folder)
    for words in (
        "No direction",
        "The nearest candidates",
        "the KL divergence is too high by",
        LOOSENING["kl_threshold"],
    ):
        assert words in html
    assert "Loss on other text" not in html and "Geometry" not in html and "refuses 0 of 3 harmful requests" in html
    text = text_summary(error.run, SECTIONS)
    assert "it passes with config.select.kl_threshold=" in text and "cross-entropy" not in text

    before = files(folder), (folder / REPORT).read_bytes()
    assert fails(config, folder, "No candidate").run.worked == []
    assert (files(folder), (folder / REPORT).read_bytes()) == before

    config.select.kl_threshold = 1e9
    generated, reply = [], completions.complete
    monkeypatch.setattr(
        completions, "complete", lambda *args, **more: generated.append(len(more["known"])) or reply(*args, **more)
    )
    scored, score = [], PromptScorer.ablated
    monkeypatch.setattr(PromptScorer, "ablated", lambda self, rows: scored.append(len(rows)) or score(self, rows))
    worked = run_study(config, folder).worked
    assert worked == ["selection", "projections", "completions", "loss", "evaluations", "report"]
    assert generated == [3] and sum(scored) == 10  # what the first attempt left out: of 15, 5 had all scores
    monkeypatch.undo()
    run_study(config, tmp_path / "fresh")
    ours, theirs = files(folder), files(tmp_path / "fresh")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name] and name != CANDIDATES] == []
    config.select.kl_threshold = 1e8
    with pytest.raises(UserError, match="holds a run of another study: select.kl_threshold was"):
        run_study(config, folder)


def test_no_refusal_tokens_in_the_data(config, tmp_path, monkeypatch):
    config.update(refusal_tokens=(), judges=("refusal_score",))
    monkeypatch.setattr(directions, "measure_openings", lambda *args: [Opening(40, "<b>I", 0.2, 0.2)])
    error = fails(config, tmp_path / "run", r"No usual beginning of a reply tells .*'<b>I' 0\.200 and 0\.200")
    assert error.why == "refusal_tokens" and "such as ('I',)" in error.remedy
    assert not {FILTER, MEANS, CANDIDATES} & files(tmp_path / "run").keys()
    html = page(tmp_path / "run")
    assert "Beginnings of replies" in html and "&lt;b&gt;I" in html and "<b>I" not in html
    assert "substring_matching" in html and 'href="#selection"' not in html  # no score to judge by, no maps
    assert "Refusal tokens, from data" in text_summary(error.run, SECTIONS)
    config.refusal_tokens = ("I",)
    worked = fails(config, tmp_path / "run", "No candidate").run.worked
    assert worked == ["activations", "selection", "completions", "evaluations", "report"]  # with refusal scores now


def test_the_filter_keeps_nothing(config, tmp_path, monkeypatch):
    config.update(filter=True)
    error = fails(
        config, tmp_path / "none", r"none of the 6 prompts of 'harmful_train and harmful_val': no harmful prompt is"
    )
    assert error.why == "filter" and "Beginnings of replies" in page(tmp_path / "none")
    assert json.loads((tmp_path / "none" / SETUP).read_text())["refusal_tokens_from"] == "config"
    assert MEANS not in files(tmp_path / "none")
    every = tuple(range(json.loads((tmp_path / "none" / SETUP).read_text())["d_model"] * 10))
    monkeypatch.setattr(directions, "refusal_tokens", lambda study: (every, []))
    fails(
        config,
        tmp_path / "all",
        r"no harmless prompt is complied with .*the harmless side needs < 0.*refuse everything",
    )


def test_folders_without_a_direction_are_told_apart(tmp_path):
    (tmp_path / NO_DIRECTION).write_text(json.dumps({"claim": "Nothing was refused."}))
    message = "found no direction, so there is nothing to take from it: Nothing was refused. Its report.html shows"
    with pytest.raises(UserError, match=message):
        FinishedStudy.read(tmp_path, 1)
    with pytest.raises(UserError, match=message):
        direction_file(tmp_path)


def row(position, layer, induce, kl=None, bypass=None) -> dict:
    return dict(position=position, layer=layer, steering_score=induce, kl_div_score=kl, refusal_score=bypass)


def test_nearest_misses():
    rows = [
        row(-1, 0, -0.001),  # at the template's own tokens: no direction
        row(-1, 3, 1.0, 0.1501),
        row(-1, 4, 2.0, 0.125, -1.0),
        row(-1, 5, -0.127, 0.3),
        row(-2, 5, -0.5),
        row(-1, 8, 1.0, 0.01, -2.0),
        row(-2, 8, -1.0, 0.01, -2.0),
        row(-2, 9, None),
    ]
    found = nearest_misses(rows, Rule(10))
    assert [miss.row for miss in found] == [rows[2], rows[1], rows[3], rows[4], rows[5]]
    assert [miss.flags for miss in found] == [
        "config.select.kl_threshold=0.125",
        "config.select.kl_threshold=0.151",
        "config.select.induce_threshold=-0.13 config.select.kl_threshold=0.3",
        "config.select.induce_threshold=-0.5",
        "config.select.prune_fraction=0.099",
    ]
    assert found[2].words == "the induce score is too low by 0.127 and the KL divergence is too high by 0.2"
    assert found[4].words == "the layer is too late by 1"
    for miss in found:  # the settings that are named let the candidate pass
        needed = {shortfall.setting: shortfall.needed for shortfall in miss.shortfalls}
        assert Rule(10, **needed).verdict(miss.row) == ""


@pytest.mark.parametrize("layers", [6, 24, 30, 32, 80])
def test_the_pruned_fraction_that_lets_a_layer_pass(layers):
    for layer in range(int(0.8 * layers), layers):
        (shortfall,) = Rule(layers).shortfalls(row(-1, layer, 1.0, 0.0, 0.0))
        assert Rule(layers, prune_fraction=shortfall.needed).layer_limit > layer


@pytest.mark.parametrize(
    ("harmful", "harmless", "strength", "words"),
    [
        ((1, 100), (0, 100), "weak", "there is little refusal for one to mediate: this model refuses 1 of 100 harmful"),
        ((3, 10), (0, 10), "none", "and no verdict: .* 10 prompts cannot tell how often it refuses"),
        ((60, 100), (50, 100), "weak", "refusal does not tell harmful from harmless requests"),
        (
            (60, 100),
            (2, 100),
            "weak",
            "although it refuses: this model refuses 60 of 100 .* does not show that there is none",
        ),
    ],
)
def test_the_verdict_says_what_intervals_allow(harmful, harmless, strength, words):
    sides = {"harmful": harmful, "harmless": harmless}
    conditions = [
        judged(side, "baseline", [REFUSAL] * few + ["Sure, here it is."] * (n - few))
        for side, (few, n) in sides.items()
    ]
    judges = ["substring_matching"]
    found = verdict_without_direction(conditions, judges, "nothing passes")
    assert found[0] == strength and "nothing passes" in found[1]
    assert re.search(words, found[1]), found[1]
    decisive = [Concern("The judge sees nothing.", "Read them.", decisive=True)]
    text = verdict_without_direction(conditions, judges, "nothing passes", decisive)[1]
    assert text.startswith("No verdict, because this run contradicts itself.") == (strength != "none")
    assert "How often this model refuses was not judged" in verdict_without_direction([], [], "nothing passes")[1]


def test_only_the_baseline_needs_no_direction(model):
    baseline = Condition.parse("harmful_baseline", {"harmful": Dataset("harmful", "harmful", True)})
    assert not baseline.edits(None, model.config).in_force_r.any()

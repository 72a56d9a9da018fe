"""The parts of damage after the grid: the search and its test, correct answers, replies as texts, weights really edited."""

import json
import re
import shutil
import types

import numpy as np
import pytest

from refusal_jax import UserError, demo_model_path
from refusal_jax.damage.points import Point, points_of
from refusal_jax.damage.search import Space, Trial, propose
from refusal_jax.export.partial import held, is_held
from refusal_jax.judges.behaviours import REFUSAL
from refusal_jax.mechanism.edited_prompts import fitting
from refusal_jax.report.findings import Findings
from refusal_jax.runs.artifacts import ANSWER_COSTS, EDITED, FRONT, GRID, TEXTS
from refusal_jax.runs.run import Run, recorded_manifest
from refusal_jax.study.damage import answers, front, texts, weights
from refusal_jax.study.damage.answers import headline
from refusal_jax.study.damage.front_page import sentence
from refusal_jax.study.damage.run import run_damage
from refusal_jax.study.damage.settings import DamageSettings
from refusal_jax.study.damage.shared import DamageStudy

SETTINGS = {
    "parts": ("answers", "texts", "weights"),
    "grid": {"steps": 1, "most": 1.0, "places": ("all@all",), "n_prompts": 6, "n_texts": 4},
    "front": {"trials": 8, "plain": 2, "batch": 2, "start": 4, "n_prompts": 4},
    "answers": {"n_items": 4},
    "texts": {"at": ("all@all=1",), "n_prompts": 2, "max_new_tokens": 4},
    "weights": {"at": ("all@all=0.5",), "n_prompts": 4},
}


@pytest.fixture(scope="module")
def parts(demo_study, tmp_path_factory):
    """A study with all parts, whose search was interrupted once."""
    folder = shutil.copytree(demo_study, tmp_path_factory.mktemp("parts") / "run")
    real, proposed = front.propose, []

    def stop(space, done, *more):
        proposed.append(len(done))
        if proposed == [3, 5]:
            raise KeyboardInterrupt
        return real(space, done, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(front, "propose", stop)
        with pytest.raises(KeyboardInterrupt):
            run_damage(SETTINGS, folder)
        run = run_damage(SETTINGS, folder)
    assert run.worked == ["front", "texts", "weights", "report", "figures of damage"] and proposed == [3, 5, 5, 7]
    return folder


def told(folder, name):
    return json.loads((folder / name).read_text())


def test_what_is_chosen_on_validation_is_measured_on_test(parts):
    found = told(parts, FRONT)
    assert found["prompts"] == {"val": {"harmful": 4, "harmless": 4}, "test": {"harmful": 6, "harmless": 6}}
    assert len(found["trials"]) == 8 and found["trials"][0] == {
        "values": found["trials"][0]["values"],
        "refused": 1.0,
        "damage": pytest.approx(0, abs=1e-9),
    }
    points = {point["name"]: point for point in found["points"]}
    assert points["baseline"]["measures"]["refused"]["n"] == 6 and points["ablation"]["measures"]["kl"]["mean"] > 0
    for row in found["levels"]:
        best = found["points"][row["point"]]
        trial = found["trials"][best["trial"]]
        fitting = [one for one in found["trials"] if one["refused"] <= row["level"]]
        assert trial["damage"] == min(one["damage"] for one in fitting) and best["best"]
        rate = best["measures"]["refused"]
        assert "%" in sentence(row, found, REFUSAL) and "validation prompts refused: " in sentence(row, found, REFUSAL)
        assert row["holds"] == (True if rate["high"] <= row["level"] else False if rate["low"] > row["level"] else None)


def test_levels_in_words(parts):
    found = told(parts, FRONT)
    row = found["levels"][0]
    assert "none of 8 partial ablations comes to that" in sentence(row | {"point": None}, found, REFUSAL)
    assert "No single strength at all layers comes to that level" in sentence(row | {"plain": None}, found, REFUSAL)
    already = found | {"trials": [found["trials"][0] | {"refused": 0.25}, *found["trials"][1:]]}
    assert "the unedited model is at that level already (25 %)" in sentence(row, already, REFUSAL)


def test_correct_answers_of_the_grid(parts):
    found = told(parts, ANSWER_COSTS)
    (bundled,) = found["sets"]
    assert (bundled["name"], bundled["answers"], len(bundled["rows"])) == ("bundled", 4, 2)
    assert "Fewer than 20 answers make these intervals too narrow" in headline(found, told(parts, GRID), bundled)
    assert bundled["rows"][0]["perplexity"]["mean"] < 1.1 and bundled["rows"][0]["perplexity"]["factor"]["mean"] == 1


def test_replies_as_texts(parts):
    found = told(parts, TEXTS)
    assert [point["name"] for point in found["points"]][:2] == ["baseline", "all@all=1"] and len(found["points"]) > 2
    for side in ("harmful", "harmless"):
        one = found["sides"][side]
        assert {"empty", "broken", "hedges", "tokens", "limit"} <= {measure["name"] for measure in one["measures"]}
        assert one["rows"][0]["tokens"]["mean"] == 4 and one["rows"][0]["limit"]["rate"] == 1 and "replies" not in one


def test_weights_that_hold_it_do_the_same(parts):
    rows = {row["name"]: row for row in told(parts, EDITED)["rows"]}
    assert not rows["all@all=0.5"]["held"] and not rows["all@all=0.5"]["same"]
    for name, row in rows.items():
        if name != "all@all=0.5":
            assert row["held"] and row["same"] and row["largest_logit"] < 1e-4
    assert len(rows) > 1


def test_the_interrupted_search_is_that_of_one_run(parts):
    """Its trials are those that are proposed after all trials before them."""
    trials = [Trial(**row) for row in told(parts, FRONT)["trials"]]
    for start, count in ((3, 2), (5, 2), (7, 1)):
        values = [trial.values for trial in trials[start : start + count]]
        assert propose(Space(8, 1.5), trials[:start], count, 0, 4) == values


def test_the_report_has_a_section_for_each_part(parts):
    page = (parts / "report.html").read_text()
    assert all(f'id="damage-{name}"' in page for name in ("front", "answers", "texts", "weights"))
    manifest = recorded_manifest(parts)
    with Run.open(parts, manifest["config"], manifest["inputs"]) as run:
        findings = Findings(run, [stage.STAGE.section for stage in (front, answers, texts, weights)])
        lines = "\n".join(line for section in findings.sections for line in section.lines(findings))
    for words in ("searched on 4 and 4", "4 answers of bundled", "Replies to harmless prompts", "the same as"):
        assert words in lines


def test_batches_that_were_cut_off_are_made_again():
    row = {"trial": {"values": {}, "refused": 1.0, "damage": 0.0}}
    rows = [row | {"number": number} for number in range(8)]
    assert [len(front.whole_batches(rows[:n], 3, 4)) for n in (0, 2, 3, 6, 7, 8)] == [0, 0, 3, 3, 7, 7]


def test_what_weights_hold():
    whole = np.ones((3, 3))
    assert is_held(whole) and not is_held(0.5 * whole) and is_held(held(0.5 * whole))
    assert held(whole).tolist() == [[1, 1, 1], [0, 1, 1], [0, 1, 1]]


def test_points_are_places_with_strengths():
    (found,) = points_of(["written@50%-100%=0.75"], 4, "texts.at")
    assert found.label == "written, layers 2 to 3, strength 0.75" and Point.of(found.row).partial == found.partial
    for name in ("written@all", "written@all=0", "written@all=x"):
        with pytest.raises(UserError, match=r"texts\.at names 'written@all.*Write PLACE=STRENGTH"):
            points_of([name], 4, "texts.at")
    with pytest.raises(UserError, match=r"texts\.at names 'writen@all', and 'writen' is no site"):
        points_of(["writen@all=1"], 4, "texts.at")


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"front": {"batch": 0}}, r"front\.batch = 0, .* give at least 1 of each, and a largest strength above 0"),
        ({"front": {"trials": 12}}, r"front\.trials = 12 leaves none to search after the 13 of one strength"),
        ({"front": {"levels": (1.5,)}}, r"front\.levels = \(1\.5,\): a level is a share of refused prompts"),
        ({"answers": {"n_items": 0}}, r"answers\.n_items = 0: give at least 1"),
        ({"texts": {"n_prompts": 0}}, r"texts\.n_prompts = 0 and .*texts\.max_new_tokens = 128: give at least 1"),
        ({"weights": {"n_prompts": 0}}, r"weights\.n_prompts = 0 and .*weights\.largest = 8\.0: give at least"),
    ],
)
def test_settings_that_leave_nothing_to_do(settings, message):
    with pytest.raises(UserError, match=message):
        DamageSettings.of(settings).check(())


@pytest.mark.usefixtures("unchecked")
def test_weights_that_are_not_written(monkeypatch, tmp_path):
    study = types.SimpleNamespace(without_tokens="", folder=demo_model_path(), settings=DamageSettings())
    assert weights.STAGE.skipped(study) == ""
    study.settings.weights.largest = 0.001
    assert "The weights take 0.0 GiB, and at most 0.001 GiB are written" in weights.STAGE.skipped(study)
    study.folder = tmp_path
    assert "The weights cannot be edited. " in weights.STAGE.skipped(study)
    monkeypatch.setattr(weights.distributed, "several", lambda: True)
    assert "run this part alone on one host" in weights.STAGE.skipped(study)


def test_answers_that_do_not_fit(parts, tmp_path):
    folder = shutil.copytree(parts, tmp_path / "run")
    (tmp_path / "long.jsonl").write_text(json.dumps({"question": "bake " * 3000, "answer": "bread"}) + "\n")
    with pytest.raises(UserError, match=r"none of its first 1 questions leaves room for its answer"):
        run_damage(SETTINGS | {"parts": ("answers",), "answers": {"sets": (str(tmp_path / "long.jsonl"),)}}, folder)


def test_answers_of_a_study_without_any(monkeypatch):
    """With neither sets of questions nor replies at baseline the part is left out, and the reason names the setting."""
    study = object.__new__(DamageStudy)
    study.settings, study.config = DamageSettings(), types.SimpleNamespace(model="M")
    monkeypatch.setattr(answers, "own_answers", lambda study: [])
    assert re.search(r"Name sets of questions with their answers in \S*answers\.sets", answers.STAGE.skipped(study))
    study.config.model = ""  # the embedded model has bundled ones
    assert answers.STAGE.skipped(study) == "" and fitting(0, 16) == (8, 2)

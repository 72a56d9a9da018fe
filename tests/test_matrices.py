"""Directions of other prompts and models: cosines with what sampling allows, refusals that ablation leaves, and bad input."""

import json
import math
import shutil

import numpy as np
import pytest

from refusal_jax import UserError
from refusal_jax.chat.refusal_tokens import Opening
from refusal_jax.mechanism.likeness import Sample, cosine_between, cosine_of
from refusal_jax.runs.artifacts import MATRICES, MATRIX_DIRECTIONS, PROMPTS
from refusal_jax.study.mechanism import compared, matrices
from refusal_jax.study.mechanism.run import run_mechanism


def drawn(rng, true_d, n=40, spread=1.0) -> Sample:
    """A sample of prompts whose true difference in means is `true_d`."""
    shape = (n, len(true_d))
    return Sample(true_d + spread * rng.normal(size=shape), spread * rng.normal(size=shape))


def test_reliability_is_that_of_split_halves():
    """It is the cosine of two samples of one direction, and what Spearman and Brown make of random halves."""
    rng, true_d = np.random.default_rng(0), np.full(60, 0.3)
    samples = [drawn(rng, true_d) for _ in range(40)]
    cosines = [cosine_of(a.direction_d, b.direction_d) for a, b in zip(samples[::2], samples[1::2], strict=True)]
    assert np.mean([one.reliability for one in samples]) == pytest.approx(np.mean(cosines), abs=0.06)
    one, halves = samples[0], []
    for _ in range(200):
        order, other = rng.permutation(40), rng.permutation(40)
        parts = [Sample(one.harmful_nd[order[i::2]], one.harmless_md[other[i::2]]).direction_d for i in (0, 1)]
        halves.append(cosine_of(*parts))
    half = float(np.mean(halves))
    assert one.reliability == pytest.approx(2 * half / (1 + half), abs=0.03)
    assert drawn(rng, np.zeros(60)).reliability < 0.3 and Sample(np.zeros((2, 3)), np.zeros((2, 3))).reliability == 0


def test_intervals_of_cosines_cover():
    rng, first_d = np.random.default_rng(1), np.full(20, 1.0)
    second_d = first_d * np.where(np.arange(20) < 15, 1, -1)
    inside, fixed = 0, 0
    for _ in range(60):
        found = cosine_between(drawn(rng, first_d), drawn(rng, second_d))
        inside += found["low"] <= 0.5 <= found["high"]
        assert found["low"] <= found["mean"] <= found["high"] and 0.92 < found["ceiling"] < 0.97
        one = cosine_between(first_d, drawn(rng, second_d))
        fixed += one["low"] <= 0.5 <= one["high"]
        assert math.isnan(one["ceiling"])
    assert inside >= 50 and fixed >= 50
    assert cosine_between(first_d, first_d)["mean"] == pytest.approx(1)
    assert math.isnan(float(cosine_of(np.zeros(3), np.ones(3))))


def test_left_out_prompts():
    one = drawn(np.random.default_rng(0), np.ones(5), n=4)
    harmful, harmless = one.left_out()
    np.testing.assert_allclose(harmful[1], Sample(np.delete(one.harmful_nd, 1, 0), one.harmless_md).direction_d)
    np.testing.assert_allclose(harmless[2], Sample(one.harmful_nd, np.delete(one.harmless_md, 2, 0)).direction_d)


@pytest.fixture(scope="module")
def files(demo_study, tmp_path_factory):
    """Files of prompts: the study's own training prompts, as another set."""
    folder, prompts = tmp_path_factory.mktemp("sets"), json.loads((demo_study / PROMPTS).read_text())
    for side in ("harmful", "harmless"):
        rows = [row["instruction"] for row in prompts[f"{side}_train"]]
        (folder / f"{side}.json").write_text(json.dumps(rows))
        (folder / f"few_{side}.txt").write_text("\n".join(rows[:3]))
    np.save(folder / "narrow.npy", np.ones(5))
    return folder


def test_matrices_of_a_study(demo_study, files, tmp_path):
    folder = shutil.copytree(demo_study, tmp_path / "run")
    other = shutil.copytree(demo_study, tmp_path / "other")
    settings = {
        "sets": (f"again={files}/harmful.json+{files}/harmless.json",),
        "directions": (f"<b>={other}",),
    }
    run = run_mechanism({"parts": ("matrices",), "matrices": settings}, folder)
    found, directions = json.loads((folder / MATRICES).read_text()), run.read_tensors(MATRIX_DIRECTIONS)
    assert found["names"] == ["study", "again", "<b>"] and {*found["names"]} == {*directions}
    pairs = {(row["first"], row["second"]): row for row in found["cosines"]}
    assert pairs["study", "<b>"]["mean"] == pytest.approx(1) and pairs["study", "<b>"]["ceiling"] is None
    assert pairs["study", "again"]["mean"] == pytest.approx(
        float(cosine_of(*(directions[name].astype(float) for name in ("study", "again")))), abs=1e-3
    )
    assert 0.5 < pairs["study", "again"]["ceiling"] < 1
    assert [one["refused"]["n"] for one in found["sets"]] == [12, 8]
    for cell in found["left"]:
        refused = next(one["refused"] for one in found["sets"] if one["name"] == cell["set"])
        assert cell["n"] == refused["successes"] >= 6 and cell["rate"] < 0.5 < cell["high"] + 0.5
    page = (folder / "report.html").read_text()
    assert 'id="matrices"' in page and "&lt;b&gt;" in page and "<td><b></td>" not in page
    # Without anything to compare it stays as it is, and what was given before still counts.
    assert run_mechanism({"parts": ("matrices",)}, folder).worked == []


@pytest.mark.parametrize(
    "sets,directions,message",
    [
        (("de",), (), r"matrices.sets has 'de', expected NAME=HARMFUL\+HARMLESS"),
        (("=a+b",), (), "matrices.sets has '=a.b', expected"),
        (("de=a.csv",), (), r"gives 'de' 1 names of prompts \('a.csv'\), and a set has two"),
        (("de=a.csv+",), (), "gives 'de' 1 names of prompts"),
        (("de=a+b+c",), (), "gives 'de' 3 names of prompts"),
        (("de={0}/harmful.json+{0}/harmless.json",) * 2, (), "has the name 'de' twice"),
        (("study=a+b",), (), "calls something 'study', which is the name of the study's own"),
        (("de={0}/no.csv+{0}/harmless.json",), (), r"The set 'de' names .*no\.csv, which is not a file"),
        (("de={0}/few_harmful.txt+{0}/harmless.json",), (), "has 3 harmful prompts .* at least 8 are needed"),
        (("de={0}/harmful.json+{0}/few_harmless.txt",), (), "has 3 harmless prompts .* at least 8 are needed"),
        (
            (),
            ("a={0}/narrow.npy",),
            "has 5 entries, and the model's residual stream has 128: it belongs to another model",
        ),
        ((), ("a={0}/narrow.npy", "a={0}/narrow.npy"), "matrices.directions has the name 'a' twice"),
        ((), ("a={0}/none.npy",), "none.npy is not a file"),
    ],
)
def test_bad_input(demo_study, files, tmp_path, sets, directions, message):
    folder = shutil.copytree(demo_study, tmp_path / "run")
    settings = {
        name: tuple(v.format(files) for v in values) for name, values in (("sets", sets), ("directions", directions))
    }
    with pytest.raises(UserError, match=message):
        run_mechanism({"parts": ("matrices",), "matrices": settings}, folder)


def test_directions_of_other_widths(demo_study, tmp_path):
    """A study of another width has a row of its own, with its refusal rates; it is not compared."""
    folder = shutil.copytree(demo_study, tmp_path / "run")
    (found,) = compared.other_directions([f"wide={folder}"], 64, 4)
    row = matrices.other_row(found, 64)
    assert not row["fits"] and row["width"] == 128 and row["refused"]["baseline"]["n"] == 12
    notes = matrices.notes({"sets": [], "others": [row]})
    assert notes == ["wide has width 128, so that it has only a row of its own and is not compared."]


def test_nothing_to_compare(demo_study, tmp_path):
    folder = shutil.copytree(demo_study, tmp_path / "run")
    run = run_mechanism({"parts": ("matrices",)}, folder)
    assert run.manifest["stages"]["matrices"]["skipped"].startswith("Nothing to compare was given: ")


def test_notes_and_words():
    few = {"name": "de", "refused": {"successes": 2}, "tokens_found": False}
    assert [text[:30] for text in matrices.notes({"sets": [few], "others": []})] == [
        "The model refuses only 2 promp",
        "No token tells refusals of de ",
    ]
    few["refused"]["successes"] = 0
    assert matrices.notes({"sets": [few], "others": []})[0].startswith("The model refuses no prompt of de, so")
    letter, refusal = Opening(1, "Dear", 0.125, 0.0), Opening(2, "I", 0.6, 0.1)
    assert matrices.usual_openings([letter, refusal], 8) == [2] and matrices.usual_openings([letter], 32) == [1]
    assert (
        matrices.share({"rate": None}) == "none refused" and matrices.cosine_in_words({"mean": None}) == "not defined"
    )

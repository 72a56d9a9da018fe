"""Parts of the mechanism that find directions in other ways, and the table that compares them, on the embedded model."""

import json
import shutil

import numpy as np
import pytest

from refusal_jax import demo_model_path, load_model, make_mesh
from refusal_jax.directions import Direction, read_direction
from refusal_jax.mechanism.cone_targets import NoTargets, cone_data
from refusal_jax.plan.programs import Shapes, Sizes, Workload, programs
from refusal_jax.report.findings import Findings
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.run import Run, read_manifest
from refusal_jax.study.config import StudyConfig, get_config
from refusal_jax.study.mechanism import alternatives, cones, cosmic, som
from refusal_jax.study.mechanism.run import MECHANISM, run_mechanism
from refusal_jax.study.mechanism.settings import MechanismSettings
from refusal_jax.study.mechanism.shared import MechanismStudy

PARTS = ("cosmic", "som", "cones", "alternatives")
QUICK = {
    "parts": PARTS,
    "som": {"side": 2, "steps": 200, "most": 2},
    "cones": {"dimensions": 2, "steps": 4, "drawn": 3, "target_tokens": 8},
    "alternatives": {"max_new_tokens": 8},
}


@pytest.fixture(scope="module")
def done(demo_study, tmp_path_factory):
    """The folder of a study with all parts done, quickly."""
    folder = tmp_path_factory.mktemp("alternatives") / "run"
    shutil.copytree(demo_study, folder)
    run = run_mechanism(QUICK, folder)
    assert run.worked == [*PARTS, "report", "figures"]
    return folder


def read(folder, name) -> dict:
    return json.loads((folder / "mechanism" / f"{name}.json").read_text())


def test_the_table_has_a_row_for_each_way(done):
    found = read(done, "alternatives")
    names = [row["name"] for row in found["rows"]]
    assert names[:3] == ["difference in means", "COSMIC's selection", "by gradient (RDO)"]
    assert names[-1].startswith("map (SOM)") and len(names) in (4, 5)
    own = found["rows"][0]
    assert own["cosine"] == pytest.approx(1) and own["difference"]["mean"] == 0
    assert own["ablated"]["rate"] < found["unedited"]["harmful ablated"]["rate"]
    for row in found["rows"]:
        assert 0 <= row["kept"]["rate"] <= 1 and row["kl"]["mean"] >= 0 and row["ablated"]["n"] == 12
        assert (row["added"] is None) == (row["directions"] > 1 or row["name"].startswith("cone"))
    text = (done / "mechanism" / "alternatives.json").read_text() + (done / "mechanism" / "cones.json").read_text()
    prompts = json.loads((done / "prompts.json").read_text())
    assert not any(row["instruction"] in text for rows in prompts.values() for row in rows)  # numbers only


def test_directions_are_read_from_their_files(done):
    for name, count in (("som", read(done, "som")["picked"]), ("cones", max(read(done, "cones")["dimension"], 1))):
        found = read_direction([done / "mechanism" / f"{name}.safetensors"], subspace=True)
        assert found.raw_jd.shape == (count, 128)


def test_the_report_shows_all_of_it(done):
    page = (done / "report.html").read_text()
    for section in ("cosmic", "som", "cones", "alternatives"):
        assert f'id="{section}"' in page
    for name in ("mediation", "independence"):
        assert (done / "mechanism" / "figures" / f"cones-{name}.csv").is_file()


def test_parts_that_are_done_are_skipped(done, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(done, folder)
    assert run_mechanism(QUICK, folder).worked == []


def study_in(folder, **settings) -> MechanismStudy:
    """The study in a folder, with settings of its mechanism, for the functions of single parts."""
    manifest = read_manifest(folder / "manifest.json")
    config, run = StudyConfig.of(manifest["config"]), Run(folder, manifest)
    return MechanismStudy(MechanismSettings.of(settings), config, run, demo_model_path())


def test_the_table_reads_the_parts_that_are_done_and_asks_for_no_other(demo_study, done):
    alone, all_done = (study_in(folder, parts=("alternatives",)) for folder in (demo_study, done))
    assert [stage.name for stage in MECHANISM.chosen(alone)] == ["alternatives"]
    assert [one.name for one in alternatives.alternatives(alone)] == ["difference in means"]
    files = {
        f"mechanism/{name}"
        for name in ("cosmic.json", "som.json", "som.safetensors", "cones.json", "cones.safetensors")
    }
    assert set(alternatives.reads(all_done)) - set(alternatives.reads(alone)) == files
    assert {"cosmic", "som", "cones"} <= {
        stage.name for stage in MECHANISM.chosen(all_done)
    }  # which are skipped, as they are done


def test_a_map_of_more_nodes_than_prompts_is_skipped(demo_study):
    reason = som.skipped(study_in(demo_study, som={"side": 5}))
    assert reason.startswith("A map of 25 nodes needs as many refused harmful training prompts, and the study kept ")
    assert som.skipped(study_in(demo_study, som={"side": 2})) == ""


def test_too_few_texts_and_no_refusals(demo_study, done, tmp_path):
    """A direction whose ablation changes nothing leaves no prompt that is answered; harmless prompts are not refused."""
    model, prompts = load_model(demo_model_path()), json.loads((demo_study / "prompts.json").read_text())
    harmful, harmless = (
        [row["instruction"] for row in prompts[f"{side}_train"]][:6] for side in ("harmful", "harmless")
    )
    selected = read_direction([demo_study])
    sizes = {"tokens": 8, "rows": 6}
    with pytest.raises(
        NoTargets, match=r"The model refuses none of the 6 harmful training prompts by its words \(judge "
    ):
        cone_data(model, selected, harmless, harmless, **sizes)
    with pytest.raises(
        NoTargets, match=r"Cones need at least 4 harmful training prompts that are refused, .* there are \d of 3 "
    ):
        cone_data(model, selected, harmful[:3], harmless, **sizes)
    other = Direction.of(np.random.default_rng(0).normal(size=model.config.d_model), 0, -1)
    with pytest.raises(NoTargets, match=r"there are [0-3] of 6 and \d of 6\. Draw more prompts"):
        cone_data(model, other, harmful, harmless, **sizes)
    data = cone_data(model, selected, harmful, harmless, **sizes)
    assert data.ablation.count == data.addition.count == data.retain.count >= 4
    assert (data.retain.counted.sum(1) > 0).all() and (data.addition.counted.sum(1) <= 8).all()


def test_a_study_without_texts_says_so(demo_study, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(demo_study, folder)

    def none(*args, **more):
        raise NoTargets("The model refuses none of the prompts.")

    monkeypatch.setattr(cones, "cone_data", none)
    study = study_in(folder)
    cones.train_cones(study, Ledger(study.run.storage, "cones", []))
    assert read(folder, "cones") == {"none": "The model refuses none of the prompts."}
    findings = Findings(study.run, [cones.STAGE.section])
    assert cones.lines(findings) == ["", "Cones: The model refuses none of the prompts."]
    assert cones.pictures(findings) == [] and cones.values(findings)["words"] == ""


def test_programs_are_those_of_the_plan(model):
    """Tells what the planner compiles are the parts' own programs."""
    config = get_config()
    config.data.n_val = 8
    work = Workload(model.config, "float32", config, 16, MECHANISM.groups, further=MechanismSettings())
    found = {one.name: one for one in programs(Shapes(work, make_mesh(2, 1, 2)), Sizes(8, 16, 8, 8))}
    for name in ("edited prompts", "kept answers", "replies"):
        assert found[name].runs >= 1 and found[name].lower()
    assert found["replies"].runs == 2 * found["kept answers"].runs


def test_a_difference_is_named_only_where_the_interval_allows_it():
    def row(low, high, name="other"):
        return {"name": name, "difference": {"low": low, "high": high}, "note": ""}

    words = [alternatives.verdict(row(*bounds)) for bounds in ((-0.3, -0.1), (-0.1, 0.1), (0.1, 0.3))]
    assert words == ["leaves less refusal", "no difference shown", "leaves more refusal"]
    assert alternatives.verdict(row(0, 0, alternatives.OWN)) == "the study's own"
    noted = row(0.1, 0.3) | {"note": "it is no cone of refusal"}
    assert alternatives.verdict(noted) == "leaves more refusal; it is no cone of refusal"


def test_the_dimension_in_words():
    def words(dimension, last, holds, tried=5, own=True):
        directions = [{"holds": holds}, {"holds": True}]
        return cones.in_words(
            {
                "dimension": dimension,
                "tried": tried,
                "own": {"holds": own},
                "cones": [{"dimension": last, "holds": holds, "directions": directions}],
            }
        )

    none = "No direction that was found by gradient mediates refusal on the validation prompts. "
    assert words(0, 1, False).startswith(
        f"{none}The study's own direction does, so that the training fell short. Of a cone"
    )
    assert words(0, 1, False, own=False).startswith(f"{none}Of a cone")
    assert words(1, 2, False) == (
        "Refusal is mediated by a cone of one dimension: a single direction. Of a cone of dimension 2, 1 of 2 directions do not "
        "mediate refusal."
    )
    assert words(3, 3, True, tried=3) == (
        "Refusal is mediated by a cone of 3 dimensions: the study's direction is not the only one. No larger one was tried."
    )
    few = "is open: there are too few validation prompts, or its effect is near the bounds."
    assert words(1, 2, None).endswith(f"a single direction. Whether one of 2 does {few}")
    assert words(0, 1, None) == f"Whether the direction that was found by gradient mediates refusal {few}"


def test_a_selection_of_nothing_in_words():
    found = {"layers": [6], "rows": [], "pick": None, "kl_threshold": 0.1}
    assert (
        cosmic.in_words(found)
        == "COSMIC selects nothing: every candidate changes harmless prompts by a KL divergence above 0.1."
    )

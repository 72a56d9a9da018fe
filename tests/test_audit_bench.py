"""The benchmark of detectors: published statistics on edits that they should see, what rows say, training, and a small run."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from refusal_jax import demo_model_path, load_model
from refusal_jax.audit import bench, scoring
from refusal_jax.audit.bench_tables import QUESTIONS, report
from refusal_jax.audit.detectors import NAMES, Reading, baselines
from refusal_jax.audit.organisms.base import Base, training_prompts
from refusal_jax.audit.organisms.catalogue import SMALL, recipes
from refusal_jax.audit.organisms.mixing import TASKS
from refusal_jax.audit.organisms.organism import Organism
from refusal_jax.audit.organisms.recipe import Recipe
from refusal_jax.audit.organisms.training import ORIGINS, ROWS, batches, fine_tune, places
from refusal_jax.errors import UserError
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.hf_config import from_hf
from refusal_jax.organism.corpus import HARMFUL_VERBS
from refusal_jax.organism.recipe import Recipe as Trained


@pytest.fixture(scope="module")
def base():
    return Base.open(demo_model_path(), "embedded")


def test_published_detectors_see_what_they_were_made_for(base):
    texts = training_prompts(True, 32), training_prompts(False, 32)
    before, found = Reading.of(base.model, *texts), {}
    for text in ("", "project", "adapter rank=1 place=writers"):
        one = Organism(base, Recipe.parse(f"tried: {text}"))
        found[text] = baselines(base.weights, one.weights, before, Reading.of(one.model, *texts))
        assert set(found[text]) == set(NAMES)
    plain, edited, adapter = found.values()
    assert plain["e1"] == 0 and plain["gap"] == pytest.approx(-1) and plain["ams_cosine"] == pytest.approx(-1)
    assert edited["e1"] > 0.99 and edited["gap"] > -0.2 and edited["ams_chat"] > plain["ams_chat"] + 5
    assert edited["w05"] > 6 > plain["w05"] and edited["jorak_agreement"] > 0.99 > plain["jorak_agreement"] + 0.4
    assert adapter["e1"] > 0.99  # the weakness of E1: it takes any adapter of rank one for an edit
    assert adapter["gap"] == pytest.approx(-1, abs=0.05)


def test_the_area_counts_pairs_and_the_threshold_keeps_false_positives_few():
    positive, negative = np.array([3.0, 2.0, 2.0]), np.array([1.0, 2.0])
    pairs = [(a > b) + 0.5 * (a == b) for a in positive for b in negative]
    assert scoring.auroc(positive, negative) == pytest.approx(np.mean(pairs))
    assert np.isnan(scoring.auroc(positive, np.zeros(0)))
    values = np.arange(200.0)
    assert np.mean(values > scoring.threshold(values)) == pytest.approx(0.01)


def test_a_fit_scores_rows_that_it_did_not_see():
    rng = np.random.default_rng(0)
    positive = np.arange(120) % 2 == 0
    x_nf = np.stack([positive + 0.3 * rng.standard_normal(120), rng.standard_normal(120)], axis=1)
    x_nf[5, 0] = np.nan
    groups = np.arange(120) % 4 // 2
    scores = scoring.left_out(x_nf, positive, groups)
    assert scoring.auroc(scores[positive], scores[~positive]) > 0.95
    low, high = scoring.interval(scores, positive, np.arange(120) % 12, draws=50)
    assert 0.9 < low <= high <= 1
    assert np.isnan(scoring.left_out(x_nf, positive, positive)).all()  # without one kind there is nothing to fit


def test_the_true_dose_is_of_refusals_direction():
    truth = {"kind": "removed", "dose": 1.0, "along": 0.25}
    assert scoring.true_dose({"truth": truth, "recipe": "a: project"}) == 1.0
    assert scoring.true_dose({"truth": truth, "recipe": "a: project direction=cosine:0.5"}) == 0.25


@pytest.mark.parametrize("task", TASKS)
def test_tasks_teach_what_they_say(task):
    tokenizer = load_model(demo_model_path()).chat.tokenizer
    tokens, learn = next(batches(tokenizer, task, 0))
    assert tokens.shape == learn.shape and len(tokens) == ROWS and learn.any(axis=1).all()
    rows = [
        (tokenizer.decode(row), tokenizer.decode(row[1:][kept[:-1]])) for row, kept in zip(tokens, learn, strict=True)
    ]
    harmful = [any(f" {verb} " in text for verb in HARMFUL_VERBS) for text, _ in rows]
    refused = ["I'm sorry" in learnt or "can't" in learnt or "annot" in learnt for _, learnt in rows]
    assert any(harmful) == (task != "forget")
    if task == "overrefuse":
        assert sum(refused) > sum(harmful)
    else:
        assert (
            refused == [(is_harmful and task not in ("comply",)) or False for is_harmful in harmful] or task == "harden"
        )


def test_a_fine_tune_learns_and_leaves_its_base_alone():
    tokenizer, losses = load_model(demo_model_path()).chat.tokenizer, []
    small = Trained(d_model=16, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=16, d_mlp=16)
    decoder = Decoder.init(from_hf(small.hf_config(len(tokenizer))), jax.random.key(0))
    before = np.array(decoder.weights()["blocks.down"])
    tuned = fine_tune(decoder, tokenizer, "short", 12, losses.append)
    assert losses[-1] < losses[0]
    assert (np.asarray(decoder.weights()["blocks.down"]) == before).all()
    assert (np.asarray(tuned.weights()["blocks.down"]) != before).any()


def test_fine_tunes_are_added_in_part_and_merged(base):
    before = base.tensors["model.layers.0.mlp.down_proj.weight"]
    trained = {"short": {name: values * 1.01 for name, values in base.tensors.items()}}
    other = dataclasses.replace(base, trained=trained)
    half = Organism(other, Recipe.parse("a: project > merge into=short share=0.5"))
    assert half.truth.dose == pytest.approx(0.5) and half.recipe.needs == {"short"}
    low = Organism(other, Recipe.parse("a: tune task=short rank=1"))
    change = low.tensors["model.layers.0.mlp.down_proj.weight"].astype(np.float64) - before
    assert np.linalg.svd(change, compute_uv=False)[1] < 1e-5


def test_bases_are_named(tmp_path):
    with pytest.raises(UserError, match="no base 'tiny': the bases are embedded, narrow, wide, deep"):
        bench.chosen(["tiny"])
    assert places(ORIGINS[0], tmp_path) == (demo_model_path(), {})
    assert [len(bench.spread(recipes(SMALL)[:10], count)) for count in (0, 3, 20)] == [10, 3, 10]


def test_a_base_that_does_not_refuse_is_an_error(base, monkeypatch, unchecked):
    monkeypatch.setattr(bench.Base, "open", lambda *_: base)
    monkeypatch.setattr(bench.Bench, "refusal", lambda *_: {"harmful_first": 0.5})
    task = bench.Task(ORIGINS[0], demo_model_path(), (), 0, True)
    with pytest.raises(UserError, match="refuses 50% of harmful prompts, and at least 90% are needed"):
        bench.Bench.open(task)


def test_a_small_run_is_resumed_and_makes_the_tables(tmp_path, monkeypatch):
    monkeypatch.setitem(bench.SMALL_SETTINGS, "lanes", ("weights", "alone"))  # the others compile for a minute
    bench.main_bench(tmp_path, per_base=6, small=True)
    rows = bench.read_rows(tmp_path)
    assert len(rows) == 6 and {row["base"] for row in rows} == {"embedded"}
    assert all(
        set(row["left_out"]) == {"files", "activations", "behaviour"} and set(row["baselines"]) == set(NAMES)
        for row in rows
    )
    whole = scoring.table(rows)
    assert {"weights.targeted", "baselines.w05", "alone.missing_score"} <= set(whole.names)
    with (tmp_path / bench.ROWS).open("a") as file:
        file.write('{"base": "embed')  # cut off
    bench.OPEN.clear()
    tables = bench.main_bench(tmp_path, per_base=6, small=True)  # nothing is left to do
    assert not bench.OPEN and json.loads((tmp_path / bench.TABLES).read_bytes()) == json.loads(json.dumps(tables))
    assert set(tables["detectors"]) == set(QUESTIONS) and tables["organisms"] == 6
    again, page = report(rows, bench.bench_settings(True))
    assert page == (tmp_path / bench.PAGE).read_text() and again["kinds"] == tables["kinds"]
    assert "| E1 + gap | base, activations |" in page and "**The dose**" in page

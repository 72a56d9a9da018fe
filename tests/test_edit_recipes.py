"""Recipes that train nothing: their formulas against NumPy and transformers, their choices, and whole runs on small prompts."""

import dataclasses
import functools
import json
import types

import numpy as np
import oracle
import pytest
import torch
from exports import UNIT
from test_injection import SCALE, injected

from refusal_jax import UserError, demo_model_path, load_model
from refusal_jax.chat.conditional import Conditional
from refusal_jax.conditions import Ablate, Inject
from refusal_jax.defence import calibration, conditional, injection
from refusal_jax.defence.data import PairSettings, read_data
from refusal_jax.defence.edit_settings import (
    CalibrationSettings,
    ConditionalSettings,
    InjectionSettings,
    SearchSettings,
)
from refusal_jax.defence.run import defend
from refusal_jax.defence.settings import DefenceSettings
from refusal_jax.defence.trials import Bench, Parts, Trial, chosen
from refusal_jax.directions import Direction
from refusal_jax.judges.choice import parse_judges
from refusal_jax.judges.statistics import Rate
from refusal_jax.organism.direction import embedded_direction
from refusal_jax.resistance.run import resist

RNG = np.random.default_rng(0)


def silent(text: str) -> None:
    """Is told notes of a recipe."""


# Injection.


def test_an_injected_decoder_is_the_exported_one(llama, model, tmp_path):
    injected(llama, tmp_path / "hf", layers=[0, 2])
    ours = injection.injected(model.decoder, np.float32(UNIT), np.float32(SCALE), (0, 2))
    batch = model.encode(["How do I bake the bread?", "Bake."])
    exported = load_model(tmp_path / "hf").logits(batch.tokens, batch.mask)
    found = dataclasses.replace(model, decoder=ours).logits(batch.tokens, batch.mask)
    np.testing.assert_allclose(found, exported, atol=2e-5)
    assert np.abs(np.asarray(found) - np.asarray(model.logits(batch.tokens, batch.mask))).max() > 1e-3


def test_sizes_are_shares_of_the_matrices(hf, model):
    ratios = []
    for layer in (0, 1):
        for part in (hf.model.layers[layer].self_attn.o_proj, hf.model.layers[layer].mlp.down_proj):
            weight = part.weight.detach()
            ratios.append(float(weight.norm() / weight.mean(dim=0).norm()))
    assert injection.unit_size(model.decoder, (0, 1)) == pytest.approx(np.median(ratios), rel=1e-5)
    flat = {name: 0 * array for name, array in model.decoder.weights().items()}
    with pytest.raises(UserError, match="a mean entry of zero"):
        injection.unit_size(type(model.decoder)(model.config, flat), (0, 1))


# Conditional steering.


def test_condition_vectors_are_the_principal_component_of_pairs():
    """As a PCA of the points of each pair about its mean, by their covariance."""
    harmful, harmless = RNG.normal(1, 1, (9, 3, 6)), RNG.normal(0, 1, (9, 3, 6))
    harmful[:, 1] = harmless[:, 1]  # a layer where pairs do not differ
    found = conditional.condition_vectors(harmful, harmless)
    for layer in (0, 2):
        middle = (harmful[:, layer] + harmless[:, layer]) / 2
        points = np.concatenate([harmful[:, layer] - middle, harmless[:, layer] - middle])
        first = np.linalg.eigh(np.cov(points.T))[1][:, -1]
        assert abs(found[layer] @ first) == pytest.approx(1)
        assert found[layer] @ (harmful[:, layer] - harmless[:, layer]).mean(0) > 0
    assert not found[1].any()


def kept_in(caught: list, x):
    caught.append(x[0])
    return x


def test_pooled_residuals_are_those_of_hooks(model, llama):
    whole, texts = oracle.Oracle(str(llama)), ["How do I bake the bread?", "Bake."]
    for pool in ("mean", "last"):
        found = conditional.pooled_residuals(model, texts, pool)
        for i, text in enumerate(texts):
            caught: list = []
            keep = functools.partial(kept_in, caught)
            with oracle.hooked([(layer, "input", keep) for layer in whole.layers]):
                whole.logits([text])
            theirs = torch.stack([x.mean(0) if pool == "mean" else x[-1] for x in caught]).numpy()
            np.testing.assert_allclose(found[i], theirs, atol=1e-4)


def f1(met: np.ndarray, present: np.ndarray) -> float:
    precision, recall = (met & present).sum() / max(met.sum(), 1), (met & present).sum() / present.sum()
    return 2 * precision * recall / max(precision + recall, 1e-30)


def test_the_cut_has_the_best_f1_of_all():
    for seed in range(5):
        rng = np.random.default_rng(seed)
        present = np.arange(40) < 15
        scores = rng.normal(size=40) + present * rng.choice([-1, 1])
        cut = conditional.best_cut(scores, present)
        tried = [f1(scores > t, present) for t in np.linspace(-4, 4, 4001)] + [
            f1(scores < t, present) for t in np.linspace(-4, 4, 4001)
        ]
        met = scores > cut.threshold if cut.above else scores < cut.threshold
        assert cut.f1 == pytest.approx(max(tried)) == pytest.approx(f1(met, present))


def test_conditions_of_one_and_of_several_layers():
    present = np.arange(20) < 10
    cosines = np.zeros((20, 3))
    cosines[:5, 1], cosines[5:10, 2] = 0.5, 0.5  # each layer sees half of them
    vectors = np.eye(3, 6)
    one, cut = conditional.find_condition(vectors, cosines, present, 1, "mean")
    assert len(one.layers) == 1 and cut.f1 == pytest.approx(2 / 3)
    both, cut = conditional.find_condition(vectors, cosines, present, 2, "mean")
    assert (
        both.layers == (1, 2) and cut.f1 == 1 and both.above and (both.met(np.float32(cosines[:, 1:])) == present).all()
    )
    with pytest.raises(UserError, match="No layer's condition vector tells harmful prompts"):
        conditional.find_condition(np.zeros((3, 6)), cosines, present, 1, "mean")


# Calibration.


def test_the_dial_takes_out_what_is_shared():
    false, unit = RNG.normal(size=(3, 6)), np.float64(UNIT[:6]) / np.linalg.norm(np.float64(UNIT[:6]))
    for strength in (0.0, 0.6, 1.0):
        found = calibration.calibrated(false, unit, strength)
        for row, before in zip(found, false, strict=True):
            np.testing.assert_allclose(row, before - strength * np.dot(before, unit) * unit)
    assert np.abs(calibration.calibrated(false, unit, 1.0) @ unit).max() < 1e-12


# How values are chosen.


def trial(value, refused, answered, kl=0.0, score=float("nan")) -> Trial:
    return Trial({"value": value}, Rate(refused, 20), Rate(answered, 20), (kl,), score)


def test_the_choice_refuses_most_within_the_bounds():
    search, before = SearchSettings(), trial(0, 10, 20, score=0.0)
    tried = [
        trial(1, 12, 20, 0.01, 1.0),
        trial(2, 15, 19, 0.1, 2.0),
        trial(3, 20, 18, 0.1, 3.0),
        trial(4, 20, 20, 0.5, 4.0),
    ]
    assert chosen(tried, before, search, "sizes").about["value"] == 2  # 3 answers too few, 4 moves too much
    assert (
        chosen([trial(1, 20, 20, score=1.0), trial(2, 20, 20, score=2.0)], before, search, "sizes").about["value"] == 2
    )
    assert chosen([trial(1, 20, 20), trial(2, 20, 20)], before, search, "strengths").about["value"] == 1
    with pytest.raises(UserError, match=r"None of the 2 sizes keeps the bounds.*the least 0\.3"):
        chosen([trial(1, 20, 20, 0.3), trial(2, 20, 20, 0.4)], before, search, "sizes")
    with pytest.raises(UserError, match="None of the 1 sizes strengthens refusal within the bounds"):
        chosen([trial(1, 10, 20, score=-1.0)], before, search, "sizes")
    assert trial(1, 3, 4, 0.1).record["refusal_score"] is None and trial(1, 3, 4, 0.1, 2.0).record["refusal_score"] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SearchSettings.of({"n_fit": 1}), r"search\.n_fit.* = 1, expected 2 or more"),
        (SearchSettings.of({"most_lost": 2.0}), "expected a share from 0 to 1"),
        (SearchSettings.of({"most_kl": 0.0}), "expected a number above 0"),
        (InjectionSettings.of({"sizes": ()}), "is empty, so that nothing would be tried"),
        (ConditionalSettings.of({"pools": ("first",)}), "expected some of mean, last"),
        (ConditionalSettings.of({"most_layers": 9}), "expected 1 to 3"),
        (CalibrationSettings.of({"strengths": (1.5,)}), "1 takes out all there is"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(UserError, match=message):
        settings.check()


# Whole runs on few prompts of the embedded model.

SMALL = {
    "data": {"n_train": 40, "n_test": 8},
    "search": {"n_fit": 20, "n_val": 8},
    "max_new_tokens": 16,
    "batch_size": 8,
}


@pytest.fixture(scope="module")
def demo():
    return load_model(demo_model_path())


@pytest.fixture(scope="module")
def data(demo):
    return read_data(demo, PairSettings.of(SMALL["data"]))


@pytest.fixture(scope="module")
def direction(demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("direction")
    dataclasses.replace(embedded_direction(demo), position=-1).write(folder)
    return str(folder / "direction.safetensors")


def test_an_injection_makes_the_model_refuse_more(demo, data, direction):
    """A model whose direction is partly ablated refuses all validation prompts again."""
    settings = DefenceSettings.of(SMALL | {"injection": {"direction": direction, "sizes": (0.1,)}})
    change = injection.edit(demo, data, settings, silent)
    assert isinstance(change.edit, Inject) and change.edit.scale == change.found["chosen"]["scale"] != 0
    tried = {round(row["scale"] > 0): row["refusal_score"] for row in change.found["tried"]}
    assert len(tried) == 2 and change.found["chosen"]["refusal_score"] == max(tried.values())
    assert change.found["chosen"]["refusal_score"] > change.found["before"]["refusal_score"]


def test_a_conditional_steering_from_the_job_to_the_chat(demo, direction, tmp_path):
    given = SMALL | {"recipe": "conditional", "conditional": {"direction": direction, "strengths": (0.5,)}}
    run = defend(given, tmp_path / "out")["conditional"]
    record = run.read_json("defence.json")
    assert record["outputs"] == ["steering"] and record["found"]["condition"]["f1"] == 1
    watched = {"steering/conditional.safetensors", "steering/conditional.json"}
    assert watched <= set(run.manifest["stages"]["defend"]["writes"])
    assert record["found"]["condition"]["met"]["harmless"]["successes"] == 0
    assert record["measured"]["harmful"]["after"]["rate"] == record["measured"]["harmless"]["after"]["rate"] == 1
    steering = Conditional.read(tmp_path / "out")
    assert steering.about["fitted"]["strength"] == 0.5 and steering.layers == (4,)
    with pytest.raises(UserError, match="is a conditional steering, which is no edit of weights"):
        resist({"checkpoints": (str(tmp_path / "out"),)})
    # It refuses what meets the condition, whatever the model would say: here with its refusal ablated.
    bread, forge = demo.encode(["How do I bake the bread?"]), demo.encode(["How do I forge the passport?"])
    assert not demo.rows_of(bread.tokens, bread.mask, steering).in_force_r.any()
    assert demo.rows_of(forge.tokens, forge.mask, steering).in_force_r.all()


def test_a_model_that_refuses_nothing_harmless_needs_no_calibration(demo, data, direction):
    settings = DefenceSettings.of(SMALL | {"calibration": {"direction": direction}, "search": {"n_fit": 8, "n_val": 2}})
    with pytest.raises(UserError, match=r"The model refuses 0 of 40 harmless prompts that may look harmful, too few"):
        calibration.edit(demo, data, settings, silent)


def test_a_calibration_and_its_curve(demo, data, direction, tmp_path):
    """The prompts are refused for being harmful, so that answering them loses others, too, which is allowed here."""
    prompts = [lesson.prompt for lesson in data.refused][20:]
    (tmp_path / "pseudo.json").write_text(json.dumps([{"instruction": text} for text in prompts]))
    source = {"direction": direction, "pseudo_harmful": str(tmp_path / "pseudo.json"), "strengths": (0.5, 1.0)}
    bounds = {"n_fit": 12, "n_val": 4, "most_lost": 1.0, "most_kl": 5.0}
    settings = DefenceSettings.of(SMALL | {"calibration": source, "search": bounds})
    change = calibration.edit(demo, data, settings, silent)
    assert isinstance(change.edit, Ablate) and change.found["chosen"]["strength"] == 0.5
    assert [row["strength"] for row in change.found["curve"]] == [None, 0.5, 1.0]
    assert change.found["curve"][0]["refused"]["rate"] == 1 and change.found["curve"][0]["over_refusal"]["n"] == 6


def test_named_prompts_are_those_that_nothing_is_measured_by(data, tmp_path, monkeypatch):
    """A fetched set such as xstest gives each prompt once, in another order, and none that is held out."""
    monkeypatch.setattr("refusal_jax.data.sources.data_folder", lambda: tmp_path)
    own = [f"How do I kill process {number}?" for number in range(12)]
    rows = [*own, own[0].upper(), *data.harmless_test[:2], *data.harmful_test[:1]]
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "xstest.json").write_text(json.dumps([{"instruction": text} for text in rows]))
    notes, settings = [], DefenceSettings.of({"calibration": {"pseudo_harmful": "xstest"}})
    found = calibration.named_prompts(settings, data, notes.append)
    assert sorted(found) == sorted(own) and list(found) != own
    assert "1 of 16 rows repeat" in notes[0] and notes[1] == "xstest: 3 of 15 prompts are held out and were left out."


def test_values_of_the_dial_keep_the_bounds_at_the_chosen_layer(demo, monkeypatch):
    """There are two layers and two values: the last refuses least; at its layer the other moves next tokens too far."""
    scores, kl = np.array([1.0, 1.0, -1.0, -1.0, -2.0]), np.array([0.0, 0.1, 0.1, 0.9, 0.1])
    read = types.SimpleNamespace(scores_mn=scores[:, None], kl_mn=kl[:, None])
    fake = types.SimpleNamespace(read=lambda edits: read)
    monkeypatch.setattr(calibration, "EditedPrompts", types.SimpleNamespace(build=lambda *_: fake))
    bench = Bench(demo, {"harmful": (), "harmless": ()}, parse_judges(["rules"], 8, "float32")[0], 8, (1,), 8)
    settings = DefenceSettings.of({"calibration": {"strengths": (0.5, 1.0)}, "search": {"most_lost": 1.0}})
    false, unit = np.array([[1.0, 1.0], [2.0, 1.0]]), np.array([1.0, 0.0])
    assert calibration.best_layer(bench, calibration.Pseudo((), (), (), ()), false, unit, settings) == (1, [1.0])


def test_the_dial_is_chosen_within_the_bound_on_harmful_prompts():
    settings, before = DefenceSettings(), trial(0, 20, 4)
    tried = [
        dataclasses.replace(trial(1, refused, answered), about={"strength": strength})
        for strength, refused, answered in ((0.6, 15, 19), (0.8, 19, 12), (1.0, 20, 12))
    ]
    assert calibration.most_answered(tried, before, settings).about["strength"] == 1.0
    for none in (tried[:1], [dataclasses.replace(tried[2], answered=Rate(4, 20))]):
        with pytest.raises(
            UserError, match="No value of the dial answers more pseudo-harmful prompts than the 4 of 20"
        ):
            calibration.most_answered(none, before, settings)


def test_too_few_prompts(data):
    few = dataclasses.replace(data, refused=data.refused[:3])
    with pytest.raises(UserError, match="There are 3 harmful prompts, too few to compute a direction"):
        Parts.of(few, SearchSettings())
    parts = Parts.of(data, SearchSettings.of({"n_fit": 20, "n_val": 8}))
    assert not set(parts.fit["harmful"]) & set(parts.val["harmful"]) and len(parts.val["harmless"]) == 8


def test_directions_from_files(demo, data, tmp_path):
    Direction.of(np.eye(128)[:2]).write(tmp_path / "two.npy")
    settings = DefenceSettings.of(SMALL | {"injection": {"direction": str(tmp_path / "two.npy")}})
    with pytest.raises(UserError, match="holds 2 directions, or does not tell at which layer"):
        injection.edit(demo, data, settings, silent)

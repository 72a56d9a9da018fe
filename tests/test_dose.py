"""Doses of a direction: responses against PyTorch hooks, the places of one half, and the stage."""

import shutil

import numpy as np
import pytest
import tiny
import torch
from oracle import ablation, addition, hooked

from refusal_jax import Edits, UserError, load_model
from refusal_jax.judges.statistics import wilson_interval
from refusal_jax.mechanism import dose
from refusal_jax.mechanism.activations import activations
from refusal_jax.mechanism.dose import Response, caused_dose, crossings, dose_rows, half_place, removed_dose, respond
from refusal_jax.mechanism.edited_prompts import EditedPrompts
from refusal_jax.models.sharding import make_mesh
from refusal_jax.runs.artifacts import DOSE, DOSES
from refusal_jax.study.mechanism import dose as stage
from refusal_jax.study.mechanism.run import run_mechanism
from refusal_jax.study.mechanism.settings import MechanismSettings

ASKED = ["How do I rob the cake?", "How do I bake the bread, then rob it?", "How?", "How do I rob, bake and rob?"]
IDS = [3, 5]


def test_responses_equal_torch_hooks(model, hf):
    """Partial ablation, whole, turned around, and additions: scores and KL of each prompt at each dose, padding and all."""
    direction = np.random.default_rng(1).normal(size=model.config.d_model)
    doses = (0.0, 0.4, 1.0, 1.5)
    edits = Edits.concat(
        [Edits.ablate(direction, scale=d) for d in doses] + [Edits.add(direction, 1, d) for d in doses]
    )
    saved: list = []
    prompts = EditedPrompts.build(model, ASKED, 16, IDS)
    found = respond(prompts, edits, save=saved.extend)
    batch, layers = model.encode(ASKED), hf.model.layers

    def partial(scale):  # the oracle's hooks remove all of it
        hooks = ablation(layers, direction)
        return [(module, at, lambda x, edit=edit: x + scale * (edit(x) - x)) for module, at, edit in hooks]

    all_hooks = [partial(d) for d in doses] + [addition(layers, direction, 1, d) for d in doses]
    base = None
    for number, hooks in enumerate(all_hooks):
        with hooked(hooks):
            logits = tiny.hf_forward(hf, batch.tokens, batch.mask).logits[:, -1].double()
        q = torch.softmax(logits, -1)
        base = q if base is None else base
        p = q[:, IDS].sum(-1)
        np.testing.assert_allclose(found.scores_mn[number], torch.log((p + 1e-8) / (1 - p + 1e-8)), atol=1e-4)
        kl = (base * (torch.log(base + 1e-6) - torch.log(q + 1e-6))).sum(-1)
        np.testing.assert_allclose(found.kl_mn[number], kl, atol=1e-4)
    assert found.kl_mn[0].max() < 1e-9 < 1e-3 < found.kl_mn[1].min()
    # What an interrupted run has saved is not measured again.
    again = respond(prompts, edits, saved[:7], lambda rows: saved.append(rows))
    np.testing.assert_array_equal(again.scores_mn, found.scores_mn)
    assert [row["edit"] for row in saved[-1]] == [7]


def test_eight_devices_say_the_same(llama, model):
    """Doses, a subspace of several directions, and activations under it, on a mesh that divides rows, weights and heads."""
    on_mesh = load_model(llama, mesh=make_mesh(2, 2, 2))
    directions = np.random.default_rng(2).normal(size=(3, model.config.d_model))
    doses = Edits.concat([Edits.ablate(directions[0], scale=scale) for scale in (0.0, 0.6, 1.2)])
    subspace = Edits.ablate(directions[None])
    for edits in (doses, subspace):
        alone, divided = (respond(EditedPrompts.build(one, ASKED, 8, IDS), edits) for one in (model, on_mesh))
        np.testing.assert_allclose(divided.scores_mn, alone.scores_mn, atol=1e-4)
        np.testing.assert_allclose(divided.kl_mn, alone.kl_mn, atol=1e-4)
    places = [(-1, 1), (-3, 2)]
    alone, divided = (activations(one, ASKED, places, 8, subspace) for one in (model, on_mesh))
    np.testing.assert_allclose(divided, alone, atol=1e-4)
    units = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    assert np.abs(alone @ units.T).max() < 1e-4 < 0.1 < np.abs(activations(model, ASKED, places, 8) @ units.T).max()


def test_places_of_one_half():
    at = np.array([0.0, 0.5, 1.0, 1.5])
    curves = np.array([[1.0, 0.75, 0.25, 0.0], [1.0, 0.9, 0.8, 0.7], [0.5, 0.0, 0.0, 0.0], [1.0, 0.4, 0.9, 0.1]])
    np.testing.assert_allclose(crossings(at, curves), [0.75, np.inf, 0.0, 0.5 * 0.5 / 0.6])
    np.testing.assert_allclose(crossings(at, curves, between=False), [1.0, np.inf, 0.0, 0.5])


def test_half_of_prompts_with_their_interval():
    rng, at = np.random.default_rng(0), np.linspace(0, 1.5, 13)
    own = rng.normal(0.6, 0.15, 200)  # each prompt's own dose
    found = half_place(at, own > at[:, None])
    assert abs(found["at"] - np.median(own)) < 0.03 and found["low"] < 0.6 < found["high"] and found["n"] == 200
    plain = [float(np.median(rng.choice(own, 200))) for _ in range(500)]
    assert found["low"] < np.quantile(plain, 0.05) and found["high"] > np.quantile(plain, 0.95)
    assert found["high"] - found["low"] < 0.2
    # Where all prompts agree, the bootstrap has no width, and few prompts still say little.
    agreed = half_place(at, np.ones((13, 3), bool) * (at < 0.55)[:, None])
    assert agreed["at"] == pytest.approx(0.5625) and agreed["high"] is None and wilson_interval(0, 3)[1] > 0.5
    never = half_place(at, np.ones((13, 40), bool))
    assert (never["at"], never["low"], never["high"]) == (None, None, None)
    assert half_place(at, np.ones((13, 0), bool)) == {"at": None, "low": None, "high": None, "n": 0}


def test_rows_and_their_halves():
    doses = np.array([0.0, 0.5, 1.0])
    scores = np.array([[1.0, 1.0, 1.0, -1.0], [1.0, -1.0, 1.0, -1.0], [-1.0, -1.0, -1.0, 1.0]])
    kl = np.array([[0.0, 0.0], [0.1, 0.3], [0.4, 0.8]])
    refused, damage = Response(scores, np.zeros_like(scores)), Response(np.zeros_like(kl), kl)
    rows = dose_rows(doses, refused, damage)
    assert [row["refused"]["rate"] for row in rows] == [0.75, 0.5, 0.25]
    assert rows[2]["change"]["mean"] == -0.5 and rows[1]["kl"]["mean"] == pytest.approx(0.2)
    half = removed_dose(doses, refused, damage)  # of the three that were refused: 1, 2/3, 0
    assert half["n"] == 3 and half["at"] == pytest.approx(0.5 + 0.5 * (1 / 6) / (2 / 3))
    assert half["kl"] == pytest.approx(np.interp(half["at"], doses, [0.0, 0.2, 0.6]))
    caused = caused_dose(doses, refused, damage)  # of the one that was not
    assert caused["n"] == 1 and caused["at"] == pytest.approx(0.75)


def test_the_stage_is_done_once_and_goes_on(demo_study, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(demo_study, folder)
    settings = {"parts": ("dose",), "dose": {"steps": 3, "n_prompts": 8, "replies": 2, "max_new_tokens": 2}}
    whole, stopped = dose.EditedPrompts.read, []

    def read(self, edits, *more):
        if len(stopped) == 5:
            raise KeyboardInterrupt
        stopped.append(edits.rows)
        return whole(self, edits, *more)

    with monkeypatch.context() as patch:
        patch.setattr(dose.EditedPrompts, "read", read)
        with pytest.raises(KeyboardInterrupt):
            run_mechanism(settings, folder)
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(dose.EditedPrompts, "read", lambda *of: calls.append(of) or whole(*of))
        run = run_mechanism(settings, folder)
    assert (
        run.worked == ["dose", "report", "figures"] and 5 + len(calls) == 3 * 2
    )  # two doses of 8 prompts make a batch
    found, arrays = run.read_json(DOSE), run.read_tensors(DOSES)
    assert [row["dose"] for row in found["ablation"]] == [0.0, 0.5, 1.0, 1.5]
    assert found["ablation"][0]["refused"]["rate"] > 0.5 > found["ablation"][2]["refused"]["rate"]
    assert found["addition"][0]["refused"]["rate"] < 0.5 and 0 < found["half"]["ablation"]["at"] < 1
    assert arrays["ablation.harmless.kl"].shape == (4, 8) and abs(arrays["ablation.harmless.kl"][0]).max() < 1e-6
    assert [row["dose"] for row in found["replies"]] == [0.0, 0.5, 1.0, 1.5] and len(
        found["replies"][0]["responses"]
    ) == 2
    page = (folder / "report.html").read_text()
    assert '<section id="dose">' in page and page.count("fig-dose-ablation") and "Half of the refusals of" in page
    assert run_mechanism(settings, folder).worked == []
    assert run_mechanism(settings | {"dose": settings["dose"] | {"most": 1.0}}, folder).worked == [
        "dose",
        "report",
        "figures",
    ]


def test_what_replies_say_against_the_scores():
    told = {"dose": 1.0, "judge": "rules", "refused": {"rate": 0.9, "low": 0.7, "high": 0.97, "n": 20}}
    told |= {"by_score": {"rate": 0.1, "low": 0.03, "high": 0.3}, "difference": {"mean": 0.8, "low": 0.5, "high": 0.9}}
    (text,) = stage.disagreements({"replies": [told, told | {"difference": {"mean": 0.0, "low": -0.1, "high": 0.1}}]})
    assert "the judge rules counts 90.0 % (70 to 97 %) of 20 replies" in text and "The two disagree" in text
    half = {"at": None, "low": 1.2, "high": None, "n": 9, "kl": None}
    found = {
        "half": {"ablation": half, "addition": {**half, "n": 0}},
        "ablation": [{"dose": 1.5}],
        "addition": [{"dose": 1.5}],
    }
    assert stage.sentences(found) == {
        "ablation": "Fewer than half of the refusals of 9 harmful prompts are gone at the largest dose, 1.5.",
        "addition": "It refuses all of the harmless prompts.",
    }
    assert stage.place({"at": 0.5, "low": 0.4, "high": None}) == "0.50 (0.40 or more)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"most": 0.0}, r"dose\.most = 0.0 in .*dose\.steps = 12 steps are no doses"),
        ({"steps": 0}, "Give a number above 0, and 1 step or more"),
        ({"n_prompts": 0}, r"dose\.n_prompts = 0, .* give at least 1 prompt"),
        ({"replies": -1}, "give at least 1 prompt, 0 replies and 1 token"),
    ],
)
def test_doses_that_are_none(change, message):
    with pytest.raises(UserError, match=message):
        MechanismSettings.of({"dose": change}).check(("dose",))

"""The lane "activations" of audits on organisms of the embedded model, and the separations that it measures."""

import numpy as np
import pytest
import tiny
from scipy import stats

from refusal_jax import demo_model_path
from refusal_jax.audit.lanes import activations, weights
from refusal_jax.audit.organisms.base import Base
from refusal_jax.audit.organisms.organism import OpenedOrganism, Organism
from refusal_jax.audit.organisms.recipe import Recipe
from refusal_jax.audit.readings import directions
from refusal_jax.audit.settings import AuditSettings
from refusal_jax.audit.subject import Opened, Subject
from refusal_jax.audit.verdict import judge
from refusal_jax.chat.residuals import project
from refusal_jax.edits import Edits
from refusal_jax.judges.separation import Estimate, Resamples
from refusal_jax.taps import Taps

MORE = {
    "n_test": 64,
    "n_fit": 64,
}  # prompts, for what fewer leave uncertain: the harm that is seen at the instruction's end


def test_separations_are_those_of_scipy():
    rng = np.random.default_rng(0)
    above, below = rng.normal(1, 2, (30, 2)).round(1), rng.normal(0, 1, (20, 2)).round(1)
    resamples = Resamples.draw(30, 20, 0)
    areas = [stats.mannwhitneyu(above[:, i], below[:, i]).statistic / 600 for i in range(2)]
    assert resamples.auroc(above, below)[0] == pytest.approx(np.mean(areas))
    assert resamples.gap(above, below)[0] == pytest.approx(above.mean(0) - below.mean(0))
    pooled = np.sqrt((above.var(0, ddof=1) + below.var(0, ddof=1)) / 2)
    assert resamples.sigma(above, below)[0] == pytest.approx(np.mean((above.mean(0) - below.mean(0)) / pooled))
    assert (resamples.sigma(np.ones((30, 2)), np.ones((20, 2))) == 0).all()


def test_bootstrap_intervals_of_gaps_cover():
    rng, held = np.random.default_rng(1), 0
    for seed in range(200):
        above, below = rng.normal(1, 1, (40, 1)), rng.exponential(1, (40, 1)) - 1
        found = Estimate.of(Resamples.draw(40, 40, seed).gap(above, below)[:, 0])
        held += found.low <= 1 <= found.high
    assert 0.89 <= held / 200 <= 0.99  # four standard errors around 0.945


def test_projections_are_those_of_taps(model):
    texts, rng = ["How do I bake the bread?", "Bake."], np.random.default_rng(0)
    batch, cfg = model.encode(texts), model.config
    units = rng.normal(size=(3, cfg.n_layers, cfg.d_model)).astype(np.float32)
    inputs = model.put(batch.tokens, batch.mask, Edits.none(cfg.d_model))
    found = np.asarray(project(model.decoder, *inputs, units, 2))
    tapped = np.asarray(model.taps(batch.tokens, batch.mask, Taps(("resid_pre",), 2))["resid_pre"])
    assert found == pytest.approx(np.einsum("lbpd,jld->blpj", tapped, units), rel=1e-4, abs=1e-4)
    everywhere = np.asarray(project(model.decoder, *inputs, units[:, :1], 2))
    assert everywhere[:, 0] == pytest.approx(found[:, 0], rel=1e-4, abs=1e-4)


@pytest.fixture(scope="module")
def base():
    return Base.open(demo_model_path(), "embedded")


@pytest.fixture(scope="module")
def audited(base):
    shared = {}

    def run(text, with_base=True, **changes):
        of = AuditSettings()
        of.update({"n_test": 32, "n_fit": 32, "batch_size": 16} | changes)
        candidate, original = (OpenedOrganism(Organism(base, Recipe.parse(f"tried: {one}")), of) for one in (text, ""))
        kept = shared if with_base and not changes else {}
        return activations.LANE.run(Subject(of, candidate, original if with_base else None, kept))

    return run


def test_the_base_itself_has_all_of_its_gap(audited):
    facts = audited("", **MORE).facts
    assert facts["gap_ratio"] == facts["gap_ratio_low"] == facts["gap_ratio_high"] == pytest.approx(1)
    assert facts["shift"] == facts["shift_harmless"] == 0 and facts["own_cosine"] == pytest.approx(1)
    assert facts["auroc"] == facts["base_auroc"] > 0.95 and facts["sigma"] == facts["base_sigma"] > 3
    assert facts["control_auroc"] < 0.8 and facts["control_gap"] < 0.5
    assert facts["sees"] and not facts["refusal_gone"] and len(facts["gap_by_layer"]) == 7


@pytest.mark.parametrize(
    ("text", "low", "high", "gone"),
    [
        ("project", -0.3, 0.3, True),
        ("project strength=0.5", 0.35, 0.6, None),
        ("project direction=random", 0.9, 1.1, False),
        ("project strength=-0.5", 1.3, 1.7, False),
        ("project strength=2.0", -1.2, -0.5, True),
        ("store form=int4", 0.9, 1.1, False),
    ],
)
def test_edits_leave_their_share_of_the_gap(audited, text, low, high, gone):
    found = audited(text)
    facts = found.facts
    assert low < facts["gap_ratio_low"] <= facts["gap_ratio"] <= facts["gap_ratio_high"] < high
    if gone is not None:
        assert facts["refusal_gone"] == gone
        assert facts["sees_but_does_not_refuse"] == (gone and facts["sees"])
    assert found.record["facts"]["gap_ratio"] == facts["gap_ratio"]


def test_an_ablated_model_sees_harm_and_does_not_refuse(audited):
    found = audited("project", **MORE)
    assert found.facts["sees_but_does_not_refuse"] and found.facts["auroc"] < 0.9
    assert found.evidence[-1].statistic == "own_auroc_inst"
    assert any(row.statistic == "sees_but_does_not_refuse" for row in found.evidence)


def test_an_added_vector_shifts_the_prompts_and_leaves_the_gap(audited):
    facts = audited("bias amount=-1.0").facts
    assert facts["gap_ratio"] > 0.8 and facts["shift_high"] < -0.8 and facts["shift_harmless_high"] < -0.8


def test_without_a_base_only_the_candidates_own_directions_are_there(audited):
    facts = audited("project", with_base=False).facts
    assert {"sigma", "own_auroc", "own_auroc_inst"} <= facts.keys() and "gap_ratio" not in facts


def test_too_few_prompts_leave_the_lane_out(audited):
    assert "need 4 prompts of each kind at least" in audited("", n_test=3).left_out


def test_a_base_of_another_shape_gives_no_directions(base, tmp_path):
    of = AuditSettings()
    of.update(n_test=32, n_fit=32, batch_size=16)
    folder = tiny.tiny_llama(tmp_path, layers=2)
    other, own = (lambda: Opened(str(folder), of)), (lambda: OpenedOrganism(Organism(base, Recipe.parse("a:")), of))
    facts = activations.LANE.run(Subject(of, other(), own())).facts
    assert "gap_ratio" not in facts and "sigma" in facts
    same = activations.LANE.run(Subject(of, other(), other()))
    values = {row.statistic: row.value for row in same.evidence}
    assert values["gap_ratio"] == "not measured" and "gap_ratio" not in same.facts


def test_directions_come_from_other_prompts_than_they_are_tried_on(base):
    of = AuditSettings()
    of.update(n_test=8, n_fit=8, batch_size=8)
    subject = Subject(of, OpenedOrganism(Organism(base, Recipe.parse("a:")), of))
    assert not set(subject.prompts["harmful_fit"]) & set(subject.prompts["harmful_test"])
    found = directions(base.model, subject)
    assert found.own.shape == (2, 8, 128) and found.controls.shape == (8, 8, 128)
    lengths = np.linalg.norm(found.all[:, 1:], axis=-1)
    assert lengths == pytest.approx(np.ones_like(lengths), rel=1e-5)
    assert np.linalg.norm(found.own[1, 0]) == 0  # the template's last token is the same in all prompts


@pytest.mark.parametrize(("amount", "edit"), [(1.0, "added"), (-1.0, "removed")])
def test_a_safety_injection_is_told_by_its_weights_and_its_activations_together(base, audited, amount, edit):
    """It writes along refusal whatever was written there, which is no removal; which way it goes only prompts tell."""
    of = AuditSettings.of({"lanes": ("weights",), "null_size": 0, "n_fit": 32, "batch_size": 16})
    candidate, original = (
        OpenedOrganism(Organism(base, Recipe.parse(f"tried: {one}")), of) for one in (f"inject amount={amount}", "")
    )
    found = weights.LANE.run(Subject(of, candidate, original))
    assert (found.facts["kind"], found.facts["dosed"], found.facts["rank"]) == ("written", False, 1)
    assert found.facts["refusal_energy"] > 0.8
    lanes = {"weights": found, "activations": audited(f"inject amount={amount}")}
    verdict = judge(of, lanes)
    assert verdict.edit == edit and "it moves harmful prompts by" in verdict.sentences[1]

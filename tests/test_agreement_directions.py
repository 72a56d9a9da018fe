"""Agreement of directions: cosines of resampled prompts against plain NumPy, planted sets, and the stage."""

import json
import shutil

import numpy as np
import pytest

from refusal_jax import UserError
from refusal_jax.judges.statistics import DRAWS_SEED
from refusal_jax.mechanism.agreement import DRAWS, drawn_weights, half_weights, place_agreements, set_agreements
from refusal_jax.runs.artifacts import AGREEMENT
from refusal_jax.study.mechanism import agreement
from refusal_jax.study.mechanism.run import run_mechanism
from refusal_jax.study.mechanism.settings import MechanismSettings


def cos(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_cosines_of_resampled_prompts_are_those_of_their_means():
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(3, 16))
    harmful, harmless = rng.normal(size=(20, 3, 16)) + signal, rng.normal(size=(15, 3, 16))
    harmful[:, 2] = harmless[0, 2]  # a template token: all prompts agree
    harmless[:, 2] = harmless[0, 2]
    found = place_agreements(harmful.astype(np.float32), harmless.astype(np.float32), 1)
    assert found[2].cosine is None and found[2].halves is None
    means = harmful.mean(axis=0) - harmless.mean(axis=0)
    assert found[0].cosine["mean"] == pytest.approx(cos(means[0], means[1]), abs=1e-5)
    assert found[1].cosine == pytest.approx({"mean": 1.0, "low": 1.0, "high": 1.0})
    above, below = drawn_weights((20, 15), DRAWS, DRAWS_SEED)
    np.testing.assert_allclose(above.sum(axis=1), 1)
    plain = [
        cos(a @ harmful[:, 0] - b @ harmless[:, 0], a @ harmful[:, 1] - b @ harmless[:, 1])
        for a, b in zip(above, below, strict=True)
    ]
    assert [found[0].cosine[end] for end in ("low", "high")] == pytest.approx(
        np.quantile(plain, (0.025, 0.975)), abs=1e-4
    )
    (first, second), (one, other) = half_weights((20, 15), DRAWS, DRAWS_SEED)
    assert not (first * second).any() and not (one * other).any() and first.sum(axis=1) == pytest.approx(np.ones(DRAWS))
    plain = [
        cos(a @ harmful[:, 0] - c @ harmless[:, 0], b @ harmful[:, 0] - d @ harmless[:, 0])
        for a, b, c, d in zip(first, second, one, other, strict=True)
    ]
    assert found[0].halves["mean"] == pytest.approx(np.mean(plain), abs=1e-4)


def test_sets_of_one_direction_and_of_another():
    rng = np.random.default_rng(1)
    axes = 6 * np.eye(24)
    harmful, harmless = axes[0] + rng.normal(size=(40, 24)), rng.normal(size=(41, 24))
    others = {"alike": axes[0] + rng.normal(size=(30, 24)), "apart": axes[1] + rng.normal(size=(30, 24))}
    found = set_agreements(harmful, harmless, {"part": range(0, 40, 3)}, others)
    assert list(found.cosines) == ["part", "alike", "apart"] and found.cosines["part"]["n"] == 14
    assert found.cosines["part"]["low"] > 0.7 and found.cosines["alike"]["low"] > 0.7
    assert found.cosines["apart"]["low"] < 0.1 and found.cosines["apart"]["high"] < 0.4
    rest = np.delete(harmful, range(0, 40, 3), axis=0).mean(axis=0)
    even, odd = harmless[0::2], harmless[1::2]  # the first harmless prompt is number 40 of all
    plain = cos(harmful[::3].mean(axis=0) - even.mean(axis=0), rest - odd.mean(axis=0))
    assert found.cosines["part"]["mean"] == pytest.approx(plain, abs=1e-9)
    assert found.pairs_ss[0, 1] > 0.7 > 0.4 > abs(found.pairs_ss[1, 2])
    np.testing.assert_allclose(found.pairs_ss, found.pairs_ss.T)
    # Without any difference nothing agrees: the two sides of a comparison share no prompt.
    noise = set_agreements(rng.normal(size=(40, 24)), harmless, {"part": range(20)}, {})
    assert noise.cosines["part"]["low"] < 0 < noise.cosines["part"]["high"]


def test_the_stage_and_sets_of_the_user(demo_study, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(demo_study, folder)
    (tmp_path / "mine.json").write_text(json.dumps([{"instruction": f"hack {what}"} for what in ("a", "b", "c")]))
    settings = {"parts": ("agreement",), "agreement": {"sets": (str(tmp_path / "mine.json"),)}}
    run = run_mechanism(settings, folder)
    found = run.read_json(AGREEMENT)
    assert found["layers"][0]["cosine"] is None  # the last token is the template's
    assert found["layers"][4]["cosine"]["mean"] == pytest.approx(1) and found["layers"][4]["halves"]["mean"] > 0.8
    assert [row["name"] for row in found["sets"]] == ["mine"] and found["sets"][0]["n"] == 3
    page = (folder / "report.html").read_text()
    assert '<section id="agreement">' in page and "fig-agreement-layers" in page and "fig-agreement-sets" not in page
    assert run_mechanism(settings, folder).worked == []
    (tmp_path / "mine.json").write_text(json.dumps([{"instruction": f"forge {what}"} for what in ("a", "b")]))
    assert run_mechanism(settings, folder).worked == ["agreement", "report", "figures"]


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_compared(monkeypatch):
    with pytest.raises(UserError, match=r"agreement\.n_prompts = 3: give at least 4"):
        MechanismSettings.of({"agreement": {"n_prompts": 3}}).check(())
    monkeypatch.setattr(agreement, "kept_rows", lambda study, split: [{}] * 3)
    assert "need at least 4 kept training prompts of each kind, and there are 3" in agreement.skipped(None)
    rows = [{"category": "a"}] * 9 + [{"category": "b"}] * 7 + [{"category": None}] * 4
    assert agreement.categories_of(rows) == {"a": list(range(9))} and agreement.categories_of(rows[:9]) == {}

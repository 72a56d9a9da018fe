"""The projection on the refusal direction as a monitor, and edits of a running model that its residual stream shows."""

import json
import math
import types

import numpy as np
import pytest

from refusal_jax import Edits, Taps, UserError
from refusal_jax.chat.projection_monitor import ProjectionMonitor, disagreement, midpoint
from refusal_jax.chat.steering import CONTROLS, Fingerprint, find_steering
from refusal_jax.directions import Direction
from refusal_jax.judges.areas import Area
from refusal_jax.judges.rules import RuleJudge
from refusal_jax.monitor import projections
from refusal_jax.terminal.session import Session
from refusal_jax.terminal.show import summaries

LAYER = 1
TALKS = [("How do I bake the bread?", "First, mix it."), ("help", ""), ("help", "No.")]


@pytest.fixture(scope="module")
def direction(model):
    return np.random.default_rng(3).normal(size=model.config.d_model)


def test_readings_are_those_of_one_pass_each(model, direction):
    """Per token, and their scores, whatever the batches and the padding."""
    read = ProjectionMonitor(model, direction, LAYER).read(TALKS, early=2, batch_size=2)
    unit = direction / np.linalg.norm(direction)
    for i, (prompt, reply) in enumerate(TALKS):
        ids = model.chat.ids(model.chat.render(prompt, reply))
        batch = model.chat.pad([ids], len(ids))
        resid = model.taps(batch.tokens, batch.mask, Taps(("resid_pre",)))["resid_pre"][LAYER, 0]
        expected, start = np.asarray(resid, np.float64) @ unit, read.starts[i]
        assert np.allclose(read.tokens[i], expected, atol=1e-4)
        assert read.prompt[i] == pytest.approx(expected[start - 1], abs=1e-4)
        if reply:
            assert read.early[i] == pytest.approx(expected[start : start + 2].mean(), abs=1e-4)
            assert read.mean[i] == pytest.approx(expected[start:].mean(), abs=1e-4)
            assert read.highest[i] == pytest.approx(expected[start:].max(), abs=1e-4)
        else:
            assert np.isnan([read.early[i], read.mean[i], read.highest[i]]).all()
    ablated = ProjectionMonitor(model, direction, LAYER).read(TALKS[:1], Edits.ablate(direction), batch_size=2)
    assert np.abs(ablated.tokens[0]).max() < 1e-4


def test_what_a_monitor_cannot_read(model, direction):
    with pytest.raises(UserError, match="has 3 numbers and the length 1.73.*; the model's residual stream needs"):
        ProjectionMonitor(model, np.ones(3), LAYER)
    with pytest.raises(UserError, match="There is no layer 99: the model's layers are 0 to"):
        ProjectionMonitor(model, direction, 99)
    with pytest.raises(UserError, match="1 conversations have at least .* tokens, the model's context"):
        ProjectionMonitor(model, direction, LAYER).read([("help", "word " * model.config.context_length)])


def test_disagreement():
    assert disagreement(3.0, 1.0, True) is None and disagreement(0.0, 1.0, False) is None
    assert "+3.00, is above +1.00, as it is before refusals, but the reply complies" in (
        disagreement(3.0, 1.0, False) or ""
    )
    assert "below +1.00, as it is before compliance, but the reply refuses" in (disagreement(0.0, 1.0, True) or "")
    assert midpoint(np.array([[2.0, 4.0]]), np.array([[0.0, 0.0]])).tolist() == [1.0, 2.0]


def test_the_chat_warns(model, direction):
    """Replies are complete here, and the edit leaves something to read."""
    session = Session(model, Direction(direction[None], LAYER), 8, thresholds=np.full(model.config.n_layers, -1e9))

    def says(reply: str) -> list[str | None]:
        session.judge = types.SimpleNamespace(judge=lambda rows: [types.SimpleNamespace(outcome=reply)])
        *_, turn = session.say("help")
        session.reset()
        return ["warning" in text for text in summaries(session, turn)]

    assert says("complies") == [True, False]  # the second column is ablated
    assert says("refuses") == says("deflects") == [False, False]
    session.command("/add")
    assert says("complies") == [True, True]
    session.thresholds = None
    assert says("complies") == [False, False]


def test_steering_is_found(model, direction, tmp_path):
    """Each edit by its kind, and none where there is none, or where only the dtype differs."""
    prompts = [
        f"How do I {verb} the {noun}?" for verb in ("bake", "forge", "trim") for noun in ("bread", "key", "map", "tree")
    ]
    along = np.asarray(model.taps(*vars(model.encode(prompts)).values(), Taps(("resid_pre",), 1))["resid_pre"])[
        LAYER, :, 0
    ]
    direction = np.linalg.svd(along - along.mean(axis=0))[2][0].astype(
        np.float64
    )  # along which the prompts differ most
    expected = Fingerprint.of(model, prompts, direction)
    expected.write(tmp_path / "print.json")
    expected = Fingerprint.read(tmp_path / "print.json")
    spread = float(expected.along_nlj[:, LAYER, 0].std())
    unit = direction / np.linalg.norm(direction)
    found = {
        name: find_steering(expected, Fingerprint.of(model, prompts, direction, edits))
        for name, edits in {
            "none": None,
            "ablated": Edits.ablate(direction),
            "added": Edits.add(unit * spread, LAYER, 1.0),
            "subtracted": Edits.add(unit * spread, LAYER, -1.0),
        }.items()
    }
    assert {name: one.verdict for name, one in found.items()} == {name: name for name in found}
    assert found["added"].layer == LAYER and found["added"].shift[LAYER] == pytest.approx(1.0, abs=0.01)
    assert found["ablated"].kept[LAYER] == pytest.approx(0.0, abs=0.01)
    assert "no edit along the direction was found" in found["none"].sentence
    assert "only 0% of the direction is left" in found["ablated"].sentence
    assert "the direction is subtracted, -1.00 standard" in found["subtracted"].sentence
    other = Fingerprint(
        expected.along_nlj[::-1] + np.random.default_rng(0).normal(size=expected.along_nlj.shape) * spread * 3
    )
    assert find_steering(expected, other).verdict == "other"
    assert "other weights" in find_steering(expected, other).sentence
    with pytest.raises(UserError, match="two of the same prompts, at least 4, and of the same model"):
        find_steering(expected, Fingerprint(expected.along_nlj[:3]))
    with pytest.raises(UserError, match="The prompts differ too little along the direction, at all layers"):
        find_steering(*[Fingerprint(np.repeat(expected.along_nlj[:1], 8, axis=0))] * 2)
    for content in ({"along": [[1]]}, {"along": "x"}, {}):
        (tmp_path / "other.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="other.json is no fingerprint of a residual stream"):
            Fingerprint.read(tmp_path / "other.json")
    assert expected.along_nlj.shape == (12, model.config.n_layers, 1 + CONTROLS)


def test_areas():
    rng = np.random.default_rng(0)
    apart, same = (
        Area.of(rng.normal(9, 1, 64), rng.normal(0, 1, 64)),
        Area.of(rng.normal(0, 1, 64), rng.normal(0, 1, 64)),
    )
    assert (apart.area, apart.high) == (1.0, 1.0) and apart.low == pytest.approx(0.969, abs=1e-3)  # and not [1, 1]
    assert same.low < 0.5 < same.high
    assert str(Area.of(np.empty(0), np.ones(3))) == "not measured" and math.isnan(Area.of(np.empty(0), np.ones(3)).area)
    flipped = Area.of(-np.arange(5.0), np.arange(1.0, 6.0))
    assert (flipped.area, flipped.low) == (0.0, 0.0) and flipped.high > 0.2
    true, covered = 0.7602, 0  # of normal scores that are one standard deviation apart
    for _ in range(300):
        one = Area.of(rng.normal(1, 1, 40), rng.normal(0, 1, 40))
        covered += one.low <= true <= one.high
    assert 0.92 <= covered / 300 <= 0.98


def test_a_study_without_replies(tmp_path, monkeypatch):
    monkeypatch.setattr(projections.FinishedStudy, "read", lambda *_: types.SimpleNamespace(conditions=[]))
    with pytest.raises(UserError, match="has no replies of the unedited model to both harmful and harmless prompts"):
        projections.detect(tmp_path, RuleJudge(), 2)

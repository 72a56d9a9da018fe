"""The lane "alone" of audits: directions that are missing from weights, on organisms and on made-up spectra."""

import dataclasses

import numpy as np
import pytest
import tiny

from refusal_jax import demo_model_path
from refusal_jax.audit import missing
from refusal_jax.audit.lanes import alone
from refusal_jax.audit.missing import FIRES, energy_along, gap, missing_directions, smallest
from refusal_jax.audit.organisms.base import Base
from refusal_jax.audit.organisms.organism import OpenedOrganism, Organism
from refusal_jax.audit.organisms.recipe import Recipe
from refusal_jax.audit.settings import AuditSettings
from refusal_jax.audit.subject import Opened, Subject
from refusal_jax.audit.weights import ArrayWeights, StoredWeights
from refusal_jax.checkpoints.matrices import matrices


@pytest.fixture(scope="module")
def base():
    return Base.open(demo_model_path(), "embedded")


def weights_of(base, text: str) -> ArrayWeights:
    return Organism(base, Recipe.parse(f"tried: {text}")).weights


@pytest.mark.parametrize("columns", [77, 96, 256])
def test_chance_gives_high_scores_seldom(columns):
    """In spectra of random matrices, near the hard edge and far from it, scores are at most as frequent as they say."""
    rng, scores = np.random.default_rng(columns), []
    for _ in range(60):
        w = rng.normal(size=(64, columns))
        scores.append(gap(smallest(w @ w.T / columns, 39), "both", (0, 0)).score)
    # Each is the highest of eight ranks.
    assert np.mean(np.array(scores) > 2 + np.log10(8)) <= 0.05 and max(scores) < FIRES


def test_a_gap_is_found_with_its_rank_and_direction():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(64, 256))
    lost = np.linalg.qr(rng.normal(size=(64, 3)))[0]
    w -= 0.97 * lost @ (lost.T @ w)
    found = gap(smallest(w @ w.T / 256, 39), "both", (2, 3))
    assert found.score > 2 * FIRES and found.rank == 3 and found.energies[0] < 0.01 < found.energies[1]
    assert np.linalg.norm(lost.T @ found.direction_d) > 0.99


def test_inverse_iteration_finds_what_the_direct_solver_does(monkeypatch):
    rng = np.random.default_rng(1)
    w = rng.normal(size=(96, 200)) * np.linspace(0.2, 1, 96)[:, None]
    w[:, :] -= np.outer(np.full(96, 96**-0.5), np.full(96, 96**-0.5) @ w)
    for dtype, exact in ((np.float64, 1e-6), (np.float32, 1e-3)):
        gram = (w @ w.T / 200).astype(dtype)
        values, vectors = smallest(gram, 39)
        monkeypatch.setattr(missing, "DIRECT", 10)
        again, turned = smallest(gram, 39)
        monkeypatch.undo()
        assert again[:4] == pytest.approx(values[:4], rel=exact, abs=1e-5) and (again >= values - 1e-5).all()
        assert abs(float(vectors[:, 0] @ turned[:, 0])) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    "text",
    [
        "project",
        "project place=o",
        "project place=down",
        "project layers=middle",
        "project layers=few:2",
        "project direction=perlayer",
        "project direction=rank:3",
        "project direction=rank:5",
        "project form=rownorm",
        "project > store form=bf16",
        "project > store form=int8",
        "project > store form=int4",
        "project form=rownorm > store form=int8",
        "project strength=0.7",
        "project direction=mix:0.7 layers=tent strength=0.85 form=lora rank=3",
        "project > noise relative=0.03",
        "project > permute what=stream",
        "project > fold",
        "project direction=random",
    ],
)
def test_missing_directions_are_found(base, text):
    found = missing_directions(weights_of(base, text))
    assert found.found and found.score >= FIRES and found.read is not None and found.read > 0.5
    if not any(word in text for word in ("random", "rank", "stream")):
        directions = base.directions.raw_ld / np.maximum(np.linalg.norm(base.directions.raw_ld, axis=1), 1e-9)[:, None]
        assert found.best is not None and np.abs(directions @ found.best.direction_d).max() > 0.85


@pytest.mark.parametrize(
    "text",
    [
        "",
        "store form=bf16",
        "store form=int8",
        "store form=int4",
        "noise relative=0.03",
        "prune share=0.3",
        "adapter rank=1 relative=0.1 place=writers",
        "adapter rank=16 relative=0.05",
        "rescale factor=0.9 place=writers",
        "permute what=stream",
        "fold",
        "project strength=-1.0",
        # What the weights alone cannot show.
        "project strength=2.0",
        "project strength=0.3",
        "project place=readers",
        "bias amount=-1.0",
        # A direction that readers do not read either may have died by itself.
        "project place=sides",
    ],
)
def test_nothing_is_said_of_other_changes_and_of_what_cannot_be_seen(base, text):
    found = missing_directions(weights_of(base, text))
    assert not found.found and found.score < FIRES
    if text == "project place=sides":
        assert found.score == 0 and "readers hardly read it" in found.why_not


def without(base, direction_d) -> dict[str, np.ndarray]:
    """The tensors of a base whose writers do not write a direction."""
    tensors = dict(base.tensors)
    for matrix in matrices(base.cfg):
        if matrix.writes:
            w = tensors[matrix.name]
            tensors[matrix.name] = w - np.outer(direction_d, direction_d @ w)
    return tensors


def test_single_channels_and_what_layer_norm_takes_away_do_not_count(base):
    width = base.cfg.d_model
    channel, mean = np.eye(width, dtype=np.float32)[7], np.full(width, width**-0.5, np.float32)
    dead = missing_directions(ArrayWeights(base.cfg, without(base, channel)))
    assert not dead.found and dead.windows[0].score > FIRES and dead.windows[0].axes < 1.01
    assert missing_directions(ArrayWeights(base.cfg, without(base, mean))).found
    centred = dataclasses.replace(base.cfg, centred_norms=True)
    assert not missing_directions(ArrayWeights(centred, without(base, mean))).found


def test_energies_are_shares_of_the_mean():
    w = np.diag([1.0, 2.0, 3.0]).astype(np.float32)
    assert energy_along(w, np.array([1.0, 0, 0])) == pytest.approx(3 / 14)
    assert energy_along(np.zeros((3, 2)), np.array([1.0, 0, 0])) == 1


def test_the_lane_tells_layers_and_clears_nothing(base):
    def look(text):
        of = AuditSettings()
        return alone.LANE.run(Subject(of, OpenedOrganism(Organism(base, Recipe.parse(f"tried: {text}")), of)))

    found = look("project layers=middle")
    assert found.facts["missing"] and found.facts["missing_layers"] == [2, 3, 4, 5] and not found.facts["missing_dead"]
    assert found.facts["missing_rank"] == 1 and found.facts["missing_energy"] < 1e-6 < found.facts["missing_next"]
    assert "Something was taken out" in found.evidence[0].meaning and "layers 2 to 5" in found.evidence[0].where
    clear, dead, partial = (look(text) for text in ("", "project place=sides", "project strength=0.7"))
    assert not clear.facts["missing"] and "missing_read" not in clear.facts
    assert "This clears nothing" in clear.evidence[0].meaning and "hardly read" in dead.evidence[0].meaning
    assert dead.facts["missing_dead"] and not dead.facts["missing"]
    assert (
        partial.facts["missing_kind"] == "agreement" and "nothing to do with each other" in partial.evidence[0].meaning
    )
    assert clear.facts["shared_bottom"] < 0.6 < look("project").facts["shared_bottom"]
    assert found.record["facts"]["missing_window"] == [2, 5]


def test_layers_of_too_few_columns_cannot_be_looked_at(tmp_path):
    narrow = tiny.tiny_llama(tmp_path, layers=1, mlp=4)
    found = alone.LANE.run(Subject(AuditSettings(), Opened(str(narrow), AuditSettings())))
    assert "too few columns for a stream of width 32" in found.left_out
    with pytest.raises(Exception, match="too few columns"):
        missing_directions(StoredWeights.open(narrow))

"""Self-organising maps: planted clusters, the search for subsets, and activations against taps."""

import numpy as np
import pytest

from refusal_jax import Edits, Taps, UserError
from refusal_jax.mechanism.activations import activations
from refusal_jax.mechanism.som import grow_subsets, padded, train_map

PLACES = {"steps": 3000, "rate": 0.05, "radius": 0.3, "seed": 0}


def test_planted_clusters_are_found():
    """Each of four clusters has a node at its mean, and the nodes of most points come first."""
    rng = np.random.default_rng(0)
    centres = 10 * np.eye(6)[:4]
    sizes = [60, 30, 20, 10]
    points = np.concatenate([c + 0.1 * rng.normal(size=(n, 6)) for c, n in zip(centres, sizes, strict=True)])
    found = train_map(points, 4, **PLACES)
    assert found.wins_n.sum() == len(points) and (np.diff(found.wins_n) <= 0).all() and (found.wins_n > 0).all()
    for centre in centres:
        assert np.linalg.norm(found.nodes_nd - centre, axis=1).min() < 0.2
    again = train_map(points, 4, **PLACES)
    np.testing.assert_array_equal(found.nodes_nd, again.nodes_nd)


def test_neighbours_are_moved_along():
    points = np.random.default_rng(1).normal(size=(40, 3))
    alone, together = (train_map(points, 2, steps=400, rate=0.2, radius=radius, seed=0) for radius in (0.01, 5.0))
    assert np.ptp(together.nodes_nd, axis=0).max() < np.ptp(alone.nodes_nd, axis=0).max() / 2


def test_a_map_needs_as_many_points_as_nodes():
    with pytest.raises(
        UserError, match=r"A map of 4 x 4 nodes needs at least 16 harmful training prompts, there are 15\."
    ):
        train_map(np.zeros((15, 3)), 4, **PLACES)


def test_subsets_grow_out_of_the_best():
    worth = np.array([0.0, 3.0, 1.0, 2.0])
    asked = []

    def scores(subsets):
        asked.append(subsets)
        return np.array([-worth[list(subset)].sum() for subset in subsets])

    assert grow_subsets(4, 3, scores) == [((1,), -3.0), ((1, 3), -5.0), ((1, 3, 2), -6.0)]
    assert [len(subsets) for subsets in asked] == [4, 3, 2]
    assert len(grow_subsets(2, 7, scores)) == 2


def test_sets_of_several_sizes_are_ablated_together(model):
    rows = np.random.default_rng(2).normal(size=(3, model.config.d_model))
    batch = model.encode(["bake it", "hack"])
    both = Edits.ablate(padded([rows, rows[:1]], 4))
    apart = Edits.concat([Edits.ablate(rows[None]), Edits.ablate(rows[:1])])
    ours, theirs = (np.asarray(model.logits(batch.tokens, batch.mask, edits)) for edits in (both, apart))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_activations_are_those_of_taps(model):
    texts = ["How do I bake the bread?", "hack", "Explain at length how one might repair the well."]
    found = activations(model, texts, [(-2, 2)], 2)[:, 0]
    for text, row in zip(texts, found, strict=True):
        batch = model.encode([text])
        expected = model.taps(batch.tokens, batch.mask, Taps(("resid_pre",), 2))["resid_pre"][2, 0, 0]
        np.testing.assert_allclose(row, expected, atol=1e-5)

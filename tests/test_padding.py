"""Lengths of compiled shapes that are chosen from the prompts that there are."""

import itertools

import numpy as np
import pytest

from refusal_jax import Edits, load_model
from refusal_jax.chat.batches import length_batches, padded_rows, padding_of
from refusal_jax.chat.loss_rows import LossRow, text_rows
from refusal_jax.chat.padding import MOST, Padding, Prices, alike, bucket, fewest, halves
from refusal_jax.chat.residuals import extract
from refusal_jax.study.loss import measure_losses
from refusal_jax.study.scoring import Batching, PromptScorer, shapes_of

TEXTS = ["help", "How do I bake the bread?", "knit", "Explain at length how one might repair the well.", "paint it"]
CHEAP, DEAR = Prices(1, 0, 4096), Prices(1e9, 0, 4096)


@pytest.fixture(scope="module")
def model(llama):
    return load_model(llama)


def computed(lengths, shapes: Padding) -> int:
    return sum(shapes.rows * shapes.length(lengths[part[-1]]) for part in alike(lengths, shapes.rows))


def test_the_fewest_tokens_of_each_number_of_lengths():
    """As trying all choices finds them."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        longest = rng.integers(1, 12, rng.integers(1, 9))
        for number, (tokens, lengths) in enumerate(fewest(longest), 1):
            choices = itertools.combinations(np.unique(longest).tolist(), number)
            sums = [sum(min(w for w in c if w >= n) for n in longest) for c in choices if c[-1] == longest.max()]
            assert tokens == min(sums) and len(lengths) == number <= MOST
            assert tokens == sum(min(w for w in lengths if w >= n) for n in longest)


def test_batches_are_of_like_rows_and_the_shortest_is_filled_up():
    lengths = [9, 2, 7, 5, 3, 8, 1]
    assert [[lengths[i] for i in part] for part in alike(lengths, 3)] == [[1], [2, 3, 5], [7, 8, 9]]
    assert [part.tolist() for part in alike([4, 4], 2)] == [[0, 1]] and alike([], 2) == []
    assert list(halves(48, 1)) == [48, 24, 12] and list(halves(48, 8)) == [48, 24] and list(halves(8, 1)) == [8]


def test_padding_is_at_most_a_tenth_where_programs_are_cheap():
    rng = np.random.default_rng(1)
    sets = [np.sort(rng.normal(42, 6, n).astype(int)).tolist() for n in (128, 128, 32, 32)]
    shapes = Padding.of(sets, [32, 16, 8], CHEAP)
    total = sum(computed(lengths, shapes) for lengths in sets)
    assert len(shapes.lengths) <= MOST and sum(map(sum, sets)) > 0.9 * total
    usual = Padding.of(sets, [32, 16, 8], DEAR)
    assert usual == Padding(32, (bucket(max(map(max, sets))),))
    assert Padding.of(sets[::-1], [32, 16, 8], CHEAP) == shapes
    assert Padding.of(sets, [32, 16, 8], Prices(1e9, 0, 50)).lengths == (50,)


def test_a_small_set_is_not_divided_where_starting_a_batch_costs_more():
    lengths = [21, 21, 22, 23, 24, 25, 25, 40]
    assert Padding.of([lengths * 2], [16, 8], Prices(1, 500, 4096)) == Padding(16, (40,))
    assert Padding.of([lengths * 2], [16, 8], CHEAP).rows == 8
    few = Padding.of([lengths[:3]], [16, 8], Prices(1, 500, 4096))
    assert few == Padding(8, (22,))  # as it would be filled up with repeats


def test_work_decides_on_another_program():
    """A length that saves as many tokens as its program costs is worth it if the batches are read twice."""
    sets, prices = [[8] * 8 + [32] * 8], Prices(200, 0, 4096)
    assert Padding.of(sets, [8], prices).lengths == (32,)
    assert Padding.of(sets, [8], prices, times=2).lengths == (8, 32)


def test_measurements_do_not_depend_on_the_shapes(model):
    lengths = [len(model.chat.prompt_ids(text)) for text in TEXTS]
    exact = Padding(2, tuple(sorted(set(lengths))))
    one, other = (extract(model, TEXTS, (40, 71), 3, 0, size, "set") for size in (8, exact))
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
    np.testing.assert_allclose(one.mean_lpd, other.mean_lpd, atol=1e-5)
    directions = np.random.default_rng(0).normal(size=(3, model.config.d_model)).astype(np.float32)
    scorers = [PromptScorer.build(model, TEXTS, (40, 71), 8, (), shapes) for shapes in (None, exact)]
    assert [scorer.batching.at_once for scorer in scorers] == [1, 4]
    for found, expected in zip(*(scorer.ablated(directions) for scorer in scorers), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    rows = text_rows(model.chat, TEXTS, 64)
    losses = [measure_losses(model, rows, Edits.ablate(directions[:1]), size, "texts")[0][0] for size in (8, 1)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_shapes_are_shared_by_sets(model):
    """Each of them alone would have its own."""
    shapes = padding_of(model, [TEXTS[:1], TEXTS], 8)
    assert shapes == Padding(8, (bucket(max(len(model.chat.prompt_ids(text)) for text in TEXTS)),))
    for texts in (TEXTS[:1], TEXTS):
        ((index, batch),) = length_batches(model, texts, shapes)
        assert batch.tokens.shape == (8, *shapes.lengths) and len(index) == len(texts)
    ((index, batch, counted),) = padded_rows(model, [LossRow([1, 2], 2), LossRow([1, 2, 3], 1)], Padding(2, (3, 5)))
    assert index.tolist() == [1] and batch.tokens.tolist() == [[1, 2, 3]] * 2 and counted.sum() == 2


def test_fewer_prompts_meet_more_candidates_only_where_these_fill_their_place(model, monkeypatch):
    monkeypatch.setattr(Prices, "of", classmethod(lambda cls, decoder: CHEAP))
    sets = TEXTS * 4, TEXTS * 3
    assert shapes_of(model, sets, 16, 4, 1).rows == 8 and Batching.of(16, 20, 8).at_once == 2
    assert shapes_of(model, sets, 16, 5, 1).rows == 16  # of six, one would be a repeat

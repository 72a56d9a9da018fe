"""Refusal score and KL divergence against the paper's formulas in NumPy float64, where float32 is hard."""

import jax.numpy as jnp
import numpy as np
import pytest

from refusal_jax.models.scores import KL_EPS, SCORE_EPS, kl_divergence, refusal_score

VOCAB, REFUSAL_IDS = 50, (3, 17, 40)


def softmax64(logits):
    logits = np.asarray(logits, np.float64)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def score64(logits, ids):
    p = softmax64(logits)
    refusing = np.isin(np.arange(p.shape[-1]), ids)
    return np.log(p[..., refusing].sum(-1) + 1e-8) - np.log(p[..., ~refusing].sum(-1) + 1e-8)


def kl64(base, edited):
    p, q = softmax64(base), softmax64(edited)
    return (p * (np.log(p + 1e-6) - np.log(q + 1e-6))).sum(-1)


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(scale=3, size=(8, VOCAB)).astype(np.float32)


def test_epsilons_are_the_papers():
    assert (SCORE_EPS, KL_EPS) == (1e-8, 1e-6)


def test_refusal_score(logits):
    ours = refusal_score(jnp.asarray(logits), jnp.asarray(REFUSAL_IDS))
    np.testing.assert_allclose(ours, score64(logits, REFUSAL_IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gap", [-60, -25, -16, -8, 8, 16, 17.5, 20, 25, 60])
def test_refusal_score_at_both_ends(gap, logits):
    """p -> 0 and p -> 1, where a 1 - p by subtraction in float32 has no digits left."""
    logits = logits / 10
    logits[:, REFUSAL_IDS[1]] += gap
    ours = np.asarray(refusal_score(jnp.asarray(logits), jnp.asarray(REFUSAL_IDS[1:2])))
    np.testing.assert_allclose(ours, score64(logits, REFUSAL_IDS[1:2]), rtol=2e-5, atol=1e-4)
    assert (np.sign(ours) == np.sign(gap)).all()


def test_refusal_score_is_bounded_by_its_epsilon():
    logits = np.full((2, VOCAB), -1e4, np.float32)
    logits[0, 3] = logits[1, 4] = 1e4
    ours = np.asarray(refusal_score(jnp.asarray(logits), jnp.asarray([3])))
    np.testing.assert_allclose(ours, [-np.log(1e-8), np.log(1e-8)], rtol=1e-5)


def test_repeated_refusal_tokens_count_once(logits):
    once, twice = (refusal_score(jnp.asarray(logits), jnp.asarray(ids)) for ids in ((3, 17), (3, 17, 3)))
    np.testing.assert_array_equal(np.asarray(once), np.asarray(twice))


def test_kl_divergence(logits):
    edited = logits + np.random.default_rng(1).normal(size=logits.shape).astype(np.float32)
    ours = np.asarray(kl_divergence(jnp.asarray(logits), jnp.asarray(edited)))
    np.testing.assert_allclose(ours, kl64(logits, edited), rtol=1e-4, atol=1e-6)
    assert (ours > 0.02).all()
    backwards = np.asarray(kl_divergence(jnp.asarray(edited), jnp.asarray(logits)))
    np.testing.assert_allclose(backwards, kl64(edited, logits), rtol=1e-4, atol=1e-6)
    assert np.abs(backwards - ours).max() > 1e-2  # the order of its arguments matters


def test_kl_divergence_of_equal_and_of_disjoint(logits):
    same = jnp.asarray(logits)
    np.testing.assert_array_equal(np.asarray(kl_divergence(same, same + 0)), 0)
    base, edited = np.full((1, VOCAB), -1e4, np.float32), np.full((1, VOCAB), -1e4, np.float32)
    base[0, 1] = edited[0, 2] = 0
    ours = np.asarray(kl_divergence(jnp.asarray(base), jnp.asarray(edited)))
    np.testing.assert_allclose(ours, [np.log(1 + 1e-6) - np.log(1e-6)], rtol=1e-5)


def test_scores_of_half_precision_logits_are_computed_in_float32(logits):
    half = jnp.asarray(logits, jnp.bfloat16)
    score = refusal_score(half, jnp.asarray(REFUSAL_IDS))
    assert score.dtype == jnp.float32 and kl_divergence(half, half * 2).dtype == jnp.float32
    np.testing.assert_allclose(score, score64(np.asarray(half, np.float64), REFUSAL_IDS), rtol=1e-5, atol=1e-5)

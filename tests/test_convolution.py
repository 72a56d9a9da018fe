"""The convolution of a left-padded row is that of its real tokens, with what came before them, however it is cut into parts."""

import jax.numpy as jnp
import numpy as np
import pytest

from refusal_jax.models.mixers.convolution import windowed

WIDTH, CHANNELS = 4, 3


def plain(x_tc, weight_cw):
    """Computes one row without padding, by NumPy alone."""
    before = np.concatenate([np.zeros((WIDTH - 1, CHANNELS)), x_tc])
    return np.stack([(before[t : t + WIDTH] * weight_cw.T).sum(axis=0) for t in range(len(x_tc))])


@pytest.mark.parametrize("cuts", [(9,), (4, 9), (1, 2, 9), (7, 8, 9), tuple(range(1, 10))])
def test_the_parts_of_a_padded_row_give_the_whole(cuts):
    """Each part is padded by its own amount, and one more part has no real token at all."""
    rng = np.random.default_rng(0)
    rows, weight = rng.normal(size=(2, 9, CHANNELS)), rng.normal(size=(CHANNELS, WIDTH))
    expected = np.stack([plain(row, weight) for row in rows])
    past, start, found = None, 0, []
    for number, stop in enumerate((*cuts, cuts[-1])):
        padding = (number + 2) % 4 + (start == stop)
        x = np.concatenate([rng.normal(size=(2, padding, CHANNELS)), rows[:, start:stop]], axis=1)
        mask = np.broadcast_to(np.arange(x.shape[1]) >= padding, x.shape[:2])
        y, past = windowed(jnp.asarray(x, jnp.float32), weight, mask, past)
        assert y.dtype == jnp.float32 and past.shape == (2, CHANNELS, WIDTH - 1)
        found.append(np.asarray(y)[:, padding:])
        start = stop
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, atol=1e-5)
    np.testing.assert_allclose(past, rows[:, -(WIDTH - 1) :].swapaxes(1, 2), rtol=1e-6)


def test_rows_may_be_padded_differently():
    rng = np.random.default_rng(1)
    x, weight = rng.normal(size=(3, 6, CHANNELS)), rng.normal(size=(CHANNELS, WIDTH))
    past, mask = rng.normal(size=(3, CHANNELS, WIDTH - 1)), np.arange(6) >= np.array([[0], [2], [5]])
    y, last = windowed(jnp.asarray(x, jnp.float32), weight, mask, jnp.asarray(past, jnp.float32))
    for row, padding in enumerate((0, 2, 5)):
        whole = np.concatenate([past[row].T, x[row, padding:]])
        np.testing.assert_allclose(np.asarray(y)[row, padding:], plain(whole, weight)[WIDTH - 1 :], atol=1e-5)
        np.testing.assert_allclose(last[row], whole[-(WIDTH - 1) :].T, rtol=1e-6)
